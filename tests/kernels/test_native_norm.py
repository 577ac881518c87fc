"""The compiled sum of squares, and the CUDA kernels beside their C++ twins: the same bits.

Where there is no GPU, csrc/emulated stands in for CUDA's header, and a C++ compiler builds the kernels' own source.
"""

import ctypes
import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from megalrps.kernels import native
from megalrps.kernels.native import adamw_cuda_, sum_of_squares_cuda, sum_of_squares_native

torch.set_num_threads(1)

pytestmark = pytest.mark.skipif(native.cpu_missing() is not None, reason="the compiled extension was not built")

SOURCES = Path(__file__).parents[2] / "csrc"
LANES, PIECE = 1024, 32 * 1024  # csrc/norm.h
SIZES = [1, 3, 7, 8, LANES - 1, LANES, LANES + 1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 5 * LANES + 6]
FACTORS = {"second_decay": 0.95, "second_weight": 0.05, "epsilon": 3e-9, "decay": 0.997, "update_size": 2.7e-2}
TYPES = [
    (first, second, narrow)
    for first in (torch.float32, torch.bfloat16)
    for second in (torch.float32, torch.bfloat16)
    for narrow in (None, torch.bfloat16, torch.float16)
]
NUMBERS = {None: 0, torch.float32: 1, torch.bfloat16: 3, torch.float16: 4}  # megalrps::FloatType


