"""RMSNorm, alone and of a sum: both implementations against fp64, the kernels' bounds, the operations' contract."""

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

from megalrps.kernels import rms_norm as module
from megalrps.kernels.rms_norm import (
    add_rms_norm,
    add_rms_norm_backward_triton,
    add_rms_norm_triton,
    rms_norm,
    rms_norm_backward_reference,
    rms_norm_backward_triton,
    rms_norm_reference,
    rms_norm_triton,
    row_tile,
)

# One row, several tiles a program (of 16 rows at 128), a number of columns that no block has, several blocks of warps.
SHAPES = [(1, 1), (3, 7), (2, 3, 127), (133, 128), (2, 5, 896), (1, 2560), (5, 5504), (4, 8192)]
BOUNDS = {torch.float32: ELEMENTWISE_FP32, torch.bfloat16: ONE_ROUNDING_BF16, torch.float16: ONE_ROUNDING_BF16 / 8}
STREAMS = [  # of the addend, of the residual and the sum, of the normed sum
    (torch.bfloat16, torch.float32, torch.bfloat16),
    (torch.float32, torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
]


def epsilon_of(shape):
    """A single number normed has a gradient by virtue of epsilon alone: there it is one that rounding leaves alone."""
    return 100.0 if shape[-1] == 1 else 1e-5


@needs_triton
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_equal_fp64(shape, dtype, monkeypatch):
    x, gradient = (drawn(seed, *shape, dtype=dtype, scale=3.0) for seed in range(2))
    weight, epsilon = drawn(2, shape[-1]), epsilon_of(shape)
    exact, exact_root = rms_norm_reference(x.double(), weight.double(), epsilon)
    poisoned_empty(monkeypatch)
    normed, root = rms_norm_triton(x, weight, epsilon)
    check(normed, exact, BOUNDS[dtype], rms_norm_reference(x, weight, epsilon)[0])
    check(root, exact_root, ELEMENTWISE_FP32)
    of_x, of_weight = rms_norm_backward_triton(gradient, x, weight, root)
    exact_of_x, exact_of_weight = rms_norm_backward_reference(
        gradient.double(), x.double(), weight.double(), exact_root
    )
    check(of_x, exact_of_x, BOUNDS[dtype])
    check(of_weight, exact_of_weight, SUM_FP32)
    assert (normed.dtype, of_x.dtype, of_weight.dtype) == (dtype, dtype, torch.float32)


@needs_triton
@pytest.mark.parametrize(("addend_type", "stream_type", "normed_type"), STREAMS)
@pytest.mark.parametrize("shape", [(1, 7), (2, 67, 128), (3, 2560)])
def test_kernels_of_a_sum_equal_fp64(shape, addend_type, stream_type, normed_type, monkeypatch):
    x, residual, weight = drawn(0, *shape, dtype=addend_type), drawn(1, *shape, dtype=stream_type), drawn(2, shape[-1])
    of_sum, of_normed = drawn(3, *shape, dtype=stream_type), drawn(4, *shape, dtype=normed_type)
    poisoned_empty(monkeypatch)
    total, normed, root = add_rms_norm_triton(x, residual, weight, 1e-5, normed_type)
    assert torch.equal(total, (residual.float() + x.float()).to(stream_type))  # rounded once
    exact, exact_root = rms_norm_reference(total.double(), weight.double(), 1e-5)
    check(normed, exact, BOUNDS[normed_type])
    assert torch.equal(normed, rms_norm_triton(total, weight, 1e-5, normed_type)[0])  # normed as rounded
    of_residual, of_x, of_weight = add_rms_norm_backward_triton(of_normed, of_sum, total, weight, root, addend_type)
    exact_of_sum, exact_of_weight = rms_norm_backward_reference(
        of_normed.double(), total.double(), weight.double(), exact_root, of_sum.double()
    )
    check(of_residual, exact_of_sum, BOUNDS[stream_type])
    check(of_weight, exact_of_weight, SUM_FP32)
    if addend_type == stream_type:
        assert of_x.numel() == 0  # the residual's serves
    else:
        assert torch.equal(of_x, of_residual.to(addend_type))


@needs_triton
def test_kernels_leave_what_lies_around_alone():
    x, untouched = framed(drawn(0, 5, 37))
    weight, weight_untouched = framed(drawn(1, 37))
    normed, root = rms_norm_triton(x, weight, 1e-5)
    results = [normed, *rms_norm_backward_triton(x, x, weight, root)]
    results += add_rms_norm_triton(x, x, weight, 1e-5)
    results += add_rms_norm_backward_triton(x, x, x, weight, root, torch.bfloat16)
    untouched()
    weight_untouched()
    assert not any(result.isnan().any() for result in results)


@needs_triton
def test_kernels_take_views_and_no_rows():
    wide, weight = drawn(0, 6, 4, 64), drawn(1, 32)
    x = wide.transpose(0, 1)[..., ::2]
    exact, root = rms_norm_reference(x.double(), weight.double(), 1e-5)
    check(rms_norm_triton(x, weight, 1e-5)[0], exact, ELEMENTWISE_FP32)
    of_x, _ = rms_norm_backward_triton(x, x, weight, root.float())
    check(of_x, rms_norm_backward_reference(x.double(), x.double(), weight.double(), root)[0], ELEMENTWISE_FP32)
    normed, root = rms_norm_triton(x[:0], weight, 1e-5)
    of_x, of_weight = rms_norm_backward_triton(normed, x[:0], weight, root)
    assert normed.shape == of_x.shape == (0, 6, 32)
    assert of_weight.tolist() == [0.0] * 32


@needs_triton
def test_the_weights_gradient_is_the_same_on_each_run():
    x, gradient, weight = drawn(0, 300, 128), drawn(1, 300, 128), drawn(2, 128)
    _, root = rms_norm_triton(x, weight, 1e-5)
    runs = [rms_norm_backward_triton(gradient, x, weight, root)[1] for _ in range(3)]
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


def test_a_thread_holds_sixteen_numbers_and_a_row_is_whole():
    for hidden in (1, 7, 128, 192, 896, 2048, 2560, 5504, 8192):
        tile = row_tile(hidden)
        assert tile.columns >= hidden
        assert tile.rows * tile.columns == 16 * 32 * tile.num_warps


@pytest.mark.parametrize("hidden", [1, 7, 128])
def test_equals_torchs_own(hidden):
    x, weight = (drawn(0, *shape).double() for shape in ((3, 5, hidden), (hidden,)))
    expected = torch.nn.functional.rms_norm(x, (hidden,), weight, 1e-5)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", BOUNDS)
def test_is_rounded_once(dtype):
    x, weight = drawn(0, 16, 257, dtype=dtype), drawn(1, 257, dtype=dtype)
    normed = rms_norm(x, weight, 1e-5)
    assert normed.dtype == dtype
    check(normed, rms_norm(x.double(), weight.double(), 1e-5), BOUNDS[dtype])
    wide = rms_norm(x, weight, 1e-5, torch.float32)  # not rounded to x's type on the way
    check(wide, rms_norm(x.double(), weight.double(), 1e-5), ELEMENTWISE_FP32)


def test_statistics_do_not_overflow_in_half_precision():
    x = torch.full((1, 64), 1000.0, dtype=torch.float16, device=DEVICE)  # 1000^2 is infinite in fp16
    torch.testing.assert_close(rms_norm(x, torch.ones_like(x[0]), 1e-5), torch.ones_like(x))


@pytest.mark.parametrize(("addend_type", "stream_type", "normed_type"), STREAMS)
def test_a_sum_is_normed_as_it_was_rounded(addend_type, stream_type, normed_type):
    x, residual = drawn(0, 4, 48, dtype=addend_type), drawn(1, 4, 48, dtype=stream_type)
    x, residual, weight = (each.requires_grad_() for each in (x, residual, drawn(2, 48)))
    total, normed = add_rms_norm(x, residual, weight, 1e-5, normed_type)
    assert torch.equal(total, residual + x)
    assert torch.equal(normed, rms_norm(total, weight, 1e-5, normed_type))
    (total.sum() + normed.sum()).backward()
    assert (x.grad.dtype, residual.grad.dtype) == (addend_type, stream_type)
    assert torch.equal(x.grad, residual.grad.to(addend_type))


def test_gradients_are_those_of_the_formula():
    x, residual, weight = (drawn(seed, 3, 6).double().requires_grad_() for seed in range(3))
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight[0], 1e-5), (x, weight))
    assert torch.autograd.gradcheck(lambda x, y, weight: add_rms_norm(x, y, weight[0], 1e-5), (x, residual, weight))
    # A result that is not used has no gradient: the other's alone must be right.
    for index in range(2):
        assert torch.autograd.gradcheck(
            lambda x, y, weight, index=index: add_rms_norm(x, y, weight[0], 1e-5)[index], (x, residual, weight)
        )


