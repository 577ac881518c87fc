"""Every backend of AdamW against the formula in fp64; what each does with flag, scale and copy; what is refused."""

import itertools
import sys
from types import SimpleNamespace

import pytest
import torch
from oracle import DEVICE, ELEMENTWISE_FP32, ONE_ROUNDING_BF16, check, framed, needs_triton, opcheck
from torch._subclasses.fake_tensor import FakeTensorMode

from megalrps.kernels import adamw as module
from megalrps.kernels import adamw_backends
from megalrps.kernels.adamw import IMPLEMENTATION, adamw_, adamw_reference_, update_reference, update_triton
from megalrps.kernels.adamw_backends import (
    Operands,
    Settings,
    check_optimizer_backend,
    chosen_optimizer_backend,
    update_apex,
    update_fused,
)

torch.set_num_threads(1)

SETTINGS = Settings(learning_rate=3e-2, beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.1, step=3)
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
needs_native = pytest.mark.skipif(IMPLEMENTATION != "native", reason="the compiled extension was not built")


def update_auto(operands: Operands, settings: Settings) -> None:
    tensors = operands._asdict()
    adamw_(**tensors, **settings._asdict())


UPDATES = {
    "auto": update_auto,
    "reference": update_reference,
    "triton": update_triton,
    "torch": update_fused,
    "apex": update_apex,
}
KINDS = [(FP32, FP32, None), (FP32, FP32, BF16), (FP32, FP32, FP16), (BF16, BF16, BF16), (BF16, FP32, BF16)]
"""Types of the moments and of the copy."""


def marks(name):
    return [needs_triton] if name == "triton" else []


BACKENDS = [pytest.param(update, id=name, marks=marks(name)) for name, update in UPDATES.items()]
CASES = [
    pytest.param(
        update, kind, id=f"{name}-{'-'.join(str(each).removeprefix('torch.') for each in kind)}", marks=marks(name)
    )
    for name, update in UPDATES.items()
    for kind in KINDS
    if kind[:2] == (FP32, FP32) or name not in ("torch", "apex")  # these two keep moments as parameters
]


@pytest.fixture(autouse=True)
def apex(monkeypatch):
    """Stands for apex's compiled module: its arguments, computed in fp32, the scaled gradient written back."""
    calls = []

    def adam(chunk, noop, lists, lr, beta1, beta2, epsilon, step, mode, bias_correction, weight_decay, inv_scale):
        assert noop.dtype == step.dtype == torch.int32 and lr.dtype == inv_scale.dtype == FP32
        assert len(lists) == 4 and (mode, bias_correction) == (1, 1) and 0 < chunk < 1 << 31
        calls.append(lists[0][0].numel())
        if noop.item() == 1:
            return
        for g, p, m, v in zip(*lists, strict=True):
            assert g.dtype == p.dtype == m.dtype == v.dtype
            g.mul_(inv_scale)
            m.copy_(beta1 * m + (1 - beta1) * g)
            v.copy_(beta2 * v + (1 - beta2) * g * g)
            first, second = m / (1 - beta1 ** step.item()), v / (1 - beta2 ** step.item())
            p.sub_(lr * (first / (second.sqrt() + epsilon) + weight_decay * p))

    monkeypatch.setitem(sys.modules, "amp_C", SimpleNamespace(multi_tensor_adam_capturable=adam))
    return calls


def operands(size, first=FP32, second=FP32, narrow=None, *, seed=0, scale=0.37, found_inf=None, dtype=FP32) -> Operands:
    """A run in its midst on the tests' device."""
    generator = torch.Generator().manual_seed(seed)
    param, grad, exp_avg, root = (torch.randn(size, dtype=torch.float64, generator=generator) for _ in range(4))
    tensors = [param.to(dtype), grad.to(dtype), (0.1 * exp_avg).to(first), root.square().to(second)]
    tensors += [None if scale is None else torch.tensor([scale]).to(dtype)]
    tensors += [None if found_inf is None else torch.tensor([found_inf])]
    tensors += [None if narrow is None else torch.full((size,), torch.nan, dtype=narrow)]
    return Operands(*(None if each is None else each.to(DEVICE) for each in tensors))