def drawn(size, dtype=torch.float32, seed=0):
    """Magnitudes spread over e^-6 to e^6."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(size, generator=generator).mul(2).exp()
    return torch.randn(size, generator=generator, dtype=torch.float64).mul(spread).to(dtype)


# ---- The sum of squares on a CPU ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_sum_of_squares_is_that_of_fp64(dtype):
    for size in (*SIZES, 1_000_003):
        x = drawn(size, dtype, seed=size)
        exact = math.fsum(x.double().square().tolist())
        total = sum_of_squares_native(x)
        assert total.dtype == torch.float64
        assert total.shape == ()
        assert abs(total.item() - exact) <= (1e-14 if dtype == torch.float64 else 5e-7) * exact, size
    assert sum_of_squares_native(x[:0]).item() == 0


def test_roundings_of_one_sign_do_not_grow_with_the_buffer():
    """Added up one by one in fp32, 2^23 times 0.1^2 would be off by a percent."""
    x = torch.full((1 << 23,), 0.1)
    exact = x[0].double().square().item() * x.numel()
    assert abs(sum_of_squares_native(x).item() - exact) <= 1e-6 * exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_order_of_the_sum_is_the_one_the_header_fixes(dtype):
    """Written again with torch: lanes, pairs, pieces."""

    def pairs(lanes):
        while lanes.numel() > 1:
            lanes = lanes[::2] + lanes[1::2]
        return lanes[0]

    x = drawn(3 * PIECE + 77, dtype)
    total = torch.zeros(LANES, dtype=torch.float64)
    for index, piece in enumerate(x.float().split(PIECE)):
        lanes = torch.zeros(LANES)
        for row in torch.nn.functional.pad(piece, (0, -piece.numel() % LANES)).split(LANES):
            lanes += row * row
        total[index % LANES] += pairs(lanes).double()
    assert sum_of_squares_native(x).item() == pairs(total).item()
    assert sum_of_squares_native(x).item() == sum_of_squares_native(x.float()).item()


def test_neither_threads_nor_instructions_nor_the_address_change_a_bit():
    from megalrps import _native

    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = drawn((3 << 20) + 77, dtype)
        given = {"elements": x.numel(), "type": str(dtype).removeprefix("torch.")}
        single = _native.sum_of_squares(values=x.data_ptr(), **given)
        for threads in (2, 3, 5):
            assert _native.sum_of_squares(values=x.data_ptr(), threads=threads, **given) == single
        for instructions in ("baseline", "avx2") if _native.has_avx2() else ("baseline",):
            assert _native.sum_of_squares(values=x.data_ptr(), instructions=instructions, **given) == single
        elsewhere = torch.cat((x.new_ones(3), x))[3:]
        assert _native.sum_of_squares(values=elsewhere.data_ptr(), **given) == single


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("at", [0, PIECE - 1, PIECE + 9, -1])
def test_what_is_no_finite_number_shows(dtype, at):
    x = drawn(2 * PIECE + 13, dtype)
    x[at] = float("-inf")
    assert sum_of_squares_native(x).item() == float("inf")
    x[at] = float("nan")
    assert math.isnan(sum_of_squares_native(x).item())


def test_a_square_beyond_the_type_is_infinite():
    assert sum_of_squares_native(torch.full((5,), 1e20)).item() == float("inf")
    assert sum_of_squares_native(torch.full((5,), 1e20, dtype=torch.float64)).item() == pytest.approx(5e40)


@pytest.mark.parametrize("function", [sum_of_squares_native, sum_of_squares_cuda])
@pytest.mark.parametrize(
    "x",
    [torch.ones(4, dtype=torch.float16), torch.ones(2, 2), torch.ones(8)[::2], torch.ones(4, device="meta")],
    ids=["fp16", "matrix", "strided", "meta"],
)
def test_other_tensors_are_refused(function, x):
    with pytest.raises(ValueError, match="x must be"):
        function(x)


# ---- The CUDA kernels, built for a processor ----


class Memory(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("param", "grad", "exp_avg", "exp_avg_sq", "narrow")),
        ("elements", ctypes.c_size_t),
        *((name, ctypes.c_int) for name in ("type", "exp_avg_type", "exp_avg_sq_type", "narrow_type")),
    ]


class Factors(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_double)
        for name in (
            "gradient_scale",
            "first_weight",
            "second_decay",
            "second_weight",
            "epsilon",
            "decay",
            "update_size",
        )
    ]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler: the kernels cannot be built for a processor")
    library = tmp_path_factory.mktemp("emulated") / "kernels.so"
    sources = [SOURCES / name for name in ("emulated/kernels.cpp", "adamw.cu", "norm.cu", "device.cu")]
    flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas", "-Werror", "-shared", "-fPIC"]
    flags.append('-DMEGALRPS_CUDA_TARGETS="sm_80 sm_90a compute_120"')
    subprocess.run([compiler, *flags, "-I", SOURCES / "emulated", "-x", "c++", *sources, "-o", library], check=True)
    loaded = ctypes.CDLL(str(library))
    for function in (loaded.emulated_adamw, loaded.emulated_sum_of_squares, loaded.emulated_missing):
        function.restype = ctypes.c_char_p
    return loaded


def emulated_sum(library, x):
    from megalrps import _native

    partials = torch.full((_native.pieces_of(x.numel()) + 2,), math.nan)
    total = torch.full((), math.nan, dtype=torch.float64)
    bfloat16 = x.dtype == torch.bfloat16
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, partials, total)]
    error = library.emulated_sum_of_squares(pointers[0], ctypes.c_size_t(x.numel()), bfloat16, *pointers[1:])
    assert error is None
    assert partials[-2:].isnan().all()
    return total.item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_kernels_sum_is_the_processors(emulated, dtype):
    for size in (0, *SIZES):
        framed = torch.full((size + 128,), math.nan, dtype=dtype)  # what lies around must not count
        x = framed[64 : 64 + size].copy_(drawn(size, dtype, seed=size))
        assert emulated_sum(emulated, x) == sum_of_squares_native(x).item(), size


def test_the_kernel_adds_more_pieces_than_lanes_as_the_processor_does(emulated):
    x = drawn(8 * PIECE, torch.bfloat16).repeat(LANES // 8 + 1)[: LANES * PIECE + PIECE + 1]
    assert emulated_sum(emulated, x) == sum_of_squares_native(x).item()


def state(size, first, second, narrow):
    """A run in its midst: parameters, gradient, moments, narrow copy."""
    param, grad, exp_avg, exp_avg_sq = (drawn(size, seed=seed) for seed in range(4))
    copy = None if narrow is None else torch.full((size,), 7.0, dtype=narrow)
    return [param, grad, exp_avg.to(first), exp_avg_sq.square().to(second), copy]


def on_processor(tensors, first_weight, scale=1.0):
    from megalrps import _native

    clones = [None if tensor is None else tensor.clone() for tensor in tensors]
    names = ("param", "grad", "exp_avg", "exp_avg_sq", "narrow")
    given: dict[str, Any] = {name: 0 if t is None else t.data_ptr() for name, t in zip(names, clones, strict=True)}
    types = {
        f"{name}_type": "" if t is None else str(t.dtype).removeprefix("torch.")
        for name, t in zip(names[2:], clones[2:], strict=True)
    }
    _native.adamw(
        **given,
        **types,
        **FACTORS,
        elements=tensors[0].numel(),
        type="float32",
        first_weight=first_weight,
        gradient_scale=scale,
    )
    return clones


def emulate(library, tensors, first_weight, scale=None, found_inf=None):
    """The update in place, by the kernel built for a processor."""
    memory = Memory(*(None if t is None else t.data_ptr() for t in tensors), tensors[0].numel(), 1)
    kinds = [NUMBERS[None if t is None else t.dtype] for t in tensors[2:]]
    memory.exp_avg_type, memory.exp_avg_sq_type, memory.narrow_type = kinds
    factors = Factors(gradient_scale=math.nan, first_weight=first_weight, **FACTORS)  # the device's scale counts alone
    scalars = [None if value is None else ctypes.byref(ctypes.c_float(value)) for value in (scale, found_inf)]
    assert library.emulated_adamw(ctypes.byref(memory), ctypes.byref(factors), *scalars) is None


def same_bits(ours, theirs):
    """Of a NaN only that it is one."""
    return all(
        a is b is None or (torch.equal(a.isnan(), b.isnan()) and torch.equal(a[~a.isnan()], b[~b.isnan()]))
        for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("types", TYPES, ids=str)
def test_the_kernels_update_is_the_processors(emulated, types):
    for size in (1, 2, 3, 4, 5, 1023, 1028, 5003):
        tensors = state(size, *types)
        tensors[0][::97], tensors[1][5::101] = float("inf"), float("nan")
        framed = [None if t is None else torch.full((size + 128,), 3.0, dtype=t.dtype) for t in tensors]
        views = [
            None if frame is None else frame[64 : 64 + size].copy_(t) for frame, t in zip(framed, tensors, strict=True)
        ]
        emulate(emulated, views, 0.1, scale=0.37)
        scale = torch.tensor(0.37).item()
        assert same_bits(views, on_processor(tensors, 0.1, scale)), size
        assert all((f[:64] == 3).all() and (f[-64:] == 3).all() for f in framed if f is not None), "written outside"


def test_the_kernel_reaches_the_mean_from_its_nearer_end_and_scales_by_one_where_no_scale_is_given(emulated):
    tensors = state(2051, torch.float32, torch.float32, torch.bfloat16)
    expected = on_processor(tensors, 0.7)
    emulate(emulated, tensors, 0.7)
    assert same_bits(tensors, expected)


@pytest.mark.parametrize("value", [1.0, -2.0, float("inf"), float("nan")])
def test_found_inf_leaves_every_bit_untouched(emulated, value):
    tensors = state(1031, torch.float32, torch.bfloat16, torch.float16)
    before = [tensor.clone() for tensor in tensors]
    emulate(emulated, tensors, 0.1, scale=0.5, found_inf=value)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    emulate(emulated, tensors, 0.1, scale=0.5, found_inf=0.0)
    assert same_bits(tensors, on_processor(before, 0.1, 0.5))


@pytest.mark.parametrize(
    ("capability", "served"),
    [
        ((7, 5), False),
        ((8, 0), True),
        ((8, 9), True),
        ((9, 0), True),
        ((9, 1), False),
        ((10, 3), False),
        ((12, 1), True),
    ],
)
def test_a_device_is_served_by_code_of_its_generation_by_its_own_or_by_older_ptx(emulated, capability, served):
    """Of sm_80, sm_90a and compute_120."""
    missing = emulated.emulated_missing(*capability)
    assert (missing is None) is served
    assert served or b"built for other devices than this one: sm_80 sm_90a compute_120" in missing


# ---- What is refused, and what happens without a GPU ----


def launch_arguments(**changed):
    names = ("param", "grad", "exp_avg", "exp_avg_sq")
    given: dict[str, Any] = dict.fromkeys(names, 1 << 20) | FACTORS | {"first_weight": 0.1, "elements": 4, "stream": 0}
    return given | {"exp_avg_type": "float32", "exp_avg_sq_type": "float32"} | changed


@pytest.mark.parametrize("name", ["param", "grad", "exp_avg", "exp_avg_sq", "narrow"])
def test_an_address_off_16_bytes_is_refused_by_name(name):
    from megalrps import _native

    with pytest.raises(ValueError, match=f"{name} must start at a multiple of 16 bytes"):
        _native.adamw_cuda(**launch_arguments(**{name: (1 << 20) + 8}))
    with pytest.raises(ValueError, match="multiple of 16 bytes"):
        _native.sum_of_squares_cuda(
            values=(1 << 20) + 4, elements=4, type="float32", partials=1 << 20, result=1 << 20, stream=0
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which would read what no one owns")
def test_without_a_gpu_a_launch_is_an_exception_and_the_reason_is_known():
    from megalrps import _native

    available, reason = _native.cuda_available()
    assert not available
    assert reason
    assert native.cuda_missing() == reason
    with pytest.raises(ValueError, match="cannot be used here"):
        native.check_cuda()
    for launch in (
        lambda: _native.adamw_cuda(**launch_arguments()),
        lambda: _native.sum_of_squares_cuda(
            values=1 << 20, elements=4, type="float32", partials=1 << 20, result=1 << 20, stream=0
        ),
    ):
        with pytest.raises(RuntimeError, match=r"megalrps\._native: ."):
            launch()


def test_tensors_that_the_kernel_does_not_update_are_refused_by_name():
    tensors = [torch.zeros(4) for _ in range(4)]
    with pytest.raises(ValueError, match="param must be float32 on cuda"):
        adamw_cuda_(*tensors, first_weight=0.1, **FACTORS)


def test_without_the_extension_the_mend_is_named(monkeypatch):
    monkeypatch.setattr(native, "_native", None)
    monkeypatch.setattr(native, "_CPU_MISSING", "not built: python setup.py build_ext --inplace")
    assert native.cuda_targets() == ()
    assert "build_ext" in str(native.cuda_missing())
    with pytest.raises(RuntimeError, match="build_ext"):
        sum_of_squares_native(torch.ones(4))


# ---- On a GPU ----


def require_cuda_part():
    if native.cuda_missing() is not None:
        pytest.skip(f"no CUDA part: {native.cuda_missing()}")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gpus_sum_is_the_processors(dtype):
    require_cuda_part()
    for size in (0, *SIZES, LANES * PIECE + 2 * PIECE + 1):
        x = drawn(size, dtype, seed=size)
        on_gpu = x.cuda()
        totals = {sum_of_squares_cuda(on_gpu).item() for _ in range(5)}
        assert totals == {sum_of_squares_native(x).item()}, size


@pytest.mark.gpu
@pytest.mark.parametrize("types", TYPES, ids=str)
def test_a_gpus_update_is_the_processors(types):
    require_cuda_part()
    for size in (1, 3, 4, 5, 1023, 5003, 3_000_001):
        tensors = state(size, *types)
        tensors[0][::97], tensors[1][5::101] = float("inf"), float("nan")
        ours = [None if t is None else t.cuda() for t in tensors]
        before = [None if t is None else t.clone() for t in ours]
        given = {**FACTORS, "first_weight": 0.1, "gradient_scale": torch.tensor(0.37).cuda(), "narrow": ours[4]}
        for stop in (1.0, float("nan")):
            adamw_cuda_(*ours[:4], found_inf=torch.tensor(stop).cuda(), **given)
            assert same_bits(ours, before)
        adamw_cuda_(*ours[:4], found_inf=torch.zeros(1).cuda(), **given)
        expected = on_processor(tensors, 0.1, torch.tensor(0.37).item())
        assert same_bits([None if t is None else t.cpu() for t in ours], expected), size


@pytest.mark.gpu
def test_a_gpus_tensors_off_16_bytes_are_refused():
    require_cuda_part()
    tensors = [torch.zeros(9, device="cuda") for _ in range(4)]
    with pytest.raises(ValueError, match="grad must start at a multiple of 16 bytes"):
        adamw_cuda_(tensors[0][:8], tensors[1][1:], tensors[2][:8], tensors[3][:8], first_weight=0.1, **FACTORS)
    with pytest.raises(ValueError, match="x must start at a multiple of 16 bytes"):
        sum_of_squares_cuda(tensors[0][1:])
