"""AdamW's two implementations against each other: types, rounding, and that an element's place changes nothing."""

import itertools

import pytest
import torch

from megalrps.kernels import adamw as module
from megalrps.kernels.adamw import IMPLEMENTATION, adamw_, adamw_reference_

torch.set_num_threads(1)

SETTINGS = {"learning_rate": 3e-2, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "weight_decay": 0.1}
TYPES = [
    (dtype, first, second, narrow)
    for dtype in (torch.float32, torch.float64)
    for first in (dtype, torch.bfloat16)
    for second in (dtype, torch.bfloat16)
    for narrow in (None, torch.bfloat16, torch.float16)
]
FUNCTIONS = [pytest.param(adamw_, id=IMPLEMENTATION)]
if IMPLEMENTATION == "native":
    FUNCTIONS.append(pytest.param(adamw_reference_, id="reference"))
needs_native = pytest.mark.skipif(IMPLEMENTATION != "native", reason="the compiled extension was not built")


def state(size, dtype=torch.float32, first=None, second=None, narrow=None, seed=0):
    """Parameters, gradient, moments and narrow copy of a run in its midst; magnitudes spread over e^-12 to e^12."""
    generator = torch.Generator().manual_seed(seed)

    def values():
        return torch.randn(size, dtype=torch.float64, generator=generator)

    param, grad, exp_avg = ((values() * (3 * values()).exp()).to(dtype) for _ in range(3))
    exp_avg_sq = (values() * (3 * values()).exp()).square()
    copy = None if narrow is None else torch.zeros(size, dtype=narrow)
    return [param, grad, exp_avg.to(first or dtype), exp_avg_sq.to(second or dtype), copy]


def updated(function, tensors, step=3, scale=0.37, **settings):
    """Clones of ``tensors`` after one update."""
    param, grad, first, second, narrow = (None if tensor is None else tensor.clone() for tensor in tensors)
    scale = torch.tensor(scale, dtype=torch.float32)
    function(param, grad, first, second, step=step, gradient_scale=scale, narrow=narrow, **(SETTINGS | settings))
    return [param, first, second, narrow]


