"""One update: the gradient of the global mean loss, however it is cut, and the AdamW that torch has too."""

import numpy as np
import pytest
import torch
from tiny_job import BATCH, SEQUENCE_LENGTH, world_of_harness

from megalrps.model.config import ModelConfig
from megalrps.model.initialisation import initialise_
from megalrps.model.transformer import Transformer
from megalrps.parallel.buffers import FlatBuffers
from megalrps.parallel.layout import Layout
from megalrps.parallel.mesh import Mesh, alone, make_mesh
from megalrps.training.engine import Engine
from megalrps.training.optimizer import Optimizer
from megalrps.training.options import OptimizerOptions
from megalrps.training.state import TrainState
from megalrps.training.step import Batch, StepResult, forward_backward, train_step

CONFIG = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=2, ffn_hidden_size=64, vocab_size=64)
CLIP = 0.05
UPDATES, RATE = 5, 1e-2
ALONE = alone(torch.device("cpu"))


def double_model() -> Transformer:
    model = Transformer(CONFIG).double()
    initialise_(model, CONFIG, seed=7)
    return model


def double_state(mesh: Mesh = ALONE, *, micro_batch: int = BATCH, clip_grad: float = CLIP) -> TrainState:
    """A state in float64, where a wrong sum cannot hide behind rounding."""
    torch.set_num_threads(1)
    model = double_model()
    buffers = FlatBuffers(model, mesh=mesh, sharding="no_shard")
    engine = Engine({0: model}, mesh, micro_batch_size=micro_batch, sequence_length=SEQUENCE_LENGTH)
    return TrainState(engine, buffers, Optimizer(buffers, OptimizerOptions(clip_grad=clip_grad)))


def global_batch(step: int) -> np.ndarray:
    generator = np.random.default_rng(step)
    return generator.integers(0, CONFIG.vocab_size, size=(BATCH, SEQUENCE_LENGTH + 1))


def share(step: int, mesh: Mesh = ALONE) -> Batch:
    size, rank = BATCH // mesh.data.size, mesh.data.rank
    return Batch(global_batch(step)[rank * size : (rank + 1) * size], BATCH * SEQUENCE_LENGTH)


def updated(mesh: Mesh, micro_batch: int) -> tuple[dict[str, torch.Tensor], list[StepResult]]:
    """The tensors after UPDATES updates, and what each of them told."""
    state = double_state(mesh, micro_batch=micro_batch)
    results = [train_step(state, share(step, mesh), learning_rate=RATE, mesh=mesh) for step in range(UPDATES)]
    return {name: tensor.clone() for name, tensor in state.tensors().items()}, results


def _rank_updates(rank: int, micro_batch: int) -> tuple[dict[str, np.ndarray], list[StepResult]]:
    found, results = updated(make_mesh(Layout(dp=2), world_of_harness()), micro_batch)
    return {name: tensor.numpy() for name, tensor in found.items()}, results  # a tensor would travel by shared memory


def mean_loss(model: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def test_the_loss_and_the_gradient_are_those_of_the_mean_over_the_batch():
    state, model = double_state(), double_model()
    loss = forward_backward(state, share(0), ALONE)
    expected = mean_loss(model, torch.from_numpy(global_batch(0)))
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)  # the reported loss is fp32
    wanted = dict(model.named_parameters())
    for name, gradient in state.buffers.named_gradients():
        torch.testing.assert_close(gradient, wanted[name].grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_gradients_do_not_depend_on_the_size_of_a_pass(micro_batch: int):
    whole, cut = double_state(), double_state(micro_batch=micro_batch)
    forward_backward(whole, share(0), ALONE)
    forward_backward(cut, share(0), ALONE)
    for expected, found in zip(whole.buffers.buckets, cut.buffers.buckets, strict=True):
        scale = expected.gradients.abs().max()
        assert scale > 1e-3
        assert (found.gradients - expected.gradients).abs().max() <= 1e-12 * scale


def test_gradients_of_an_earlier_update_are_gone():
    state, fresh = double_state(micro_batch=2), double_state(micro_batch=2)
    forward_backward(state, share(1), ALONE)
    forward_backward(state, share(0), ALONE)
    forward_backward(fresh, share(0), ALONE)
    for found, expected in zip(state.buffers.buckets, fresh.buffers.buckets, strict=True):
        assert torch.equal(found.gradients, expected.gradients)


def test_updates_are_those_of_torchs_adamw_behind_torchs_clipping():
    found, results = updated(ALONE, BATCH)
    model = double_model()
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), eps=1e-8)
    for step, result in enumerate(results):
        reference.zero_grad()
        mean_loss(model, torch.from_numpy(global_batch(step))).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        assert result.gradient_norm == pytest.approx(norm.item(), rel=1e-6)
        assert result.gradient_norm > CLIP, "the threshold must clip, or the test says nothing about clipping"
        reference.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[f"model.{name}"], parameter.detach(), rtol=0, atol=1e-12)
    assert found["optimizer.updates"].item() == UPDATES


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_two_ranks_make_the_updates_of_one_process(run_ranks, micro_batch: int):
    expected, told = updated(ALONE, BATCH)
    by_rank = run_ranks(2, _rank_updates, micro_batch)
    assert all(result.gradient_norm > CLIP for result in told)
    for found, results in by_rank:
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            np.testing.assert_allclose(found[name], tensor.numpy(), rtol=1e-12, atol=1e-12)
        for here, there in zip(results, told, strict=True):
            assert here.loss == pytest.approx(there.loss, rel=1e-6)
            assert here.gradient_norm == pytest.approx(there.gradient_norm, rel=1e-6)
    first, second = (found for found, _ in by_rank)
    assert all(np.array_equal(first[name], second[name]) for name in first), "the ranks have drifted apart"


def test_a_threshold_of_zero_never_clips():
    unclipped, clipped = double_state(clip_grad=0.0), double_state()
    results = [train_step(state, share(0), learning_rate=RATE, mesh=ALONE) for state in (unclipped, clipped)]
    assert results[0] == results[1], "the norm that is told is the one before clipping"
    for whole, scaled in zip(unclipped.optimizer.exp_avg, clipped.optimizer.exp_avg, strict=True):
        torch.testing.assert_close(scaled, whole * CLIP / results[0].gradient_norm, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("loss", "norm"), [(float("nan"), 1.0), (2.0, float("inf")), (float("-inf"), 1.0)])
def test_figures_that_are_no_numbers_are_told(loss: float, norm: float):
    assert StepResult(2.0, 1.0).is_finite
    assert not StepResult(loss, norm).is_finite
    assert StepResult(loss, norm, skipped=True).is_finite == np.isfinite(loss)


@pytest.mark.parametrize(("factor", "updates"), [(1e100, 1), (float("inf"), 0)])
def test_whether_a_step_counts_is_decided_by_the_norm_that_is_told(
    monkeypatch: pytest.MonkeyPatch, factor: float, updates: int
):
    """In fp64 a norm of 1e100 is a number, and the update with what was clipped for it is one."""
    state = double_state()
    finish = FlatBuffers.finish_gradients

    def overflowing(buffers: FlatBuffers) -> None:
        finish(buffers)
        for bucket in buffers.buckets:
            bucket.gradients.mul_(factor)

    monkeypatch.setattr(FlatBuffers, "finish_gradients", overflowing)
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    result = train_step(state, share(0), learning_rate=RATE, mesh=ALONE)
    assert result.is_finite == bool(updates) and not result.skipped
    assert state.optimizer.updates.item() == updates
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.tensors().items()) == (not updates)
