"""Token losses against the formula and against torch's own, over sizes around those of blocks; the kernels' bounds."""

import math

import pytest
import torch
from oracle import (
    DEVICE,
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

from megalrps.kernels import cross_entropy as module
from megalrps.kernels.cross_entropy import (
    _BLOCK_ELEMENTS,
    cross_entropy,
    cross_entropy_gradient,
    cross_entropy_gradient_,
    cross_entropy_reference,
    cross_entropy_statistics,
    gradient_triton,
    gradient_triton_,
    statistics_reference,
    statistics_triton,
)

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


@pytest.mark.parametrize(("dtype", "needs_gradient"), [(torch.bfloat16, True), (torch.float32, False)])
def test_logits_that_are_narrow_or_need_no_gradient_outlive_the_forward_pass(dtype, needs_gradient):
    logits, labels = logits_and_labels(6, 11, dtype)
    shared = logits * 1
    with torch.set_grad_enabled(needs_gradient):
        losses = cross_entropy(shared, labels, overwrite_logits=True)
    assert torch.equal(shared, logits)
    assert torch.equal(losses, cross_entropy(logits, labels))


@pytest.mark.parametrize("overwrite", [False, True])
def test_extreme_logits_have_the_gradient_of_the_formula(overwrite):
    """Logits of -inf, as of a padded vocabulary, have no share; neither have those far below the largest."""
    logits = torch.tensor([[1e4, 0.0, -1e4], [-100.0, -100.0, -math.inf], [-1e4, 88.0, 89.0]], requires_grad=True)
    labels, weights = torch.tensor([1, 0, 2]), torch.tensor([2.0, 3.0, -1.0])
    (expected,) = torch.autograd.grad((cross_entropy_reference(logits, labels) * weights).sum(), logits)
    cross_entropy(logits * 1, labels, overwrite_logits=overwrite).backward(weights)
    torch.testing.assert_close(logits.grad, expected)


@pytest.mark.parametrize("overwrite", [False, True])
def test_keeps_the_logits_and_one_number_a_row(overwrite):
    logits, labels = logits_and_labels(6, 11)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        cross_entropy(logits, labels, overwrite_logits=overwrite)
    assert [tuple(x.shape) for x in kept if x.is_floating_point()] == [(6, 11), (6,)]


def test_slices_of_the_vocabulary_put_together_are_the_whole():
    logits, labels = logits_and_labels(9, 12)
    logits, gradient = logits.detach(), torch.linspace(-1, 2, 9, dtype=torch.float64)
    whole, of_label = cross_entropy_statistics(logits, labels)
    found = [cross_entropy_statistics(logits[:, first : first + 4], labels - first) for first in (0, 4, 8)]
    torch.testing.assert_close(torch.stack([lse for lse, _ in found]).logsumexp(0), whole, rtol=1e-14, atol=0)
    assert torch.equal(torch.stack([label for _, label in found]).sum(0), of_label)
    expected = cross_entropy_gradient(logits, labels, whole, gradient)
    for first in (0, 4, 8):
        part = logits[:, first : first + 4]
        cross_entropy_gradient_(part, labels - first, whole, gradient)  # in the whole's memory
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)
    assert expected.sum(1).abs().max() < 1e-14  # probabilities add up to 1, the label's


# Of the gradient. A probability is as wrong as the difference of logit and log-sum-exp is in absolute terms, which is
# rounded at their size; in fp16 those below 6e-8 vanish, against which the loss is scaled.
BOUNDS = {torch.float32: SUM_FP32, torch.bfloat16: ONE_ROUNDING_BF16, torch.float16: 1e-3}
KERNEL_SHAPES = [(1, 1), (3, 5), (5, 2048), (3, 2049), (2, 4097), (3, 32000), (1, 152064)]


