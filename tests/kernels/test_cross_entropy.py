"""Token losses against the formula and against torch's own, over row counts around the block size."""

import math

import pytest
import torch

from megalrps.kernels.cross_entropy import _BLOCK_ELEMENTS, cross_entropy, cross_entropy_reference

torch.set_num_threads(1)


def logits_and_labels(tokens, vocabulary, dtype=torch.float64):
    generator = torch.Generator().manual_seed(tokens + vocabulary)
    logits = 3 * torch.randn(tokens, vocabulary, dtype=torch.float64, generator=generator)
    return logits.to(dtype).requires_grad_(), torch.randint(vocabulary, (tokens,), generator=generator)


BLOCK_ROWS = _BLOCK_ELEMENTS // 65536
SHAPES = [(1, 1), (1, 2), (5, 7), (BLOCK_ROWS - 1, 65536), (2 * BLOCK_ROWS + 1, 65536)]


@pytest.mark.parametrize(("tokens", "vocabulary"), SHAPES)
@pytest.mark.parametrize("overwrite", [False, True])
def test_losses_and_gradient_equal_torchs_own(tokens, vocabulary, overwrite):
    logits, labels = logits_and_labels(tokens, vocabulary)
    weights = torch.rand(tokens, dtype=torch.float64)
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), logits)
    losses = cross_entropy(logits, labels, overwrite_logits=overwrite)
    torch.testing.assert_close(losses, expected, rtol=1e-13, atol=1e-13)
    (gradient,) = torch.autograd.grad((losses * weights).sum(), logits)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-14)


def test_gradcheck():
    logits, labels = logits_and_labels(4, 9)
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, labels), logits)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 2.5e-3)])
def test_losses_are_fp32_and_the_gradient_is_rounded_once(dtype, bound):
    logits, labels = logits_and_labels(64, 1000, dtype)
    losses = cross_entropy(logits, labels)
    assert losses.dtype == torch.float32
    exact = logits.detach().double().requires_grad_()
    exact_losses = cross_entropy_reference(exact, labels)
    assert ((losses - exact_losses).norm() / exact_losses.norm()).item() < 1e-6  # bf16 logits are exact in fp32
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    (exact_gradient,) = torch.autograd.grad(exact_losses.sum(), exact)
    assert gradient.dtype == dtype
    assert ((gradient - exact_gradient).norm() / exact_gradient.norm()).item() < bound


def test_large_logits_do_not_overflow():
    logits = torch.tensor([[1e4, 0.0, -1e4], [-100.0, -100.0, -100.0]])
    losses = cross_entropy(logits, torch.tensor([1, 0]))
    torch.testing.assert_close(losses, torch.tensor([1e4, math.log(3)]), rtol=0, atol=1e-5)


def test_overwriting_uses_the_logits_storage_and_refuses_a_second_backward():
    logits, labels = logits_and_labels(6, 11)
    shared = logits * 1
    total = cross_entropy(shared, labels, overwrite_logits=True).sum()
    total.backward(retain_graph=True)
    torch.testing.assert_close(shared.detach(), logits.grad)
    with pytest.raises(RuntimeError, match="inplace"):
        total.backward()
