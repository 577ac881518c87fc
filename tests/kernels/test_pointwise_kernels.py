"""RMSNorm, rotary positions and SwiGLU against formulas written another way, in fp64, fp32 and bf16."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalrps.kernels.rms_norm import rms_norm
from megalrps.kernels.rotary import rotary, rotary_tables
from megalrps.kernels.swiglu import swiglu

torch.set_num_threads(1)


def relative_error(value, reference):
    return ((value.double() - reference.double()).norm() / reference.double().norm()).item()


@pytest.mark.parametrize("hidden", [1, 7, 128])
def test_rms_norm_equals_torchs_own(hidden):
    x, weight = torch.randn(3, 5, hidden, dtype=torch.float64), torch.randn(hidden, dtype=torch.float64)
    expected = torch.nn.functional.rms_norm(x, (hidden,), weight, 1e-5)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 2.5e-3)])
def test_rms_norm_rounds_once(dtype, bound):
    x, weight = torch.randn(16, 257).to(dtype), torch.randn(257).to(dtype)
    y = rms_norm(x, weight, 1e-5)
    assert y.dtype == dtype
    assert relative_error(y, rms_norm(x.double(), weight.double(), 1e-5)) < bound


def test_rms_norm_statistics_do_not_overflow_in_half_precision():
    x = torch.full((1, 64), 1000.0, dtype=torch.float16)  # 1000^2 is infinite in fp16
    torch.testing.assert_close(rms_norm(x, torch.ones(64, dtype=torch.float16), 1e-5), torch.ones_like(x))


@pytest.mark.parametrize("operation", ["rms_norm", "rotary", "swiglu"])
def test_gradients(operation):
    x = torch.randn(2, 3, 2, 6, dtype=torch.float64, requires_grad=True)
    other = torch.randn(2, 3, 2, 6, dtype=torch.float64, requires_grad=True)
    functions = {
        "rms_norm": (lambda a, b: rms_norm(a, b[0, 0, 0], 1e-5)),
        "rotary": (lambda a, b: rotary(a * b, *rotary_tables(torch.arange(3), 6, 10000.0))),
        "swiglu": swiglu,
    }
    assert torch.autograd.gradcheck(functions[operation], (x, other))


def test_swiglu_is_the_formula():
    gate, up = torch.randn(4, 9, dtype=torch.float64), torch.randn(4, 9, dtype=torch.float64)
    torch.testing.assert_close(swiglu(gate, up), gate / (1 + (-gate).exp()) * up, rtol=1e-14, atol=1e-14)


def test_rotary_is_a_complex_product_of_the_halves():
    length, head_size, base = 11, 8, 500.0
    x = torch.randn(2, length, 3, head_size, dtype=torch.float64)
    cosine, sine = rotary_tables(torch.arange(length), head_size, base)
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.complex(cosine, sine).to(torch.complex128)[:, None]
    torch.testing.assert_close(rotary(x, cosine, sine), torch.cat((turned.real, turned.imag), -1))
    assert cosine.dtype == torch.float32
    assert cosine[10, 3].item() == pytest.approx(math.cos(10 * 500.0 ** (-6 / 8)), abs=1e-6)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2000), st.integers(0, 2000), st.sampled_from([2, 6, 32]))
def test_rotated_products_depend_on_the_distance_alone(position, shift, head_size):
    query, key = (
        torch.randn(1, 1, 1, head_size, dtype=torch.float64),
        torch.randn(1, 1, 1, head_size, dtype=torch.float64),
    )

    def product(query_position, key_position):
        tables = [rotary_tables(torch.tensor([p]), head_size, 10000.0) for p in (query_position, key_position)]
        return (rotary(query, *tables[0]) * rotary(key, *tables[1])).sum().item()

    assert product(position + 5, position) == pytest.approx(product(position + shift + 5, position + shift), abs=5e-3)


def test_rotary_in_bf16_is_rounded_once():
    x = torch.randn(2, 33, 2, 16)
    tables = rotary_tables(torch.arange(33), 16, 10000.0)
    narrow = rotary(x.bfloat16(), *tables)
    assert narrow.dtype == torch.bfloat16
    assert relative_error(narrow, rotary(x.bfloat16().double(), *tables)) < 2.5e-3
