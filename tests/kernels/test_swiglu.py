"""SwiGLU and its gradients: both implementations against fp64, the kernel's bounds, and the operation's contract."""

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

from megalrps.kernels import swiglu as module
from megalrps.kernels.swiglu import (
    swiglu,
    swiglu_backward_reference,
    swiglu_backward_triton,
    swiglu_reference,
    swiglu_triton,
)

SHAPES = [(1,), (3, 5), (7, 688), (2, 3, 4096), (2049,)]
BOUNDS = {torch.float32: ELEMENTWISE_FP32, torch.bfloat16: ONE_ROUNDING_BF16}


@needs_triton
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_equal_fp64(shape, dtype, monkeypatch):
    gate, up, gradient = (drawn(seed, *shape, dtype=dtype, scale=3.0) for seed in range(3))
    poisoned_empty(monkeypatch)
    wide = [x.double() for x in (gradient, gate, up)]
    check(swiglu_triton(gate, up), swiglu_reference(*wide[1:]), BOUNDS[dtype], swiglu_reference(gate, up))
    for result, exact in zip(swiglu_backward_triton(gradient, gate, up), swiglu_backward_reference(*wide), strict=True):
        check(result, exact, BOUNDS[dtype])


@needs_triton
def test_kernels_leave_what_lies_around_alone():
    gate, untouched = framed(drawn(0, 5, 37))
    swiglu_triton(gate, gate)
    of_gate, of_up = swiglu_backward_triton(gate, gate, gate)
    untouched()
    assert not of_gate.isnan().any() and not of_up.isnan().any()


@needs_triton
def test_kernels_take_slices_and_extremes():
    x = drawn(0, 6, 64)
    check(swiglu_triton(x[:, ::2], x[:, 1::2]), swiglu_reference(x[:, ::2].double(), x[:, 1::2].double()), 1e-6)
    huge = torch.tensor([-1e4, 1e4, 0.0], device=DEVICE)
    assert swiglu_triton(huge, torch.ones_like(huge)).tolist() == [0.0, 1e4, 0.0]


def test_gradients_are_those_of_the_formula():
    gate, up = (drawn(seed, 4, 6).double().requires_grad_() for seed in range(2))
    assert torch.autograd.gradcheck(swiglu, (gate, up))
    output = swiglu(gate, up)
    torch.testing.assert_close(output, swiglu_reference(gate, up), rtol=0, atol=0)


def test_is_the_formula():
    gate, up = (drawn(seed, 4, 9).double() for seed in range(2))
    torch.testing.assert_close(swiglu(gate, up), gate / (1 + (-gate).exp()) * up, rtol=1e-14, atol=1e-14)


def test_backward_reference_equals_autograd():
    gate, up, gradient = (drawn(seed, 5, 7).double() for seed in range(3))
    inputs = gate.clone().requires_grad_(), up.clone().requires_grad_()
    expected = torch.autograd.grad(swiglu_reference(*inputs), inputs, gradient)
    given = gradient.clone()
    for result, of_autograd in zip(swiglu_backward_reference(given, gate, up), expected, strict=True):
        torch.testing.assert_close(result, of_autograd, rtol=1e-12, atol=1e-12)
    assert torch.equal(given, gradient)


def test_the_operations_keep_their_contract():
    gate, up = (drawn(seed, 4, 6).requires_grad_() for seed in range(2))
    opcheck(module._forward, (gate, up))
    opcheck(module._backward, (gate.detach(), gate.detach(), up.detach()))
    opcheck(module._forward, (gate.detach().T, up.detach().T))


def test_keeps_its_two_inputs_and_nothing_else():
    gate, up = (drawn(seed, 4, 6).requires_grad_() for seed in range(2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()), lambda x: x):
        swiglu(gate, up)
    assert sorted(kept) == sorted((gate.data_ptr(), up.data_ptr()))
