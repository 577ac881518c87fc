"""LayerNorm with a bias or without: both implementations against fp64, the kernels' bounds, the contract."""

import pytest
import torch
from oracle import (
    ELEMENTWISE_FP32,
    ONE_ROUNDING_BF16,
    SUM_FP32,
    check,
    drawn,
    framed,
    needs_triton,
    opcheck,
    poisoned_empty,
)

from megalrps.kernels import layer_norm as module
from megalrps.kernels.layer_norm import (
    layer_norm,
    layer_norm_backward_reference,
    layer_norm_backward_triton,
    layer_norm_reference,
    layer_norm_triton,
)

# One row, several tiles a program (of 16 rows at 128), a number of columns that no block has, several blocks of warps.
SHAPES = [(3, 7), (2, 3, 127), (133, 128), (2, 5, 896), (1, 2560), (5, 5504)]
BOUNDS = {torch.float32: ELEMENTWISE_FP32, torch.bfloat16: ONE_ROUNDING_BF16, torch.float16: ONE_ROUNDING_BF16 / 8}


def by_hand(x, weight, bias, epsilon):
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight
    return normed if bias is None else normed + bias


@needs_triton
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_equal_fp64(shape, dtype, monkeypatch):
    x, gradient = (drawn(seed, *shape, dtype=dtype, scale=3.0) + 1 for seed in range(2))
    weight, bias = drawn(2, shape[-1]), drawn(3, shape[-1])
    exact, *exact_statistics = layer_norm_reference(x.double(), weight.double(), bias.double(), 1e-5)
    poisoned_empty(monkeypatch)
    normed, mean, root = layer_norm_triton(x, weight, bias, 1e-5)
    check(normed, exact, BOUNDS[dtype], layer_norm_reference(x, weight, bias, 1e-5)[0])
    check(mean, exact_statistics[0], ELEMENTWISE_FP32)
    check(root, exact_statistics[1], ELEMENTWISE_FP32)
    results = layer_norm_backward_triton(gradient, x, weight, mean, root)
    exact = layer_norm_backward_reference(gradient.double(), x.double(), weight.double(), *exact_statistics)
    for result, of_exact, bound in zip(results, exact, (BOUNDS[dtype], SUM_FP32, SUM_FP32), strict=True):
        check(result, of_exact, bound)
    assert [each.dtype for each in (normed, *results)] == [dtype, dtype, torch.float32, torch.float32]


@needs_triton
def test_kernels_without_a_bias_leave_what_lies_around_alone():
    x, untouched = framed(drawn(0, 5, 37))
    weight, weight_untouched = framed(drawn(1, 37))
    normed, mean, root = layer_norm_triton(x, weight, None, 1e-5, torch.bfloat16)
    results = layer_norm_backward_triton(x, x, weight, mean, root)
    untouched()
    weight_untouched()
    assert not any(result.isnan().any() for result in results)
    check(normed, by_hand(x.double(), weight.double(), None, 1e-5), ONE_ROUNDING_BF16)


@needs_triton
def test_kernels_take_views_and_rows_far_from_zero():
    wide, weight = drawn(0, 6, 4, 64), drawn(1, 32)
    x = wide.transpose(0, 1)[..., ::2] + 64.0  # the variance of squares less the square of means would lose 12 bits
    exact, *statistics = layer_norm_reference(x.double(), weight.double(), None, 1e-5)
    normed, mean, root = layer_norm_triton(x, weight, None, 1e-5)
    check(normed, exact, SUM_FP32)
    gradient = wide.transpose(0, 1)[..., 1::2]
    results = layer_norm_backward_triton(gradient, x, weight, mean, root)
    exact = layer_norm_backward_reference(gradient.double(), x.double(), weight.double(), *statistics)
    for result, of_exact in zip(results, exact, strict=True):
        check(result, of_exact, SUM_FP32)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("hidden", [1, 7, 128])
def test_is_the_formula(hidden, with_bias):
    x, weight, bias = (
        drawn(seed, *shape).double() for seed, shape in enumerate(((3, 5, hidden), (hidden,), (hidden,)))
    )
    expected = by_hand(x, weight, bias if with_bias else None, 1e-5)
    normed = layer_norm(x, weight, bias if with_bias else None, 1e-5)
    torch.testing.assert_close(normed, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", BOUNDS)
def test_is_rounded_once(dtype):
    x, weight, bias = drawn(0, 16, 257, dtype=dtype), drawn(1, 257, dtype=dtype), drawn(2, 257)
    normed = layer_norm(x, weight, bias, 1e-5)
    exact = layer_norm(x.double(), weight.double(), bias.double(), 1e-5)
    assert normed.dtype == dtype
    check(normed, exact, BOUNDS[dtype])
    check(layer_norm(x, weight, bias, 1e-5, torch.float32), exact, ELEMENTWISE_FP32)


def test_gradients_are_those_of_the_formula():
    x, weight, bias = (drawn(seed, 3, 6).double().requires_grad_() for seed in range(3))
    assert torch.autograd.gradcheck(lambda x, w, b: layer_norm(x, w[0], b[0], 1e-5), (x, weight, bias))
    assert torch.autograd.gradcheck(lambda x, w: layer_norm(x, w[0], None, 1e-5), (x, weight))
    narrow = [drawn(4, *shape, dtype=torch.bfloat16).requires_grad_() for shape in ((3, 6), (6,), (6,))]
    layer_norm(*narrow, 1e-5).sum().backward()
    assert [each.grad.dtype for each in narrow] == [torch.bfloat16] * 3


def test_the_operations_keep_their_contract():
    x, weight, bias = drawn(0, 6, 5).T, drawn(1, 6).requires_grad_(), drawn(2, 6).requires_grad_()
    opcheck(module._forward, (x.requires_grad_(), weight, bias, 1e-5, torch.bfloat16))
    x, weight = x.detach(), weight.detach()
    opcheck(module._backward, (x, x, weight, *layer_norm_reference(x, weight, None, 1e-5)[1:]))


def test_keeps_its_rows_the_weight_and_two_numbers_a_row():
    x, weight, bias = (drawn(seed, *shape).requires_grad_() for seed, shape in enumerate(((3, 4, 6), (6,), (6,))))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each) or each, lambda each: each):
        layer_norm(x, weight, bias, 1e-5)
    assert [each.data_ptr() for each in kept[:2]] == [x.data_ptr(), weight.data_ptr()]
    assert [each.shape for each in kept[2:]] == [(3, 4), (3, 4)]
