"""The fused attention against the formula; what causality, grouping and documents mean; and who computes."""

import sys
from dataclasses import fields
from itertools import pairwise
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from torch.nn.attention import SDPBackend

from megalrps.kernels import attention as module
from megalrps.kernels.attention import (
    attention,
    attention_reference,
    check_attention_backend,
    chosen_backend,
    documents_from_starts,
    documents_of,
)
from megalrps.kernels.options import AttentionBackend, KernelOptions

torch.set_num_threads(1)


def inputs(length, heads, groups, head_size, dtype=torch.float64, past=0):
    """Queries of ``length`` positions, keys and values of these and of the ``past`` ones before them."""
    generator = torch.Generator().manual_seed(length)
    return [
        torch.randn(2, positions, n, head_size, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
        for positions, n in ((length, heads), (past + length, groups), (past + length, groups))
    ]


SHAPES = [(1, 1, 1, 2), (5, 4, 2, 6), (33, 6, 1, 16), (64, 2, 2, 64), (130, 3, 3, 8)]


@pytest.mark.parametrize("past", [0, 1, 7, 64])
@pytest.mark.parametrize(("length", "heads", "groups", "head_size"), SHAPES)
def test_output_and_gradients_equal_the_formula(length, heads, groups, head_size, past):
    tensors = inputs(length, heads, groups, head_size, past=past)
    probe = torch.randn(2, length, heads, head_size, dtype=torch.float64)
    results = []
    for function in (attention, attention_reference):
        output = function(*tensors)
        results.append((output, *torch.autograd.grad((output * probe).sum(), tensors)))
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 6e-3)])
@pytest.mark.parametrize("function", [attention, attention_reference])
@pytest.mark.parametrize("past", [0, 33])
def test_precision(function, dtype, bound, past):
    tensors = inputs(97, 4, 2, 32, dtype, past)
    exact = attention_reference(*(x.double() for x in tensors))
    output = function(*tensors)
    assert output.dtype == dtype
    assert ((output.double() - exact).norm() / exact.norm()).item() < bound


def test_a_token_sees_no_later_token():
    query, key, value = (x.detach() for x in inputs(9, 4, 2, 8))
    before = attention(query, key, value)
    key[:, 6:] *= -50
    value[:, 6:] += 1e6
    torch.testing.assert_close(attention(query, key, value)[:, :6], before[:, :6], rtol=0, atol=1e-13)


