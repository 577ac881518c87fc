"""The kernels' tests on a CPU mean what they say: the interpreter rounds and multiplies bfloat16 as torch does.

Where Triton itself does so one day, the last two tests fail: then tests/triton_interpreter.py has no mend to make.
"""

import pytest
import torch
from oracle import needs_triton, relative_error
from triton_interpreter import AS_IT_COMES, ON_CPU

from megalrps.kernels.language import tl, triton

pytestmark = [
    needs_triton,
    pytest.mark.skipif(not ON_CPU, reason="on a GPU the kernels are compiled, not interpreted"),
]

SIDE = 32


@triton.jit
def cast_kernel(source_pointer, target_pointer, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target_pointer + at, tl.load(source_pointer + at).to(target_pointer.dtype.element_ty))


@triton.jit
def dot_kernel(left_pointer, right_pointer, product_pointer, SIDE: tl.constexpr):
    at = tl.arange(0, SIDE)[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
    product = tl.dot(tl.load(left_pointer + at), tl.load(right_pointer + at), tl.zeros((SIDE, SIDE), tl.float32))
    tl.store(product_pointer + at, product)


def cast(source: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    target = torch.empty_like(source, dtype=dtype)
    assert source.numel() % 4096 == 0
    cast_kernel[(source.numel() // 4096,)](source, target, BLOCK=4096)
    return target


def dot(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    product = torch.empty(SIDE, SIDE)
    dot_kernel[(1,)](left, right, product, SIDE=SIDE)
    return product


def every_kind_of_float() -> torch.Tensor:
    """All signs, exponents and kept bits, each with nothing below, just under a tie, a tie, just over, and all ones."""
    upper = torch.arange(1 << 16, dtype=torch.int64)[:, None] << 16
    lower = torch.tensor([0x0000, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bits = (upper | lower).flatten()
    return torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32).view(torch.float32)


def same_bits(narrow: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Where the bits are the same; of a NaN only that it is one: which one differs between processors."""
    return (narrow.view(torch.int16) == expected.view(torch.int16)) | (narrow.isnan() & expected.isnan())


def test_casts_to_bfloat16_are_torchs_bit_for_bit():
    wide = every_kind_of_float()
    assert wide.isnan().any() and wide.isinf().any() and (wide == 0).any()
    assert same_bits(cast(wide, torch.bfloat16), wide.bfloat16()).all()


def test_casts_from_bfloat16_are_exact():
    narrow = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    wide, expected = cast(narrow, torch.float32), narrow.float()
    assert (wide.view(torch.int32) == expected.view(torch.int32))[~expected.isnan()].all()  # below 2^-126 as well
    assert torch.equal(wide.isnan(), expected.isnan())


def operands() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, SIDE, SIDE, generator=generator).bfloat16()
    return left, right


def test_products_of_bfloat16_are_those_of_their_values():
    left, right = operands()
    # Products of two bfloat16 are exact in fp32: only the sums round.
    assert relative_error(dot(left, right), left.double() @ right.double()) < 1e-6


def test_products_keep_what_is_no_number_where_it_is():
    left, right = operands()
    left[3, 4], left[5, 6] = torch.nan, torch.inf
    product, expected = dot(left, right), left.float() @ right.float()
    assert torch.equal(product.isnan(), expected.isnan()) and torch.equal(product.isinf(), expected.isinf())


def test_the_interpreter_as_it_comes_cuts_off_where_a_gpu_rounds(monkeypatch):
    from triton.runtime import interpreter

    monkeypatch.setattr(interpreter, "_convert_float", AS_IT_COMES["_convert_float"])
    wide = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    narrow = cast(wide, torch.bfloat16)
    assert not same_bits(narrow, wide.bfloat16()).all(), "Triton rounds: _convert_float needs no mend any more"
    assert (narrow.float().abs() <= wide.abs()).all()


def test_the_interpreter_as_it_comes_multiplies_bits(monkeypatch):
    from triton.runtime import interpreter

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", AS_IT_COMES["create_dot"])
    left, right = operands()
    error = relative_error(dot(left, right), left.double() @ right.double())
    assert error > 1, "Triton multiplies numbers: create_dot needs no mend any more"
