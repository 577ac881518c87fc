"""The Triton kernels of attention against the formula in fp64, forwards and backwards, and the operation's contract."""

import pytest
import torch
from oracle import (
    ATTENTION_BF16,
    DEVICE,
    GRADIENT_BF16,
    SUM_FP32,
    check,
    drawn,
    framed,
    needs_triton,
    opcheck,
    poisoned_empty,
)

from megalrps.kernels import attention_operation as operation
from megalrps.kernels.attention import attention, attention_reference
from megalrps.kernels.attention_backward import attention_backward_triton
from megalrps.kernels.attention_forward import attention_forward_triton
from megalrps.kernels.attention_operation import attention_backward_reference, attention_forward_reference
from megalrps.kernels.attention_tiles import aligned, with_rows
from megalrps.kernels.documents import documents_of

torch.set_num_threads(1)

HOPPER = DEVICE == "cpu" or torch.cuda.get_device_capability()[0] == 9
FETCHES = [False, pytest.param(True, marks=pytest.mark.skipif(not HOPPER, reason="the copy engine is Hopper's"))]

# [B, S, T, N, K, D]: one row, groups of 1, 2 and 8, heads of all presets, lengths beside the tiles of 32, 64 and 128.
SHAPES = [
    (2, 1, 5, 4, 2, 32),
    (1, 130, 130, 2, 1, 24),
    (2, 64, 64, 1, 1, 64),
    (1, 33, 70, 8, 1, 80),
    (1, 5, 131, 2, 2, 96),
    (1, 129, 129, 1, 1, 128),
]
BOUNDS = {torch.float32: (SUM_FP32, SUM_FP32), torch.bfloat16: (ATTENTION_BF16, GRADIENT_BF16)}
# Of 2 windows of 132, the sixth cut: rows that see none of a tile's first keys, keys whose last rows are others'.
LENGTHS = (0, 1, 0, 69, 2, 160, 1, 31, 0)


def inputs(shape, dtype=torch.float32, scale=1.0):
    batch, queries, keys, heads, groups, head = shape
    sizes = ((queries, heads), (keys, groups), (keys, groups), (queries, heads))
    return [drawn(seed, batch, n, of, head, dtype=dtype, scale=scale) for seed, (n, of) in enumerate(sizes)]


def documents_with(lengths, batch, length):
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(DEVICE)
    return documents_of(ends, batch, length)


def by_triton(query, key, value, gradient, documents=None, tma=None):
    """The output, the log-sum-exp and the gradients of query, key and value."""
    output, logsumexp = attention_forward_triton(query, key, value, documents, tma=tma)
    gradients = attention_backward_triton(gradient, query, key, value, output, logsumexp, documents, tma=tma)
    return output, logsumexp, *gradients


def by_formula(query, key, value, gradient, documents=None):
    query, key, value, gradient = (x.double() for x in (query, key, value, gradient))
    output, logsumexp = attention_forward_reference(query, key, value, documents)
    gradients = attention_backward_reference(gradient, query, key, value, output, logsumexp, documents)
    return output, logsumexp, *gradients


def by_torch(query, key, value, gradient, documents=None):
    """Plain operations in the inputs' type."""
    leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    output = attention_reference(*leaves, documents)
    return output.detach(), None, *torch.autograd.grad(output, leaves, gradient)


def check_all(results, exact, dtype, peers):
    of_output, of_gradient = BOUNDS[dtype]
    bounds = (of_output, SUM_FP32, of_gradient, of_gradient, of_gradient)
    for result, right, bound, peer in zip(results, exact, bounds, peers, strict=True):
        check(result, right, bound, peer)