@pytest.mark.parametrize("shape", [(1,), (6,), (3, 4, 6), (0, 6)])
def test_backward_reference_equals_autograd(shape):
    x, weight = drawn(0, *shape).double().requires_grad_(), drawn(1, shape[-1]).double().requires_grad_()
    gradient, of_sum = drawn(2, *shape).double(), drawn(3, *shape).double()
    normed, root = rms_norm_reference(x, weight, 0.1)
    expected = torch.autograd.grad((normed, x), (x, weight), (gradient, of_sum), allow_unused=True)
    result = rms_norm_backward_reference(gradient, x.detach(), weight.detach(), root.detach(), of_sum)
    for each, of_autograd in zip(result, expected, strict=True):
        torch.testing.assert_close(each, of_autograd, rtol=1e-12, atol=1e-12)


def test_the_operations_keep_their_contract():
    x, residual = drawn(0, 5, 6, dtype=torch.bfloat16), drawn(1, 6, 5).T  # one of the inputs is a transposed view
    weight, root = drawn(2, 6).requires_grad_(), drawn(3, 5).abs()
    opcheck(module._forward, (residual.requires_grad_(), weight, 1e-5, torch.bfloat16))
    opcheck(module._add_forward, (x.requires_grad_(), residual, weight, 1e-5, None))
    x, residual, weight = x.detach(), residual.detach(), weight.detach()
    opcheck(module._backward, (x, residual, weight, root))
    opcheck(module._add_backward, (x, residual, residual, weight, root, torch.bfloat16))
    opcheck(module._add_backward, (residual, residual, residual, weight, root, torch.float32))


def test_keeps_its_rows_the_weight_and_one_number_a_row():
    x, residual = drawn(0, 3, 4, 6, dtype=torch.bfloat16).requires_grad_(), drawn(1, 3, 4, 6).requires_grad_()
    weight, kept = drawn(2, 6).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each) or each, lambda each: each):
        rms_norm(residual, weight, 1e-5, torch.bfloat16)
        total, _ = add_rms_norm(x, residual, weight, 1e-5, torch.bfloat16)
    assert [each.data_ptr() for each in kept[:2]] == [residual.data_ptr(), weight.data_ptr()]
    assert [each.data_ptr() for each in kept[3:5]] == [total.data_ptr(), weight.data_ptr()]
    assert [each.shape for each in (kept[2], *kept[5:])] == [(3, 4), (3, 4)]
