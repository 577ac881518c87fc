"""The fused attention against the formula written out, and what causality and grouping mean."""

import pytest
import torch

from megalrps.kernels.attention import attention, attention_reference

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
