"""Rotary positions: both implementations against fp64, the kernel's bounds, the operation's contract."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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

from megalrps.errors import InputError
from megalrps.kernels import rotary as module
from megalrps.kernels.rotary import rotary, rotary_reference, rotary_tables, rotary_triton

BOUNDS = {torch.float32: ELEMENTWISE_FP32, torch.bfloat16: ONE_ROUNDING_BF16, torch.float16: ONE_ROUNDING_BF16 / 8}
SHAPES = [  # batch, sequence, heads, head size, and what of a head is rotated
    (1, 1, 1, 2, 2),
    (2, 5, 3, 24, 24),
    (2, 67, 4, 32, 32),
    (1, 3, 14, 64, 64),
    (2, 3, 40, 64, 16),  # more heads than a program holds; Pythia's quarter of a head
    (1, 7, 2, 128, 128),
    (3, 4, 5, 11, 6),
]


def tables_of(length, rotated, base=10000.0):
    return rotary_tables(torch.arange(length, device=DEVICE), rotated, base)


def turned(x, cosine, sine):
    """The product of complex numbers that rotation is; the tables are [.., R] at the tokens of ``x``, [.., N, D]."""
    pairs = cosine.shape[-1]
    product = torch.complex(x[..., :pairs], x[..., pairs : 2 * pairs]) * torch.complex(cosine, sine).unsqueeze(-2)
    return torch.cat((product.real, product.imag, x[..., 2 * pairs :]), -1)


@needs_triton
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_equals_fp64(shape, dtype, monkeypatch):
    *sizes, rotated = shape
    x, tables = drawn(0, *sizes, dtype=dtype), tables_of(sizes[1] + 2, rotated)
    positions = torch.randint(sizes[1], sizes[:2], generator=torch.Generator().manual_seed(1)).to(DEVICE)
    poisoned_empty(monkeypatch)
    for rows, backwards in ((None, False), (positions, False), (positions.int(), True)):
        exact = rotary_reference(x.double(), *tables, rows, backwards)
        check(rotary_triton(x, *tables, rows, backwards), exact, BOUNDS[dtype])


@needs_triton
def test_kernel_leaves_what_lies_around_alone():
    x, untouched = framed(drawn(0, 2, 5, 3, 10))
    (cosine, cosine_untouched), (sine, sine_untouched) = (framed(table) for table in tables_of(5, 6))
    output = rotary_triton(x, cosine, sine)
    for each in (untouched, cosine_untouched, sine_untouched):
        each()
    assert not output.isnan().any()


@needs_triton
@pytest.mark.parametrize("implementation", [rotary_triton, rotary], ids=["kernel", "operation"])
def test_views_are_read_where_they_lie(implementation):
    tables = tables_of(7, 8)
    projected = drawn(0, 2, 7, 5 * 8)
    views = {
        "heads amid a projection": projected[..., 8:32].unflatten(-1, (3, 8)),
        "heads before tokens": drawn(1, 2, 3, 7, 8).transpose(1, 2),
        "numbers apart": drawn(2, 2, 7, 3, 16)[..., ::2],
        "broadcast, as the gradient of a sum": drawn(3, 1).expand(2, 7, 3, 8),
    }
    for name, x in views.items():
        output = implementation(x, *tables)
        assert output.is_contiguous(), name
        check(output, turned(x.double(), *(table.double() for table in tables)), ELEMENTWISE_FP32)


def test_rotation_is_a_complex_product_of_the_halves():
    x, tables = drawn(0, 2, 11, 3, 8).double(), tables_of(11, 8, base=500.0)
    wide = [table.double() for table in tables]
    torch.testing.assert_close(rotary(x, *tables), turned(x, *wide), rtol=1e-14, atol=1e-14)
    assert tables[0].dtype == torch.float32
    assert tables[0][10, 3].item() == pytest.approx(math.cos(10 * 500.0 ** (-6 / 8)), abs=1e-6)


def test_packed_documents_are_rotated_as_they_are_alone():
    first, second = drawn(0, 1, 5, 2, 8), drawn(1, 1, 3, 2, 8)
    tables = tables_of(5, 4)
    positions = torch.tensor([[*range(5), *range(3)]], device=DEVICE)
    together = rotary(torch.cat((first, second), 1), *tables, positions)
    assert torch.equal(together, torch.cat((rotary(first, *tables), rotary(second, *tables)), 1))
    assert torch.equal(together[..., 4:], torch.cat((first, second), 1)[..., 4:])  # the second half of a head passes


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2000), st.integers(0, 2000), st.sampled_from([2, 6, 32]))
def test_rotated_products_depend_on_the_distance_alone(position, shift, head_size):
    query, key = (torch.randn(1, 1, 1, head_size, dtype=torch.float64) for _ in range(2))

    def product(query_position, key_position):
        tables = [rotary_tables(torch.tensor([p]), head_size, 10000.0) for p in (query_position, key_position)]
        return (rotary(query, *tables[0]) * rotary(key, *tables[1])).sum().item()

    assert product(position + 5, position) == pytest.approx(product(position + shift + 5, position + shift), abs=5e-3)


@pytest.mark.parametrize("dtype", BOUNDS)
def test_is_rounded_once(dtype):
    x, tables = drawn(0, 2, 33, 2, 16, dtype=dtype), tables_of(33, 16)
    rotated = rotary(x, *tables)
    assert rotated.dtype == dtype
    check(rotated, rotary(x.double(), *tables), BOUNDS[dtype])


@pytest.mark.parametrize("rotated", [6, 4])
def test_gradients_are_those_of_the_formula(rotated):
    x, tables = drawn(0, 2, 3, 2, 6).double().requires_grad_(), tables_of(4, rotated)
    positions = torch.tensor([[0, 1, 2], [3, 0, 0]], device=DEVICE)
    for rows in (None, positions):
        assert torch.autograd.gradcheck(lambda x, rows=rows: rotary(x, *tables, rows), (x,))
        assert torch.equal(rotary(x, *tables, rows), rotary_reference(x, *tables, rows))


def test_a_rotation_back_undoes_it():
    x, tables = drawn(0, 1, 9, 2, 6).double(), [table.double() for table in tables_of(9, 6)]
    norm = (tables[0].square() + tables[1].square()).repeat(1, 2)[:, None]  # of fp32 tables not quite 1
    torch.testing.assert_close(
        module._rotate(rotary(x, *tables), *tables, None, True) / norm, x, rtol=1e-13, atol=1e-13
    )


def test_sizes_that_do_not_fit_are_refused():
    x = drawn(0, 1, 5, 2, 6)
    with pytest.raises(InputError, match="rotate 4 pairs"):
        rotary(x, *tables_of(5, 8))
    with pytest.raises(InputError, match="4 rows for 5 positions"):
        rotary(x, *tables_of(4, 6))
    with pytest.raises(InputError, match=r"positions_BS is \[5\]"):
        rotary(x, *tables_of(5, 6), torch.arange(5, device=DEVICE))


def test_the_operation_keeps_its_contract():
    x, tables = drawn(0, 2, 3, 4, 6).transpose(1, 2), tables_of(4, 6)
    positions = torch.tensor([[0, 1, 2, 3], [0, 1, 0, 1]], device=DEVICE)
    opcheck(module._rotate, (x.requires_grad_(), *tables, positions, False))
    opcheck(module._rotate, (x.detach(), *tables, None, True))


def test_keeps_the_tables_and_nothing_of_its_input():
    x, tables, kept = drawn(0, 2, 4, 3, 6).requires_grad_(), tables_of(4, 6), []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each.data_ptr()), lambda each: each):
        rotary(x, *tables)
    assert kept == [table.data_ptr() for table in tables]