def cloned(given: Operands, dtype=None) -> Operands:
    def clone(name, each):
        widened = dtype is not None and name != "found_inf"
        return None if each is None else each.to(dtype, copy=True) if widened else each.clone()

    return Operands(**{name: clone(name, each) for name, each in given._asdict().items()})


def bits(given: Operands) -> list[torch.Tensor]:
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return [each.view(kinds[each.element_size()]).cpu() for each in given if each is not None]


def same_bits(one: Operands, other: Operands) -> bool:
    return all(torch.equal(a, b) for a, b in zip(bits(one), bits(other), strict=True))


@pytest.mark.parametrize(("update", "kind"), CASES)
@pytest.mark.parametrize("size", [1, 1023, 1024, 4097])
def test_an_update_equals_that_in_fp64(update, kind, size):
    given = operands(size, *kind, found_inf=0.0)
    wide, peer = cloned(given, torch.float64)._replace(narrow=None), cloned(given)
    update_reference(wide, SETTINGS)
    update_reference(peer, SETTINGS)
    before = given.grad.clone()
    update(given, SETTINGS)
    for name in ("param", "exp_avg", "exp_avg_sq"):
        result = getattr(given, name)
        bound = ELEMENTWISE_FP32 if result.dtype == FP32 else ONE_ROUNDING_BF16
        check(result, getattr(wide, name), bound, None if update is update_apex else getattr(peer, name))
    assert torch.equal(given.grad, before), "the gradient is read only"
    if given.narrow is not None:
        assert torch.equal(given.narrow, given.param.to(given.narrow.dtype))


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # the interpreter's numpy says so
@pytest.mark.parametrize(("update", "kind"), CASES)
@pytest.mark.parametrize("flag", [1.0, 7.0, float("nan")])
def test_a_flag_leaves_every_bit(update, kind, flag):
    given = operands(1500, *kind, found_inf=flag, scale=float("nan"))
    given.grad[3] = float("inf")
    before = cloned(given)
    update(given, SETTINGS)
    assert same_bits(given, before)
    update(given._replace(found_inf=torch.zeros_like(given.found_inf), gradient_scale=None), SETTINGS)
    assert not torch.equal(given.param, before.param)
    assert given.narrow is None or not given.narrow[4:].isnan().any()


@pytest.mark.parametrize("update", BACKENDS)
def test_without_a_flag_or_scale_it_is_as_with_none_set(update):
    plain, given = operands(2049, scale=None), operands(2049, scale=1.0, found_inf=0.0)
    update(plain, SETTINGS)
    update(given, SETTINGS)
    assert torch.equal(plain.param, given.param) and torch.equal(plain.exp_avg_sq, given.exp_avg_sq)


@needs_native
@needs_triton
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("beta1", [0.9, 0.3])
def test_the_kernel_writes_the_bits_of_the_native_code(kind, beta1):
    settings = SETTINGS._replace(beta1=beta1)
    given = operands(5000, *kind)
    for name, spread in (("param", 3e-39), ("grad", 1e12), ("exp_avg", 1e-6)):  # subnormal numbers too
        getattr(given, name)[::7] *= spread
    on_host = Operands(*(None if each is None else each.cpu().clone() for each in given))
    update_triton(given, settings)
    update_auto(on_host, settings)
    assert same_bits(given, on_host)


@needs_triton
@pytest.mark.parametrize("kind", [KINDS[1], KINDS[3]], ids=str)
def test_shards_of_a_buffer_get_the_bits_of_the_whole(kind):
    whole = operands(4100, *kind)
    parts = cloned(whole)
    update_triton(whole, SETTINGS)
    for start, end in itertools.pairwise((0, 1, 64, 2112, 4099, 4100)):
        flat = [None if each is None or each.numel() == 1 else each[start:end] for each in parts]
        update_triton(Operands(*flat)._replace(gradient_scale=parts.gradient_scale), SETTINGS)
    assert same_bits(whole, parts)


@needs_triton
def test_the_kernel_leaves_what_lies_around_alone():
    given, checks = operands(1027, narrow=BF16), []
    roomy = {}
    for name in ("param", "grad", "exp_avg", "exp_avg_sq", "narrow"):
        roomy[name], untouched = framed(getattr(given, name))
        checks.append(untouched)
    update_triton(given._replace(**roomy), SETTINGS)
    for untouched in checks:
        untouched()
    assert not any(each.isnan().any() for each in roomy.values())


