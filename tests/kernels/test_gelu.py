"""GELU, exact and approximate: both implementations against fp64, the kernel's bounds, the operation's contract."""

import math

import pytest
import torch
from oracle import (
    DEVICE,
    ELEMENTWISE_FP32,
    ONE_ROUNDING_BF16,
    check,
    drawn,
    framed,
    needs_triton,
    opcheck,
    poisoned_empty,
)

from megalrps.kernels import gelu as module
from megalrps.kernels.gelu import gelu, gelu_backward_reference, gelu_backward_triton, gelu_reference, gelu_triton

SHAPES = [(1,), (7, 127), (2, 3, 896), (2049,)]
BOUNDS = {torch.float32: ELEMENTWISE_FP32, torch.bfloat16: ONE_ROUNDING_BF16, torch.float16: ONE_ROUNDING_BF16 / 8}
FORMS = pytest.mark.parametrize("approximate", [False, True], ids=["exact", "tanh"])


@needs_triton
@FORMS
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_equal_fp64(shape, dtype, approximate, monkeypatch):
    x, gradient = (drawn(seed, *shape, dtype=dtype, scale=2.0) for seed in range(2))
    poisoned_empty(monkeypatch)
    exact = gelu_reference(x.double(), approximate)
    check(gelu_triton(x, approximate), exact, BOUNDS[dtype], gelu_reference(x, approximate))
    exact = gelu_backward_reference(gradient.double(), x.double(), approximate)
    check(gelu_backward_triton(gradient, x, approximate), exact, BOUNDS[dtype])


@needs_triton
@FORMS
def test_kernels_leave_what_lies_around_alone(approximate):
    x, untouched = framed(drawn(0, 5, 37))
    results = gelu_triton(x, approximate), gelu_backward_triton(x, x, approximate)
    untouched()
    assert not any(result.isnan().any() for result in results)


@needs_triton
@FORMS
def test_kernels_take_slices_and_extremes(approximate):
    x = drawn(0, 6, 64)
    check(gelu_triton(x[:, ::2], approximate), gelu_reference(x[:, ::2].double(), approximate), ELEMENTWISE_FP32)
    huge = torch.tensor([-1e4, 1e4, 0.0], device=DEVICE)
    assert gelu_triton(huge, approximate).tolist() == [0.0, 1e4, 0.0]
    assert gelu_backward_triton(torch.ones_like(huge), huge, approximate).tolist() == [0.0, 1.0, 0.5]


def test_is_the_formula():
    values = [-2.5, -0.5, 0.0, 1.0, 3.0]
    x = torch.tensor(values, dtype=torch.float64, device=DEVICE)
    exact = [value / 2 * math.erfc(-value / math.sqrt(2)) for value in values]
    close = [value / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3))) for value in values]
    assert gelu_reference(x).tolist() == pytest.approx(exact, rel=1e-13)
    assert gelu_reference(x, True).tolist() == pytest.approx(close, rel=1e-13)


@FORMS
def test_gradients_are_those_of_the_formula(approximate):
    x = drawn(0, 4, 6).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: gelu(x, approximate), (x,))
    assert torch.equal(gelu(x, approximate), gelu_reference(x, approximate))


def test_the_operations_keep_their_contract():
    x, gradient = drawn(0, 6, 4).T, drawn(1, 4, 6)
    opcheck(module._forward, (x.requires_grad_(), True))
    opcheck(module._backward, (gradient, x.detach(), False))


def test_keeps_its_input_and_nothing_else():
    x, kept = drawn(0, 4, 6).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each.data_ptr()), lambda each: each):
        gelu(x)
    assert kept == [x.data_ptr()]
