"""The optimizer over flat buffers: types of its state, where it lies, and what a loss scale does."""

from typing import Any

import pytest
import torch
from torch import nn

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


@pytest.mark.parametrize("value", [float("inf"), float("nan"), float("-inf")])
@pytest.mark.parametrize("scaling", [None, LossScaleOptions(hysteresis=1), LossScaleOptions(loss_scale=8.0)])
def test_gradients_that_are_no_numbers_update_nothing(scaling: LossScaleOptions | None, value: float):
    buffers, optimizer, _ = stepped(OptimizerOptions(), scaling)
    before = {name: tensor.clone() for name, tensor in {**masters(buffers), **dict(optimizer.named_state())}.items()}
    scale = optimizer.loss_scale
    buffers.buckets[0].gradient_views[0].view(-1)[0] = value
    assert not torch.isfinite(optimizer.step(RATE))
    after = {**masters(buffers), **dict(optimizer.named_state())}
    assert [name for name in before if not torch.equal(before[name], after[name]) and "loss_scale" not in name] == []
    halves = scaling is not None and scaling.loss_scale is None
    assert optimizer.loss_scale == (scale / 2 if halves and scale is not None else scale)


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
