"""The optimizer over flat buffers: types of its state, where it lies, and what a loss scale does."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megalrps.errors import InputError
from megalrps.model.layers import Linear
from megalrps.parallel.buffers import FlatBuffers
from megalrps.training.loss_scale import LossScale
from megalrps.training.optimizer import Optimizer
from megalrps.training.options import LossScaleOptions, OptimizerOptions, TrainingOptions

RATE = 1e-2


def module() -> nn.Module:
    torch.manual_seed(3)
    made = nn.Sequential(Linear(7, 9, None, None), nn.LayerNorm(9), Linear(9, 3, None, None))
    nn.init.normal_(made[0].weight)
    nn.init.normal_(made[2].weight)
    return made


def stepped(
    options: OptimizerOptions, scaling: LossScaleOptions | None = None, updates: int = 4, **buffers: Any
) -> tuple[FlatBuffers, Optimizer, list[float]]:
    """A model after updates with gradients that depend on no parameter, and the norms that were told."""
    held = FlatBuffers(module(), **buffers)
    optimizer, norms = Optimizer(held, options, scaling), []
    for step in range(updates):
        held.begin(1)
        torch.manual_seed(step)
        for bucket in held.buckets:
            for view in bucket.gradient_views:
                view.normal_().mul_(optimizer.loss_scale or 1.0)
        held.finish_gradients()
        norms.append(optimizer.step(RATE).item())
    return held, optimizer, norms


def masters(buffers: FlatBuffers) -> dict[str, torch.Tensor]:
    return dict(buffers.named_masters())


def test_narrow_parameters_change_nothing_in_their_masters():
    options = OptimizerOptions(clip_grad=0.5)
    wide, _, norms = stepped(options, bucket_size=1)
    narrow, _, same = stepped(options, bucket_size=1, compute_dtype=torch.bfloat16)
    assert norms == same and min(norms) > options.clip_grad
    assert all(torch.equal(value, masters(narrow)[name]) for name, value in masters(wide).items())
    for bucket in narrow.buckets:
        assert torch.equal(bucket.parameters, bucket.master.to(bucket.parameters.dtype))
    assert any(bucket.parameters.dtype == torch.bfloat16 for bucket in narrow.buckets)


@pytest.mark.parametrize("compute", [None, torch.bfloat16])
def test_an_offloaded_optimizer_makes_the_same_updates(compute: torch.dtype | None):
    options = OptimizerOptions()
    here, _, _ = stepped(options, compute_dtype=compute)
    offloaded, _, _ = stepped(options, compute_dtype=compute, offload=True)
    assert all(torch.equal(value, masters(offloaded)[name]) for name, value in masters(here).items())
    for one, other in zip(here.buckets, offloaded.buckets, strict=True):
        assert torch.equal(one.parameters, other.parameters)


@pytest.mark.gpu
@pytest.mark.parametrize("compute", [None, torch.bfloat16])
def test_an_offloaded_optimizer_keeps_its_state_on_the_host(compute: torch.dtype | None):
    made = module().cuda()
    buffers = FlatBuffers(made, compute_dtype=compute, offload=True)
    optimizer = Optimizer(buffers, OptimizerOptions())
    before = masters(buffers)["0.weight"].clone()
    buffers.begin(1)
    for bucket in buffers.buckets:
        bucket.gradients.fill_(0.5)
    buffers.finish_gradients()
    optimizer.step(RATE)
    assert all(not moment.is_cuda for moment in (*optimizer.exp_avg, *optimizer.exp_avg_sq))
    after = masters(buffers)["0.weight"]
    assert not after.is_cuda and not torch.equal(after, before)
    assert made[0].weight.is_cuda and torch.equal(made[0].weight.cpu(), after.to(made[0].weight.dtype))


@pytest.mark.parametrize(("first", "second"), [("bf16", "fp32"), ("fp32", "bf16"), ("bf16", "bf16")])
def test_moments_are_kept_as_stated_and_follow_those_of_fp32(first: Any, second: Any):
    exact, wide, _ = stepped(OptimizerOptions())
    rough, kept, _ = stepped(OptimizerOptions(exp_avg_dtype=first, exp_avg_sq_dtype=second))
    types = {"fp32": torch.float32, "bf16": torch.bfloat16}
    assert {moment.dtype for moment in kept.exp_avg} == {types[first]}
    assert {moment.dtype for moment in kept.exp_avg_sq} == {types[second]}
    moved = RATE * 4  # what four updates of Adam move a parameter by, at most
    for name, value in masters(exact).items():
        assert 0 < (masters(rough)[name] - value).abs().max() < 0.05 * moved
    assert wide.exp_avg[0].dtype == torch.float32


def test_moments_of_an_fp64_model_are_fp64():
    optimizer = Optimizer(FlatBuffers(module().double()), OptimizerOptions())
    assert {moment.dtype for moment in (*optimizer.exp_avg, *optimizer.exp_avg_sq)} == {torch.float64}


def test_a_scale_that_is_a_power_of_two_changes_no_bit():
    plain, _, norms = stepped(OptimizerOptions(clip_grad=0.5))
    scaled, optimizer, told = stepped(OptimizerOptions(clip_grad=0.5), LossScaleOptions(initial_loss_scale=4096.0))
    assert told == norms and optimizer.loss_scale == 4096.0
    assert all(torch.equal(value, masters(scaled)[name]) for name, value in masters(plain).items())


POLICIES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp64": {"wide": torch.float64},
    "bf16": {"compute_dtype": torch.bfloat16},
    "bf16 moments": {"compute_dtype": torch.bfloat16, "moments": "bf16"},
    "fp16": {"compute_dtype": torch.float16, "scaling": LossScaleOptions(hysteresis=1)},
    "fp16, constant scale": {"compute_dtype": torch.float16, "scaling": LossScaleOptions(loss_scale=8.0)},
    "offloaded": {"compute_dtype": torch.bfloat16, "offload": True, "scaling": LossScaleOptions(hysteresis=1)},
}


CHOICES = {"moments": "fp32", "scaling": None, "wide": torch.float32}
"""What a policy says beside the arguments of FlatBuffers, and what it is where it does not."""


def begun(
    wide: torch.dtype = torch.float32,
    moments: Any = "fp32",
    scaling: LossScaleOptions | None = None,
    clip_grad: float = 1.0,
    backend: Any = "auto",
    **buffers: Any,
) -> Optimizer:
    """A model in one of the precisions that there are, with an optimizer."""
    options = OptimizerOptions(exp_avg_dtype=moments, exp_avg_sq_dtype=moments, clip_grad=clip_grad)
    return Optimizer(FlatBuffers(module().to(wide), **buffers), options, scaling, backend)


def take_step(optimizer: Optimizer, seed: int, value: float | None = None) -> Tensor:
    """A step with gradients that ``seed`` decides; ``value`` is put into one of them."""
    optimizer.buffers.begin(1)
    generator = torch.Generator().manual_seed(seed)
    for bucket in optimizer.buffers.buckets:
        for view in bucket.gradient_views:
            view.normal_(generator=generator).mul_(optimizer.loss_scale or 1.0)
    optimizer.buffers.finish_gradients()
    if value is not None:
        optimizer.buffers.buckets[0].gradient_views[0].view(-1)[0] = value
    return optimizer.step(RATE)


def everything(optimizer: Optimizer) -> list[Tensor]:
    """The memory of all that a step may change, apart from the scale: bytes, so that a NaN equals itself."""
    flats = [each for bucket in optimizer.buffers.buckets for each in (bucket.master, bucket.parameters)]
    flats += [*optimizer.exp_avg, *optimizer.exp_avg_sq]
    return [each.detach().clone().view(torch.uint8) for each in flats] + [optimizer.updates.clone()]


@pytest.mark.parametrize("value", [float("inf"), float("nan"), float("-inf")])
@pytest.mark.parametrize("policy", POLICIES)
def test_gradients_that_are_no_numbers_leave_every_bit(policy: str, value: float):
    optimizer = begun(**POLICIES[policy])
    take_step(optimizer, seed=0)
    before, scale = everything(optimizer), optimizer.loss_scale
    assert not torch.isfinite(take_step(optimizer, seed=1, value=value))
    assert all(torch.equal(one, other) for one, other in zip(before, everything(optimizer), strict=True))
    halves = optimizer.scale is not None and "constant" not in policy
    assert optimizer.loss_scale == (scale / 2 if halves and scale is not None else scale)
    assert torch.isfinite(take_step(optimizer, seed=2)) and int(optimizer.updates) == 2


@pytest.mark.parametrize("policy", POLICIES)
def test_a_step_that_is_left_out_is_as_if_it_had_never_been(policy: str):
    """The bias correction of the next update too follows the count of updates."""
    policy_without_scale = {**POLICIES[policy], "scaling": None}
    straight, disturbed = begun(**policy_without_scale), begun(**policy_without_scale)
    for seed in range(3):
        take_step(straight, seed)
        take_step(disturbed, seed)
        take_step(disturbed, seed=9, value=float("nan"))
    pairs = zip(everything(straight), everything(disturbed), strict=True)
    assert int(disturbed.updates) == 3 and all(torch.equal(one, other) for one, other in pairs)


def test_a_step_is_settled_once_and_by_whoever_needs_to_know():
    options = LossScaleOptions(initial_loss_scale=16.0, loss_scale_window=100, hysteresis=1)
    told, asked = begun(scaling=options), begun(scaling=options)
    for optimizer in (told, asked):
        take_step(optimizer, seed=0)
    told.settle(True)
    told.settle(False)
    told.settle()
    assert int(told.updates) == int(asked.updates) == 1 and told.loss_scale == asked.loss_scale == 16
    take_step(asked, seed=1)
    assert dict(asked.named_state())["updates"] == 2
    take_step(asked, seed=1, value=float("inf"))
    assert asked.loss_scale == 8 and int(asked.updates) == 2
    take_step(asked, seed=1)
    asked.reset()
    assert int(asked.updates) == 0 and asked.loss_scale == 16


def test_the_backend_is_the_one_asked_for():
    ours, torchs = begun(), begun(backend="torch")
    for optimizer in (ours, torchs):
        take_step(optimizer, seed=0)
    pairs = list(zip(ours.buffers.buckets, torchs.buffers.buckets, strict=True))
    assert any(not torch.equal(one.master, other.master) for one, other in pairs), "the same code made both"
    for one, other in pairs:
        torch.testing.assert_close(one.master, other.master, rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match="--optimizer-backend triton updates tensors on a CUDA device"):
        take_step(begun(backend="triton"), seed=0)


@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy != "offloaded"])
def test_only_who_settles_a_step_waits_for_the_device(policy: str):
    """On meta tensors, whose numbers are never there for the host: to ask for one, or for a copy, is an error."""
    options = dict(POLICIES[policy])
    kept, scaling, wide = (options.pop(key, default) for key, default in CHOICES.items())
    buffers = FlatBuffers(module().to("meta", wide), **options)
    optimizer = Optimizer(buffers, OptimizerOptions(exp_avg_dtype=kept, exp_avg_sq_dtype=kept), scaling)
    assert optimizer.step(RATE).is_meta
    with pytest.raises(RuntimeError, match="cannot be called on meta tensors"):
        optimizer.settle()
    optimizer.settle(True)
    assert optimizer.step(RATE).is_meta and int(optimizer._updates) == 1


def followed(options: LossScaleOptions, outcomes: str) -> list[float]:
    """The scale after each update; o: an overflow."""
    scale, found = LossScale(options), []
    for outcome in outcomes:
        scale.update(outcome != "o")
        found.append(scale.value)
    return found


def test_the_scale_follows_the_overflows():
    options = LossScaleOptions(initial_loss_scale=16.0, min_loss_scale=2.0, loss_scale_window=3, hysteresis=2)
    assert followed(options, "...") == [16, 16, 32]
    assert followed(options, "o") == [16], "the first overflow is forgiven"
    assert followed(options, "o.o") == [16, 16, 8], "good updates between do not forgive another"
    assert followed(options, "ooo") == [16, 8, 4], "once forgiveness is used up each one halves"
    assert followed(options, "oooooo") == [16, 8, 4, 2, 2, 2]
    assert followed(options, "..o...") == [16, 16, 16, 16, 16, 32], "good updates count from the last overflow on"
    assert followed(options, "oo...o") == [16, 8, 8, 8, 16, 16], "growing forgives again"
    assert followed(LossScaleOptions(loss_scale=7.0), "..oo") == [7] * 4


def test_the_scale_goes_on_where_its_state_was_saved():
    options = LossScaleOptions(initial_loss_scale=16.0, loss_scale_window=3, hysteresis=2)
    _, first, _ = stepped(OptimizerOptions(), options, updates=2)
    assert first.scale is not None
    _, second, _ = stepped(OptimizerOptions(), options, updates=0)
    saved = dict(first.named_state())
    for name, tensor in second.named_state():
        tensor.copy_(saved[name])
    assert second.scale is not None
    for each in (first.scale, second.scale):
        each.update(True)
    assert first.loss_scale == second.loss_scale == 32
    second.reset()
    assert second.loss_scale == 16 and int(second.updates) == 0


def test_without_fp16_there_is_no_scale_to_save():
    _, optimizer, _ = stepped(OptimizerOptions(), updates=1)
    assert optimizer.loss_scale is None
    assert not [name for name, _ in optimizer.named_state() if "loss_scale" in name]


@pytest.mark.parametrize(
    ("options", "fp16", "words"),
    [
        (LossScaleOptions(loss_scale=2.0), False, "--loss-scale needs --fp16"),
        (LossScaleOptions(loss_scale=0.0), True, "--loss-scale 0.0"),
        (LossScaleOptions(initial_loss_scale=float("inf")), True, "--initial-loss-scale inf"),
        (LossScaleOptions(min_loss_scale=-1.0), True, "--min-loss-scale -1.0"),
        (LossScaleOptions(initial_loss_scale=1.0, min_loss_scale=2.0), True, "below --min-loss-scale"),
        (LossScaleOptions(loss_scale_window=0), True, "--loss-scale-window 0"),
        (LossScaleOptions(hysteresis=0), True, "--hysteresis 0"),
    ],
)
def test_scales_that_are_none_are_refused(options: LossScaleOptions, fp16: bool, words: str):
    with pytest.raises(InputError, match=words):
        options.check(fp16)


def test_one_precision_is_chosen():
    with pytest.raises(InputError, match="--bf16 and --fp16"):
        TrainingOptions(bf16=True, fp16=True).check(1)
    assert TrainingOptions().compute_dtype is None
    assert TrainingOptions(bf16=True).compute_dtype == torch.bfloat16
    assert TrainingOptions(fp16=True).compute_dtype == torch.float16
