"""The weight gradient added to an accumulator of its own type or a wider one, against sums in fp64."""

import pytest
import torch

from megalrps.kernels.weight_gradient import accumulate_, accumulate_reference_

SHAPES = [(1, 1, 1), (1, 3, 5), (7, 1, 4), (33, 17, 9), (256, 64, 48)]


def operands(tokens: int, outputs: int, inputs: int, main: torch.dtype, narrow: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    drawn = [
        torch.randn(shape, generator=generator) for shape in ((outputs, inputs), (tokens, outputs), (tokens, inputs))
    ]
    return [x.to(dtype) for x, dtype in zip(drawn, (main, narrow, narrow), strict=True)]


@pytest.mark.parametrize(
    ("main", "narrow"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
    ],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_sum_in_fp64(shape, main, narrow):
    """To the rounding of T + 1 sums in the accumulator's type, and of the product to the operands' where narrower."""
    total, gradient, given = operands(*shape, main, narrow)
    before, expected, sizes = total.double(), total.double(), total.double().abs()
    accumulate_reference_(expected, gradient, given)
    accumulate_reference_(sizes, gradient.abs(), given.abs())
    pointer = total.data_ptr()
    accumulate_(total, gradient, given)
    assert total.data_ptr() == pointer
    bound = (shape[0] + 1) * torch.finfo(main).eps * sizes
    if narrow != main:
        bound += torch.finfo(narrow).eps / 2 * (expected - before).abs()
    assert torch.all((total.double() - expected).abs() <= bound)


def test_many_small_micro_batches_are_not_lost_in_a_wide_sum():
    """In bf16 the sum would stand still at 256."""
    total = torch.zeros(1, 1)
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    for _ in range(1000):
        accumulate_(total, one, one)
    assert total.item() == 1000


def test_adds_to_a_view_of_a_flat_buffer_and_to_nothing_else():
    flat = torch.zeros(20)
    accumulate_(flat[4:16].view(3, 4), torch.ones(2, 3), torch.ones(2, 4))
    assert flat.tolist() == [0.0] * 4 + [2.0] * 12 + [0.0] * 4


def test_takes_rows_that_are_not_contiguous():
    total, gradient, given = operands(8, 6, 4, torch.float64, torch.float64)
    expected = total.clone()
    accumulate_reference_(expected, gradient, given)
    accumulate_(total, gradient.T.contiguous().T, given.repeat(1, 2)[:, :4])
    torch.testing.assert_close(total, expected, rtol=1e-14, atol=1e-14)


def test_a_product_that_adds_in_fp32_exists_with_the_arguments_that_it_is_given_and_on_a_cpu_does_not():
    """What a CUDA device is asked for: the type of an operation, without one. A CPU refuses it: the device decides."""
    total, gradient, given = operands(4, 3, 5, torch.float32, torch.bfloat16)
    names = [argument.name for argument in torch.ops.aten.addmm.dtype_out._schema.arguments]
    assert names == ["self", "mat1", "mat2", "out_dtype", "beta", "alpha", "out"]
    meta = [x.to("meta") for x in (total, gradient, given)]
    result = torch.addmm(meta[0], meta[1].T, meta[2], out_dtype=torch.float32, out=meta[0])
    assert result is meta[0] and result.dtype == torch.float32
    with pytest.raises(NotImplementedError):
        torch.addmm(total, gradient.T, given, out_dtype=torch.float32, out=total)


@pytest.mark.gpu
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_a_cuda_device_does_not_round_the_product(narrow):
    total, gradient, given = (x.cuda() for x in operands(4096, 64, 48, torch.float32, narrow))
    expected = total.double()
    accumulate_reference_(expected, gradient, given)
    accumulate_(total, gradient, given)
    assert (total.double() - expected).abs().max() <= 1e-5 * expected.abs().max()