def assert_same(results, expected):
    for ours, theirs in zip(results, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@needs_triton
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_equal_fp64(shape, dtype, monkeypatch):
    tensors = inputs(shape, dtype)
    exact, peers = by_formula(*tensors), by_torch(*tensors)
    poisoned_empty(monkeypatch)
    check_all(by_triton(*tensors), exact, dtype, peers)


@needs_triton
@pytest.mark.parametrize("tma", FETCHES)
def test_documents_in_either_way_of_fetching(tma, monkeypatch):
    tensors, documents = inputs((2, 132, 132, 2, 1, 64), torch.bfloat16), documents_with(LENGTHS, 2, 132)
    exact, peers = by_formula(*tensors, documents), by_torch(*tensors, documents)
    poisoned_empty(monkeypatch)
    check_all(by_triton(*tensors, documents, tma), exact, torch.bfloat16, peers)


@needs_triton
def test_documents_in_fp32_and_single_tokens():
    tensors, documents = inputs((2, 66, 66, 2, 2, 32)), documents_with((*[1] * 9, 30, 0, 93), 2, 66)
    check_all(by_triton(*tensors, documents), by_formula(*tensors, documents), torch.float32, [None] * 5)


@needs_triton
@pytest.mark.parametrize("tma", FETCHES)
def test_packed_documents_are_documents_one_by_one(tma):
    """To the bit where documents begin at a tile's border, which is 128 rows here at most."""
    lengths = (128, 128, 70)
    tensors = inputs((1, sum(lengths), sum(lengths), 2, 1, 32), torch.bfloat16)
    packed = by_triton(*tensors, documents_with(lengths, 1, sum(lengths)), tma)
    begin = 0
    for length in lengths:
        part = slice(begin, begin + length)
        alone = by_triton(*(x[:, part] for x in tensors), documents_with((length,), 1, length), tma)
        assert_same(
            (packed[1][..., part], *(packed[i][:, part] for i in (0, 2, 3, 4))), (alone[1], alone[0], *alone[2:])
        )
        begin += length


@needs_triton
def test_packed_documents_are_documents_one_by_one_at_any_border():
    lengths = (45, 1, 53)
    tensors = inputs((1, 99, 99, 1, 1, 32))
    packed = by_triton(*tensors, documents_with(lengths, 1, 99))
    begin = 0
    for length in lengths:
        part = slice(begin, begin + length)
        alone = by_triton(*(x[:, part] for x in tensors))
        for index in (0, 2, 3, 4):
            torch.testing.assert_close(packed[index][:, part], alone[index], rtol=1e-5, atol=1e-5)
        begin += length


@needs_triton
def test_what_lies_in_other_documents_tiles_is_not_read():
    """So the work is that of the documents: what would be read would be NaN."""
    tensors = inputs((1, 384, 384, 1, 1, 32), torch.bfloat16)
    for x in tensors:
        x[:, :128] = x[:, 256:] = torch.nan
    output, logsumexp, *gradients = by_triton(*tensors, documents_with((128, 128, 128), 1, 384))
    for x in (output, *gradients):
        assert x[:, 128:256].isfinite().all() and x[:, :128].isnan().any() and x[:, 256:].isnan().any()
    assert logsumexp[..., 128:256].isfinite().all()


@needs_triton
@pytest.mark.parametrize("tma", FETCHES)
def test_kernels_leave_what_lies_around_alone(tma, monkeypatch):
    """Neither what surrounds the inputs is read, nor what surrounds the results written."""
    checks = []

    def surrounded(x):
        inner, untouched = framed(x)
        checks.append(untouched)
        return inner

    tensors = [surrounded(x) for x in inputs((1, 37, 37, 2, 1, 64), torch.bfloat16)]
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *sizes, make=make, **named: surrounded(make(*sizes, **named).zero_()))
    results = by_triton(*tensors, tma=tma)
    monkeypatch.undo()
    assert len(checks) >= len(tensors) + len(results)
    for untouched in checks:
        untouched()
    assert all(x.isfinite().all() for x in results)


@needs_triton
@pytest.mark.parametrize("tma", FETCHES)
def test_heads_cut_from_one_projection_are_taken_as_they_lie(tma):
    heads, groups, head, length = 2, 1, 32, 40
    whole = drawn(7, 2, length, (heads + 2 * groups) * head, dtype=torch.bfloat16)
    query, key, value = (
        x.unflatten(-1, (-1, head)) for x in whole.split([heads * head, groups * head, groups * head], dim=-1)
    )
    gradient = drawn(8, 2, heads, length, head, dtype=torch.bfloat16).transpose(1, 2)
    for x in (query, key, value, gradient):
        assert not x.is_contiguous() and with_rows(x) is x and aligned(x)
    expected = by_triton(*(x.contiguous() for x in (query, key, value, gradient)), tma=tma)
    assert_same(by_triton(query, key, value, gradient, tma=tma), expected)


@needs_triton
def test_rows_that_are_not_contiguous_are_copied():
    tensors = inputs((1, 9, 9, 1, 1, 32))
    spread = [torch.stack((x, x), -1)[..., 0] for x in tensors]
    spread[3] = tensors[3][..., :1].expand_as(tensors[3])  # as the gradient of a sum is
    tensors[3] = spread[3].contiguous()
    assert_same(by_triton(*spread), by_triton(*tensors))


def test_only_aligned_rows_are_fetched_by_descriptors():
    x = drawn(0, 1, 4, 2, 32, dtype=torch.bfloat16)
    assert aligned(x) and aligned(x[:, 1:])
    assert (
        not aligned(x[..., 1:]) and not aligned(x[..., :20].contiguous()) and not aligned(x[:, :1].expand(1, 4, 2, 32))
    )