def same_bits(ours, theirs):
    return all(a is b is None or torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("beta1", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("size", [1, 7, 8, 1001])
def test_native_equals_the_reference_in_fp64(size, beta1):
    tensors = state(size, torch.float64)
    param, grad, first, *_ = tensors
    ours, reference = (updated(function, tensors, beta1=beta1) for function in (adamw_, adamw_reference_))
    # Two roundings of the largest operand: where operands cancel, the last bits of the result are theirs.
    bound = 2 * torch.finfo(torch.float64).eps
    gradient = 0.37 * grad
    assert ((ours[1] - reference[1]).abs() <= bound * torch.maximum(first.abs(), gradient.abs())).all()
    assert ((ours[2] - reference[2]).abs() <= bound * reference[2]).all()
    size_of_update = (reference[0] - param * (1 - 3e-3)).abs() * (first.abs() + gradient.abs()) / reference[1].abs()
    assert ((ours[0] - reference[0]).abs() <= bound * (param.abs() + 2 * size_of_update)).all()


@pytest.mark.parametrize("bf16", [False, True])
def test_the_error_in_fp32_is_at_most_twice_the_references(bf16):
    moment = torch.bfloat16 if bf16 else None
    tensors = state(100_003, first=moment, second=moment)
    wide = [None if tensor is None else tensor.double() for tensor in tensors]
    exact = updated(adamw_reference_, wide)
    ours, reference = (updated(function, tensors) for function in (adamw_, adamw_reference_))
    for a, b, truth in zip(ours[:3], reference[:3], exact[:3], strict=True):
        error, allowed = ((x.double() - truth).norm() / truth.norm() for x in (a, b))
        assert 0 < allowed < (5e-3 if a.dtype == torch.bfloat16 else 1e-6)
        assert error <= 2 * allowed
        relative = [((x.double() - truth) / truth).abs().median() for x in (a, b)]
        assert relative[0] <= 2 * relative[1]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("types", TYPES, ids=str)
def test_an_element_does_not_depend_on_its_place(function, types):
    """A sharded optimizer cuts a buffer anywhere: into vector bodies, tails, and starts at any alignment."""
    tensors = state(2100, *types)
    whole = updated(function, tensors)
    for cuts in (
        [0, 1, 2, 5, 12, 29, 64, 101, 1003, 2050, 2100],
        [0, 1023, 1025, 2100],
        [0, *range(3, 2100, 37), 2100],
    ):
        pieces = [
            updated(function, [None if t is None else t[start:end] for t in tensors])
            for start, end in itertools.pairwise(cuts)
        ]
        joined = [None if part[0] is None else torch.cat(part) for part in zip(*pieces, strict=True)]
        assert same_bits(joined, whole)
    for offset in range(1, 9):  # the same elements elsewhere in memory, in place
        roomy = [None if t is None else torch.cat((t.new_ones(offset), t, t.new_ones(3))) for t in tensors]
        views = [None if t is None else t[offset:-3] for t in roomy]
        function(*views[:4], step=3, gradient_scale=torch.tensor(0.37), narrow=views[4], **SETTINGS)
        assert same_bits([views[0], *views[2:]], whole)
        assert all((t[:offset] == 1).all() and (t[-3:] == 1).all() for t in roomy if t is not None), "written outside"


@needs_native
@pytest.mark.parametrize("types", TYPES, ids=str)
def test_baseline_and_avx2_give_the_same_bits(types, monkeypatch):
    from megalrps import _native

    if not _native.has_avx2():
        pytest.skip("this processor has no AVX2")
    tensors = state(1003, *types)
    tensors[0][::97], tensors[1][5::101] = float("inf"), float("nan")
    results = []
    for instructions in ("baseline", "avx2", "best"):
        monkeypatch.setattr(
            module, "_native_adamw", lambda chosen=instructions, **given: _native.adamw(**given, instructions=chosen)
        )
        results.append([None if t is None else t.nan_to_num(7.0) for t in updated(adamw_, tensors)])
    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])


@needs_native
def test_threads_give_the_same_bits():
    tensors = state((3 << 20) + 77, narrow=torch.bfloat16)
    single = updated(adamw_, tensors)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        try:
            assert same_bits(updated(adamw_, tensors), single)
        finally:
            torch.set_num_threads(1)


def boundary_values(narrow):
    """Every finite positive number of ``narrow``, the middle to the next, its fp32 neighbours, and the special ones."""
    every = torch.arange(1 << 15, dtype=torch.int32).to(torch.int16).view(narrow).double()
    every = every[every.isfinite()]
    middle = ((every[1:] + every[:-1]) / 2).float()
    largest = torch.tensor([every[-1] * (1 + 2.0**-12), 65519.0, 65520.0, 3.4e38, float("inf"), float("nan")]).float()
    values = torch.cat(
        (every.float(), middle, middle.nextafter(torch.tensor(0.0)), middle.nextafter(middle * 2), largest)
    )
    return torch.cat((values, -values))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_the_narrow_copy_is_torchs_rounding_of_the_new_parameters(function, dtype, narrow):
    param = boundary_values(narrow).to(dtype)
    if dtype == torch.float64:
        param *= 1 + 2.0**-40  # not an fp32 number: rounded through fp32, as torch does
    zero, copy = torch.zeros_like(param), torch.ones(param.numel(), dtype=narrow)
    function(param, zero, zero.clone(), zero.clone(), step=1, narrow=copy, **(SETTINGS | {"learning_rate": 0.0}))
    torch.testing.assert_close(copy, param.to(narrow), rtol=0, atol=0, equal_nan=True)
    number = ~param.isnan()
    assert torch.equal(copy[number].signbit(), param[number].signbit())


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_bf16_moment_is_used_unrounded_and_rounded_to_nearest_even(function):
    tensors = state(5000, first=torch.bfloat16, second=torch.bfloat16)
    widened = [tensors[0], tensors[1], tensors[2].float(), tensors[3].float(), None]
    narrow, wide = updated(function, tensors), updated(function, widened)
    assert torch.equal(narrow[0], wide[0])
    assert torch.equal(narrow[1], wide[1].bfloat16())
    assert torch.equal(narrow[2], wide[2].bfloat16())


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_bf16_second_moment_does_not_fall_slower_than_its_last_bit(function):
    moment = torch.tensor([1.0, 1.5, 1.9921875]).bfloat16()
    zeros = [torch.zeros(3) for _ in range(3)]
    for beta2, falls in ((0.999, False), (0.99, True)):
        kept = moment.clone()
        function(*zeros, kept, step=9, **(SETTINGS | {"beta2": beta2}))
        assert bool((kept < moment).all()) is falls


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("shape", [(), (1,)])
def test_the_gradient_scale_is_a_product_with_the_gradient(function, shape):
    tensors = state(1001)
    param, _, first, second, _ = (None if t is None else t.clone() for t in tensors)
    scaled = tensors[1] * torch.tensor(0.37)
    function(param, scaled, first, second, step=3, **SETTINGS)
    ours = [t.clone() for t in tensors[:4]]
    function(*ours, step=3, gradient_scale=torch.full(shape, 0.37), **SETTINGS)
    assert same_bits([ours[0], ours[2], ours[3]], [param, first, second])
    assert torch.equal(ours[1], tensors[1]), "the gradient is read only"