@pytest.mark.parametrize("function", [attention, attention_reference])
@pytest.mark.parametrize("start", [0, 1, 4, 8])
def test_the_queries_are_the_last_positions_of_the_keys(function, start):
    query, key, value = inputs(9, 4, 2, 8)
    whole = function(query, key, value)
    torch.testing.assert_close(function(query[:, start:], key, value), whole[:, start:], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(
        function(query[:, start : start + 1], key[:, : start + 1], value[:, : start + 1]),
        whole[:, start : start + 1],
        rtol=1e-13,
        atol=1e-13,
    )


def test_neighbouring_query_heads_share_a_key_value_head():
    query, key, value = inputs(7, 4, 2, 8)
    spread = attention(query, key.repeat_interleave(2, 2), value.repeat_interleave(2, 2))
    torch.testing.assert_close(attention(query, key, value), spread, rtol=1e-13, atol=1e-13)


# Documents.


def cumulative(*lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def test_documents_know_where_each_token_s_document_begins_and_ends():
    documents = documents_of(cumulative(0, 2, 1, 0, 4, 3, 0), 2, 5)  # the fourth is cut by the end of its window
    assert documents.starts_BS.tolist() == [[0, 0, 2, 3, 3], [0, 0, 2, 2, 2]]
    assert documents.ends_BS.tolist() == [[2, 2, 3, 5, 5], [2, 2, 5, 5, 5]]
    assert documents.positions.tolist() == [[0, 1, 0, 0, 1], [0, 1, 0, 1, 2]]
    assert documents.cumulative_lengths.tolist() == [0, 2, 3, 5, 7, 10] and documents.longest == 3
    for x in (documents.starts_BS, documents.ends_BS, documents.cumulative_lengths, documents.positions):
        assert x.dtype == torch.int32 and x.is_contiguous()
    moved = documents.to("meta")
    assert moved.starts_BS.is_meta and moved.ends_BS.is_meta
    starts = torch.tensor([[False, False, True, True, False], [True, False, True, False, False]])
    marked = documents_from_starts(starts)
    assert torch.equal(marked.starts_BS, documents.starts_BS) and torch.equal(marked.ends_BS, documents.ends_BS)


@pytest.mark.parametrize(
    ("lengths", "words"),
    [
        (torch.tensor([0, 4, 9]), "from 0 to 9, and must go from 0 to 10"),
        (torch.tensor([1, 4, 10]), "from 1 to 10, and must go from 0 to 10"),
        (torch.tensor([0, 7, 4, 10]), "fall from 7 to 4 at 2"),
        (torch.tensor([0]), "integers"),
        (torch.tensor([0.0, 10.0]), "integers"),
        (torch.tensor([[0, 10]]), "integers"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(lengths, words):
    with pytest.raises(ValueError, match=words):
        documents_of(lengths, 2, 5)


def test_marks_that_are_no_boolean_matrix_are_refused():
    for marks in (torch.ones(2, 5), torch.ones(5, dtype=torch.bool)):
        with pytest.raises(ValueError, match="boolean"):
            documents_from_starts(marks)


@pytest.mark.parametrize("backend", ["auto", "sdpa", "reference"])
@pytest.mark.parametrize("lengths", [(7, 0, 1, 10), (9, 9), (18,), (1,) * 18])
def test_packed_documents_equal_documents_one_by_one(lengths, backend):
    query, key, value = inputs(9, 4, 2, 8)
    packed = attention(query, key, value, documents=documents_of(cumulative(*lengths), 2, 9), backend=backend)
    whole = packed.flatten(0, 1)
    cuts = sorted({0, 9, 18, *cumulative(*lengths).tolist()})
    for begin, end in pairwise(cuts):
        alone = attention(*(x.flatten(0, 1)[None, begin:end] for x in (query, key, value)))
        torch.testing.assert_close(whole[None, begin:end], alone, rtol=1e-12, atol=1e-12)


def test_documents_of_other_tokens_are_refused():
    query, key, value = inputs(9, 4, 2, 8)
    documents = documents_of(cumulative(18), 2, 9)
    for tensors in ((query[:1], key[:1], value[:1]), (query[:, 3:], key, value)):
        with pytest.raises(ValueError, match="whole windows"):
            attention(*tensors, documents=documents)


# Who computes.


@pytest.mark.parametrize(
    ("device", "documents", "requested", "name"),
    [
        ("cpu", False, "auto", "sdpa"),
        ("cpu", True, "auto", "sdpa"),
        ("cuda", False, "auto", "sdpa"),
        ("cuda", True, "auto", "triton"),
        ("cuda", False, "triton", "triton"),
        ("cuda", True, "reference", "reference"),
        ("cpu", True, "sdpa", "sdpa"),
    ],
)
def test_the_choice_is_by_device_and_documents(device, documents, requested, name, monkeypatch):
    monkeypatch.setattr(module, "HAS_TRITON", True)
    chosen, why = chosen_backend(device, documents=documents, requested=requested)
    assert chosen == name and len(why) > 10
    check_attention_backend(requested, device, documents=documents)


@pytest.mark.parametrize(
    ("requested", "device", "documents", "words"),
    [
        ("triton", "cpu", False, "need a CUDA device; use --attention-backend auto"),
        ("flash", "cpu", False, "needs a CUDA device; use --attention-backend auto"),
        ("flash", "cuda", False, "pip install flash-attn"),
        ("sdpa", "cuda", True, "196678.*use --attention-backend auto"),
        ("auto", "cuda", True, r"pip install 'megalrps\[gpu\]'"),
        ("triton", "cuda", False, r"pip install 'megalrps\[gpu\]'"),
    ],
)
def test_what_a_backend_cannot_do_is_said_with_the_mend(requested, device, documents, words, monkeypatch):
    monkeypatch.setattr(module, "HAS_TRITON", False)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=words):
        check_attention_backend(requested, device, documents=documents)


def test_a_backend_that_needs_a_gpu_is_refused_on_a_cpu_tensor():
    for backend in ("triton", "flash"):
        with pytest.raises(ValueError, match="CUDA device"):
            attention(*inputs(3, 1, 1, 2), backend=backend)


def test_the_package_flash_attn_gets_tokens_and_lengths(monkeypatch):
    """Its two functions stood for by the formula: what they are handed is what they must be."""

    def dense(query, key, value, *, causal):
        assert causal
        return attention_reference(query, key, value)

    def packed(query, key, value, query_ends, key_ends, longest_query, longest_key, *, causal):
        assert causal and query_ends is key_ends and query_ends.dtype == torch.int32
        assert (longest_query, longest_key) == (8, 8)
        parts = pairwise(query_ends.tolist())
        return torch.cat([attention_reference(*(x[None, a:b] for x in (query, key, value)))[0] for a, b in parts])

    package = SimpleNamespace(flash_attn_func=dense, flash_attn_varlen_func=packed)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    tensors = inputs(9, 4, 2, 8)
    torch.testing.assert_close(module._by_flash(*tensors, None), attention(*tensors), rtol=1e-12, atol=1e-12)
    documents = documents_of(cumulative(7, 0, 3, 8), 2, 9)
    expected = attention(*tensors, documents=documents)
    torch.testing.assert_close(module._by_flash(*tensors, documents), expected, rtol=1e-12, atol=1e-12)


def sdpa_state():
    """Which kernels SDPA may use, and the order in which it asks them: of the process."""
    allowed = torch.backends.cuda
    flags = (allowed.cudnn_sdp_enabled, allowed.flash_sdp_enabled, allowed.mem_efficient_sdp_enabled)
    return [flag() for flag in flags], torch._C._get_sdp_priority_order()


def test_cudnn_is_asked_first_for_whole_causal_attention_and_for_nothing_else():
    on_gpu = SimpleNamespace(device=torch.device("cuda"))
    before = sdpa_state()
    with module._in_order(on_gpu, causal=True):
        flags, order = sdpa_state()
        assert flags == [True, True, True]
        wanted = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
        assert order[:3] == [int(each) for each in wanted]
    assert sdpa_state() == before
    with module._in_order(on_gpu, causal=False):
        assert sdpa_state()[0] == [False, True, True]
    assert sdpa_state() == before


def test_what_the_user_switched_off_in_sdpa_stays_off():
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        before = sdpa_state()
        with module._in_order(SimpleNamespace(device=torch.device("cuda")), causal=True):
            assert sdpa_state()[0] == [True, False, True]
        assert sdpa_state() == before
    finally:
        torch.backends.cuda.enable_flash_sdp(True)


def test_every_backend_of_the_option_has_an_implementation():
    assert set(get_args(AttentionBackend)) == {"auto", *module._BACKENDS}
    assert [field.default for field in fields(KernelOptions)] == ["auto", "auto"]