@needs_triton
@pytest.mark.parametrize("dtype", BOUNDS)
def test_extreme_scores_choose_one_key(dtype):
    """Scores from -1e9 to 1e9: the largest that a row sees takes all, and nothing overflows on the way."""
    length, head = 70, 32
    levels = torch.randperm(length, generator=torch.Generator().manual_seed(3)).to(DEVICE) - length // 2
    key = torch.zeros(1, length, 1, head, dtype=dtype, device=DEVICE)
    key[0, :, 0, 0] = levels * 2.0**10  # exact in bf16
    query = torch.zeros_like(key)
    query[..., 0] = 2.0**17
    value, gradient = (drawn(seed, 1, length, 1, head, dtype=dtype) for seed in range(2))
    output, logsumexp, of_query, of_key, of_value = by_triton(query, key, value, gradient)
    best = levels.cummax(0).indices
    torch.testing.assert_close(output[0], value[0, best], rtol=0, atol=0)
    torch.testing.assert_close(logsumexp[0, 0], levels[best] * 2.0**27 / head**0.5, rtol=1e-6, atol=0)
    chosen = torch.zeros_like(value, dtype=torch.float32)
    chosen[0].index_add_(0, best, gradient[0].float())
    torch.testing.assert_close(of_value, chosen.to(dtype), rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=0.02)
    assert of_query.isfinite().all() and of_key.isfinite().all()


@needs_triton
def test_a_single_key_is_taken_whole():
    query, key, value, gradient = inputs((2, 1, 1, 2, 1, 32))
    output, logsumexp, of_query, of_key, of_value = by_triton(query, key, value, gradient)
    assert_same([output], [value.expand_as(output)])
    torch.testing.assert_close(logsumexp[..., 0], (query * key).sum(-1).transpose(1, 2)[..., 0] / 32**0.5)
    torch.testing.assert_close(of_value, gradient.sum(2, keepdim=True))
    assert of_query.abs().max() < 1e-5 and of_key.abs().max() < 1e-5


@needs_triton
def test_two_runs_give_the_same_bits():
    tensors, documents = inputs((1, 132, 132, 2, 1, 32), torch.bfloat16), documents_with((100, 32), 1, 132)
    assert_same(by_triton(*tensors, documents), by_triton(*tensors, documents))


@needs_triton
def test_the_gradient_of_the_log_sum_exp():
    query, key, value, gradient = inputs((1, 33, 40, 2, 1, 32))
    of_logsumexp = drawn(9, 1, 2, 33)
    output, logsumexp = attention_forward_triton(query, key, value)
    results = attention_backward_triton(
        gradient, query, key, value, output, logsumexp, gradient_logsumexp_BNS=of_logsumexp
    )
    wide = [x.double() for x in (gradient, query, key, value)]
    kept = attention_forward_reference(*wide[1:])
    exact = attention_backward_reference(*wide, *kept, gradient_logsumexp_BNS=of_logsumexp.double())
    for result, right in zip(results, exact, strict=True):
        check(result, right, SUM_FP32)


@pytest.mark.parametrize(
    ("changed", "words"), [({"dtype": torch.float64}, "fp32, bf16 and fp16"), ({"head": 256}, "heads of up to 128")]
)
def test_what_the_kernels_do_not_compute_is_refused(changed, words):
    head, dtype = changed.get("head", 32), changed.get("dtype", torch.float32)
    query, key, value, _ = (x.to(dtype) for x in inputs((1, 4, 4, 1, 1, head)))
    with pytest.raises(ValueError, match=words):
        attention_forward_triton(query, key, value)


# The operation, on a CPU.


def operands(queries=5, keys=5, lengths=None, dtype=torch.float64):
    """Query, key and value in need of gradients, with starts and ends or two times None."""
    shapes = ((2, queries, 4, 3), (2, keys, 2, 3), (2, keys, 2, 3))
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    ends = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0)
    documents = None if ends is None else documents_of(ends, 2, queries)
    borders = (None, None) if documents is None else (documents.starts_BS, documents.ends_BS)
    return (*(x.requires_grad_() for x in tensors), *borders), documents


CASES = [{}, {"queries": 3}, {"lengths": (3, 0, 1, 4, 2)}]


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_formula(case):
    arguments, documents = operands(**case)
    output, logsumexp = operation.forward(*arguments)
    torch.testing.assert_close(output, attention_reference(*arguments[:3], documents), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(output, attention(*arguments[:3], documents=documents), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda *x: operation.forward(*x, *arguments[3:]), arguments[:3])
    assert output.is_contiguous() and logsumexp.shape == (2, 4, output.shape[1])


@pytest.mark.parametrize("case", CASES[1:])
def test_the_operations_keep_their_contract(case):
    arguments, _ = operands(**case, dtype=torch.float32)
    opcheck(operation.forward, arguments)
    detached = [x.detach() for x in arguments[:3]]
    output, logsumexp = operation.forward(*detached, *arguments[3:])
    opcheck(operation.backward, (output, *detached, output, logsumexp, *arguments[3:], logsumexp))


def test_keeps_inputs_output_and_log_sum_exp_alone():
    arguments, _ = operands()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x), lambda x: x):
        output, logsumexp = operation.forward(*arguments)
    expected = (*arguments[:3], output, logsumexp)
    assert sorted(x.data_ptr() for x in kept) == sorted(x.data_ptr() for x in expected)