@pytest.mark.parametrize("function", FUNCTIONS)
def test_autograd_notices_the_update(function):
    param = torch.ones(5, requires_grad=True)
    loss = param.square().sum()
    function(param, *(torch.zeros(5) for _ in range(3)), step=1, **SETTINGS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("param", torch.zeros(4, dtype=torch.bfloat16)),
        ("param", torch.zeros(2, 2)),
        ("grad", torch.zeros(4, dtype=torch.float64)),
        ("grad", torch.zeros(5)),
        ("grad", torch.zeros(8)[::2]),
        ("exp_avg", torch.zeros(4, dtype=torch.float16)),
        ("exp_avg_sq", torch.zeros(3)),
        ("exp_avg_sq", torch.zeros(4, device="meta")),
        ("narrow", torch.zeros(4)),
        ("narrow", torch.zeros(3, dtype=torch.bfloat16)),
        ("gradient_scale", torch.ones(2)),
    ],
    ids=str,
)
def test_other_tensors_are_refused_by_name_before_anything_is_written(function, name, wrong):
    tensors = {each: torch.ones(4) for each in ("param", "grad", "exp_avg", "exp_avg_sq")}
    with pytest.raises(ValueError, match=name):
        function(**(tensors | {name: wrong}), step=1, **SETTINGS)
    assert all((tensor == 1).all() for each, tensor in tensors.items() if each != name)


@needs_native
def test_the_extension_checks_its_arguments_itself():
    from megalrps import _native

    tensors = [torch.ones(4) for _ in range(4)]
    names = ("param", "grad", "exp_avg", "exp_avg_sq")
    scalars = ("gradient_scale", "first_weight", "second_decay", "second_weight", "epsilon", "decay", "update_size")
    given = {name: tensor.data_ptr() for name, tensor in zip(names, tensors, strict=True)} | dict.fromkeys(scalars, 0.5)
    given |= {"elements": 4, "type": "float32", "exp_avg_type": "float32", "exp_avg_sq_type": "float32"}
    for wrong in (
        {"type": "bfloat16"},
        {"type": "int8"},
        {"exp_avg_type": "float64"},
        {"exp_avg_sq_type": "float16"},
        {"narrow": tensors[0].data_ptr(), "narrow_type": "float32"},
        {"narrow_type": "bfloat16"},
        {"param": 0},
        {"instructions": "fast"},
    ):
        with pytest.raises(ValueError):
            _native.adamw(**(given | wrong))
    assert all((tensor == 1).all() for tensor in tensors)


def test_without_the_extension_torch_updates(monkeypatch):
    monkeypatch.setattr(module, "_native_adamw", None)
    tensors = state(1001, narrow=torch.bfloat16)
    assert same_bits(updated(adamw_, tensors), updated(adamw_reference_, tensors))