@pytest.mark.parametrize("update", BACKENDS)
def test_many_blocks_are_one_update(update, monkeypatch):
    whole = operands(3001, narrow=BF16, found_inf=0.0)
    cut = cloned(whole)
    update(whole, SETTINGS)
    for owner, name in (
        (adamw_backends, "_BLOCK_ELEMENTS"),
        (module, "_CPU_BLOCK_ELEMENTS"),
        (module, "_DEVICE_BLOCK_ELEMENTS"),
    ):
        monkeypatch.setattr(owner, name, 1024)
    update(cut, SETTINGS)
    for one, other in zip(whole, cut, strict=True):
        torch.testing.assert_close(one, other, rtol=3e-7, atol=1e-7)  # torch's vector loops and their tails differ


def test_apex_is_given_blocks_that_its_counts_hold(apex, monkeypatch):
    monkeypatch.setattr(adamw_backends, "_BLOCK_ELEMENTS", 1000)
    update_apex(operands(2500), SETTINGS)
    assert apex == [1000, 1000, 500]


def test_on_a_cpu_torchs_kernel_can_be_asked_for():
    given, same = (Operands(*(None if each is None else each.cpu() for each in operands(500))) for _ in range(2))
    adamw_(**given._asdict(), **SETTINGS._asdict(), backend="torch")
    update_fused(same, SETTINGS)
    assert torch.equal(given.param, same.param)
    adamw_(**same._asdict(), **SETTINGS._asdict(), backend="auto")
    assert not torch.equal(given.param, same.param)


def dispatched(requested, monkeypatch, dtype=FP32) -> list[str]:
    """Which update a GPU is given."""
    seen: list[str] = []
    for name in ("update_triton", "_update_cuda", "update_apex", "update_fused", "update_reference"):
        monkeypatch.setattr(module, name, lambda *_, name=name: seen.append(name))
    module._update_on_gpu(*operands(3, dtype=dtype, first=dtype, second=dtype), *SETTINGS, requested)
    return seen


@needs_triton
def test_a_gpu_is_given_what_was_asked_for(monkeypatch):
    assert dispatched("auto", monkeypatch) == dispatched("triton", monkeypatch) == ["update_triton"]
    assert dispatched("cuda", monkeypatch) == ["_update_cuda"]
    assert dispatched("apex", monkeypatch) == ["update_apex"]
    assert dispatched("torch", monkeypatch) == ["update_fused"]
    assert dispatched("auto", monkeypatch, torch.float64) == ["update_reference"]
    monkeypatch.setattr(adamw_backends, "HAS_TRITON", False)
    assert dispatched("auto", monkeypatch) == ["update_reference"]


def test_the_compiled_kernel_is_given_the_factors_and_fp32_scalars(monkeypatch):
    seen = {}
    monkeypatch.setattr(module, "adamw_cuda_", lambda *tensors, **named: seen.update(named, tensors=tensors))
    given = operands(8, narrow=BF16, found_inf=0.0)
    module._update_cuda(given._replace(gradient_scale=given.gradient_scale.double()), SETTINGS)
    assert all(one is other for one, other in zip(seen.pop("tensors"), given[:4], strict=True))
    assert seen.pop("found_inf") is given.found_inf and seen.pop("narrow") is given.narrow
    assert torch.equal(seen.pop("gradient_scale"), given.gradient_scale)
    assert seen == module._factors(SETTINGS)._asdict()


