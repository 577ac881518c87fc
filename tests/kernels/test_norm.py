"""The sum of squares: each implementation against exact sums, what is no number, and one order of additions."""

import math

import pytest
import torch
from oracle import DEVICE, SUM_FP32, check, drawn, framed, needs_triton, opcheck, poisoned_empty

from megalrps.kernels import norm as module
from megalrps.kernels.native import cpu_missing
from megalrps.kernels.norm import chosen_norm, sum_of_squares, sum_of_squares_reference, sum_of_squares_triton

LENGTHS = [1, 1023, 1024, 4097, 40_001]
IMPLEMENTATIONS = [
    pytest.param(sum_of_squares, id="operation"),
    pytest.param(sum_of_squares_reference, id="reference"),
    pytest.param(sum_of_squares_triton, id="triton", marks=needs_triton),
]


def exact(x: torch.Tensor) -> torch.Tensor:
    return torch.tensor(math.fsum(value * value for value in x.double().flatten().tolist()), dtype=torch.float64)


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", LENGTHS)
def test_the_sum_is_that_of_the_squares(function, dtype, length, monkeypatch):
    x = drawn(length, length, dtype=dtype)
    poisoned_empty(monkeypatch)
    total = function(x)
    assert total.dtype == torch.float32 and total.shape == () and total.device == x.device
    check(total.cpu(), exact(x), SUM_FP32)


@pytest.mark.parametrize("length", LENGTHS)
def test_fp64_is_added_up_in_fp64(length):
    x = drawn(length, length).double() * 1e30  # a square that fp32 does not hold
    total = sum_of_squares(x)
    assert total.dtype == torch.float64
    assert abs(total.item() / exact(x).item() - 1) < 1e-14


@needs_triton
@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_a_program_goes_round_where_there_are_more_blocks_than_partial_sums(rounds, monkeypatch):
    monkeypatch.setattr(module, "_MOST_PARTIALS", 4)
    x, untouched = framed(drawn(rounds, 4 * rounds * module._BLOCK - 33))
    check(sum_of_squares_triton(x).cpu(), exact(x), SUM_FP32 / 10)
    untouched()


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
def test_the_same_numbers_give_the_same_bits(function):
    x = drawn(0, 3 * 4096 + 17)
    elsewhere = torch.cat((x.new_full((5,), torch.nan), x))[5:]
    totals = {function(each.contiguous()).item() for each in (x, x.clone(), x, elsewhere.clone())}
    assert len(totals) == 1


@pytest.mark.filterwarnings("ignore:overflow encountered")  # the interpreter's numpy says so
@pytest.mark.parametrize("function", IMPLEMENTATIONS)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e30])
@pytest.mark.parametrize("place", [0, 4999, 9000])
def test_what_is_no_number_stays_none(function, value, place):
    x = torch.ones(9001, device=DEVICE)
    x[place] = value
    total = function(x).item()
    assert math.isnan(total) if math.isnan(value) else total == math.inf


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
def test_of_no_elements_it_is_zero(function):
    assert function(torch.zeros(0, device=DEVICE)).item() == 0


def test_shapes_and_zeros_do_not_count():
    x = drawn(0, 6, 35)
    assert sum_of_squares(x) == sum_of_squares(x.flatten())
    assert sum_of_squares(torch.cat((x.flatten(), x.new_zeros(300)))) == pytest.approx(exact(x).item(), rel=1e-6)


@pytest.mark.parametrize("wrong", [torch.ones(4, dtype=torch.int64), torch.ones(4, 4).t()[::2]], ids=["int", "slice"])
def test_other_tensors_are_refused(wrong):
    with pytest.raises(ValueError, match="contiguous floating-point"):
        sum_of_squares(wrong)


def test_without_the_extension_torch_adds_up(monkeypatch):
    x = drawn(0, 5001).cpu()
    before = sum_of_squares(x).item()
    monkeypatch.setattr(module, "cpu_missing", lambda: "not built")
    assert torch.equal(sum_of_squares(x), sum_of_squares_reference(x))
    assert sum_of_squares(x).item() == pytest.approx(before, rel=1e-6)
    assert chosen_norm("cpu") == ("reference", "not built")


def test_what_is_chosen_is_said():
    assert chosen_norm("cpu")[0] == ("native" if cpu_missing() is None else "reference")
    assert chosen_norm("mps") == ("reference", "there is no kernel for mps")


@needs_triton
def test_a_gpu_is_given_the_kernels_and_fp64_torch(monkeypatch):
    seen = []
    monkeypatch.setattr(module, "sum_of_squares_triton", lambda x: seen.append(x.dtype) or x.sum())
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        module._sum_on_gpu(torch.ones(3, dtype=dtype))
    assert seen == [torch.float32, torch.bfloat16] and chosen_norm("cuda")[0] == "triton"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_operation_keeps_its_contract(dtype):
    opcheck(module._sum_of_squares, (drawn(0, 70, dtype=dtype),))