def of_slice(tokens: int, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels of which some are those of other slices, and the gradient of the losses."""
    labels = torch.tensor([vocabulary - 1, vocabulary // 2, 0, -1, vocabulary, -5, vocabulary + 7])
    return labels.repeat(tokens)[:tokens].to(DEVICE), drawn(7, tokens)


@needs_triton
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(("tokens", "vocabulary"), KERNEL_SHAPES)
def test_kernels_equal_fp64(tokens, vocabulary, dtype, monkeypatch):
    logits = drawn(0, tokens, vocabulary, dtype=dtype, scale=3.0)
    labels, gradient = of_slice(tokens, vocabulary)
    exact, exact_label = statistics_reference(logits.double(), labels)
    exact_gradient = cross_entropy_gradient(logits.double(), labels, exact, gradient.double())
    poisoned_empty(monkeypatch)
    logsumexp, of_label = statistics_triton(logits, labels)
    assert logsumexp.dtype == of_label.dtype == torch.float32
    check(logsumexp, exact, ELEMENTWISE_FP32)
    assert torch.equal(of_label.double(), exact_label)
    found = gradient_triton(logits, labels, exact.float(), gradient)
    check(found, exact_gradient, BOUNDS[dtype])
    gradient_triton_(logits, labels, exact.float(), gradient)
    assert torch.equal(logits, found)


@needs_triton
def test_kernels_leave_what_lies_around_alone():
    logits, untouched = framed(drawn(0, 3, 2051))
    labels, gradient = of_slice(3, 2051)
    logsumexp, _ = statistics_triton(logits, labels)
    found = gradient_triton(logits, labels, logsumexp, gradient)
    untouched()
    assert not logsumexp.isnan().any() and not found.isnan().any()
    gradient_triton_(logits, labels, logsumexp, gradient)
    untouched()
    assert torch.equal(logits, found)


@needs_triton
@pytest.mark.parametrize("columns", [slice(3, 33), slice(1, 60, 2)])
def test_kernels_take_columns_of_a_matrix(columns):
    whole = drawn(0, 4, 64)
    logits, before = whole[:, columns], whole.clone()
    labels, gradient = of_slice(4, logits.shape[1])
    expected = statistics_reference(logits, labels)
    for found, each in zip(statistics_triton(logits, labels), expected, strict=True):
        check(found, each, ELEMENTWISE_FP32)
    found = gradient_triton(logits, labels, expected[0], gradient)
    assert found.is_contiguous()
    gradient_triton_(logits, labels, expected[0], gradient)
    assert torch.equal(whole[:, columns], found)
    before[:, columns] = found
    assert torch.equal(whole, before), "written beside the columns"


@needs_triton
def test_offsets_beyond_31_bits():
    """Only the pages that three rows touch are there of the 4 GB between them."""
    stride, vocabulary = (1 << 30) + 64, 128
    logits = torch.empty(2 * stride + vocabulary, dtype=torch.bfloat16, device=DEVICE).as_strided(
        (3, vocabulary), (stride, 1)
    )
    logits.copy_(drawn(0, 3, vocabulary))
    labels, gradient = of_slice(3, vocabulary)
    near = logits.clone(memory_format=torch.contiguous_format)
    logsumexp, of_label = statistics_triton(logits, labels)
    for found, expected in zip((logsumexp, of_label), statistics_triton(near, labels), strict=True):
        assert torch.equal(found, expected)
    gradient_triton_(logits, labels, logsumexp, gradient)
    gradient_triton_(near, labels, logsumexp, gradient)
    assert torch.equal(logits, near)


@needs_triton
@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
def test_kernels_take_extremes():
    """Logits of -inf, as of a padded vocabulary, have no share; a row with a NaN or infinity has no finite loss."""
    inf = math.inf
    logits = torch.full((5, 5000), -100.0, device=DEVICE)
    logits[0, [3, 4999]] = torch.tensor([1e4, -1e4], device=DEVICE)
    logits[1, 1:] = -inf
    logits[2, 4100], logits[3, 4200], logits[4, 17] = torch.nan, inf, torch.nan
    labels = torch.tensor([4999, 0, 0, 0, 0], device=DEVICE)
    logsumexp, of_label = statistics_triton(logits, labels)
    assert logsumexp[:2].tolist() == [1e4, -100.0] and of_label[:2].tolist() == [-1e4, -100.0]
    assert not logsumexp[2:].isfinite().any()
    gradient = gradient_triton(logits[:2], labels[:2], logsumexp[:2], torch.ones(2, device=DEVICE))
    expected = torch.zeros(2, 5000, device=DEVICE)
    expected[0, 3], expected[0, 4999] = 1.0, -1.0
    assert torch.equal(gradient, expected)


def test_the_operations_keep_their_contract():
    logits = drawn(0, 4, 6)
    labels, gradient = of_slice(4, 6)
    logsumexp, _ = statistics_reference(logits, labels)
    opcheck(module._statistics, (logits, labels))
    opcheck(module._gradient, (logits, labels, logsumexp, gradient))
    opcheck(module._gradient_, (logits, labels, logsumexp, gradient))
    opcheck(module._exponentials_, (logits.cpu(),))