@pytest.mark.parametrize(
    ("requested", "device", "moments", "words"),
    [
        ("triton", "cpu", (FP32, FP32), "triton updates tensors on a CUDA device, and these are on cpu"),
        ("cuda", "cpu", (FP32, FP32), "cuda updates tensors on a CUDA device"),
        ("apex", "cpu", (FP32, FP32), "apex updates tensors on a CUDA device"),
        ("torch", "cpu", (BF16, FP32), "--exp-avg-dtype and --exp-avg-sq-dtype at fp32"),
        ("torch", "cuda", (FP32, BF16), "--exp-avg-dtype and --exp-avg-sq-dtype at fp32"),
        ("apex", "cuda", (BF16, BF16), "apex keeps both moments"),
    ],
)
def test_what_a_backend_cannot_update_is_refused_with_the_mend(requested, device, moments, words):
    with pytest.raises(ValueError, match=words):
        check_optimizer_backend(requested, device, *moments)
    if device == "cpu":
        tensors = (torch.ones(4), torch.ones(4), torch.ones(4, dtype=moments[0]), torch.ones(4, dtype=moments[1]))
        with pytest.raises(ValueError, match=words):
            adamw_(*tensors, **SETTINGS._asdict(), backend=requested)
        assert all((each == 1).all() for each in tensors)


def test_what_is_not_there_is_refused_with_the_mend(monkeypatch):
    check_optimizer_backend("apex", "cuda")
    monkeypatch.setitem(sys.modules, "amp_C", None)
    with pytest.raises(ValueError, match=r"amp_C, is not installed.*github.com/NVIDIA/apex.*apex on PyPI is another"):
        check_optimizer_backend("apex", "cuda")
    monkeypatch.setattr(adamw_backends, "HAS_TRITON", False)
    with pytest.raises(ValueError, match="triton needs Triton: pip install"):
        check_optimizer_backend("triton", "cuda")
    for requested in ("triton", "cuda", "apex"):
        with pytest.raises(ValueError, match=r"computes in fp32, not in torch.float64: auto does"):
            check_optimizer_backend(requested, "cuda", *[torch.float64] * 3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CUDA code may be usable here")
def test_the_compiled_kernel_is_refused_where_it_cannot_be_launched():
    with pytest.raises(ValueError, match=r"the CUDA code of megalrps\._native cannot be used here"):
        check_optimizer_backend("cuda", "cuda")


def test_what_every_device_takes_is_not_refused():
    for device, kind in itertools.product(("cpu", "cuda"), (FP32, torch.float64)):
        check_optimizer_backend("torch", device, kind, kind, kind)
        check_optimizer_backend("auto", device, BF16, BF16, kind)


def test_what_is_chosen_is_said(monkeypatch):
    assert chosen_optimizer_backend("cpu")[0] == ("native" if IMPLEMENTATION == "native" else "reference")
    assert chosen_optimizer_backend("cuda", "auto", torch.float64)[0] == "reference"
    assert chosen_optimizer_backend("mps") == ("reference", "there is no kernel for mps")
    assert chosen_optimizer_backend("cuda", "apex") == ("apex", "asked for")
    monkeypatch.setattr(adamw_backends, "HAS_TRITON", False)
    assert chosen_optimizer_backend("cuda") == ("reference", "Triton is not installed: pip install 'megalrps[gpu]'")
    monkeypatch.setattr(adamw_backends, "HAS_TRITON", True)
    assert chosen_optimizer_backend("cuda")[0] == "triton"
    monkeypatch.setattr(adamw_backends, "cpu_missing", lambda: "not built")
    assert chosen_optimizer_backend("cpu") == ("reference", "not built")


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("full", [True, False])
def test_the_operation_keeps_its_contract(backend, full):
    given = operands(37, narrow=BF16 if full else None, found_inf=0.0 if full else None, scale=0.5 if full else None)
    opcheck(module._update, (*given, *SETTINGS, backend))


def test_on_fake_cuda_tensors_the_operation_computes_nothing():
    with FakeTensorMode():
        flat = [torch.empty(1000, device="cuda") for _ in range(4)]
        one = torch.empty((), device="cuda")
        adamw_(*flat, **SETTINGS._asdict(), gradient_scale=one, found_inf=one, narrow=flat[0].bfloat16())


@pytest.mark.parametrize("wrong", [torch.zeros(2), torch.zeros(1, dtype=torch.int32), torch.zeros(1, device="meta")])
def test_other_flags_are_refused(wrong):
    for function in (adamw_, adamw_reference_):
        with pytest.raises(ValueError, match="found_inf"):
            function(*(torch.ones(4) for _ in range(4)), **SETTINGS._asdict(), found_inf=wrong)
