"""Which samples an update draws: its window and its step decide, not the path, the horizon, the ranks or the passes."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from tiny_job import ALONE, BATCH, SEQUENCE_LENGTH, TinyData, command, opened, world_of_harness

from megalrps.data.increment import open_increment
from megalrps.data.stream import SampleStream
from megalrps.model.transformer import Transformer
from megalrps.parallel.group import Group
from megalrps.parallel.world import World
from megalrps.training import loop
from megalrps.training.loop import Loop
from megalrps.training.run import Run

SEED = 1234  # the default of --seed
TENSOR_PARALLEL = ("--tensor-model-parallel-size", "2")

Batches = dict[tuple[str, int], np.ndarray]


def drawn(arguments: list[str], world: World = ALONE) -> Batches:
    """Train, and return by path and step what this rank drew."""
    batches: Batches = {}
    original = Loop.batch

    def recording(self: Loop, window: Any, step: int) -> Any:
        batch = original(self, window, step)
        assert (self.state.path, step) not in batches, "an update was made twice"
        batches[str(self.state.path), step] = batch.tokens
        return batch

    with mock.patch.object(Loop, "batch", recording), opened(arguments, world) as run:
        loop.train(run)
    return batches


def _drawn_by_rank(rank: int, arguments: list[str]) -> Batches:
    return drawn(arguments, world_of_harness())


@pytest.fixture(scope="module")
def batches(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Batches:
    """What one process draws over the whole plan."""
    return drawn(command(data, tmp_path_factory.mktemp("drawn") / "run"))


def test_a_branch_and_the_main_path_draw_the_same_samples_where_they_overlap(batches: Batches):
    overlap = {(path, step) for path, step in batches if path != "main" and ("main", step) in batches}
    assert overlap == {("v1", step) for step in range(5, 11)} | {("v2", step) for step in range(14, 19)}
    for path, step in overlap:
        assert np.array_equal(batches[path, step], batches["main", step]), (path, step)


def test_an_update_draws_its_place_in_the_permuted_increment(batches: Batches, data: TinyData):
    for name, first, last in (("a", 1, 10), ("b", 11, 18), ("c", 19, 28)):
        prefix = data.increments["abc".index(name)]
        stream = SampleStream([open_increment(prefix)], SEQUENCE_LENGTH, SEED)
        for step in range(first, last + 1):
            places = np.arange(BATCH, dtype=np.int64) + (step - first) * BATCH
            for path in ("main", "v1", "v2", "v3"):
                if (path, step) in batches:
                    assert np.array_equal(batches[path, step], stream.samples(places)), (path, step)


def test_one_pass_over_an_increment_draws_every_sample_once(batches: Batches):
    samples = {step: batches["main" if ("main", step) in batches else "v3", step] for step in range(19, 29)}
    rows = np.concatenate(list(samples.values()))
    assert len(np.unique(rows, axis=0)) == len(rows) == 10 * BATCH


def test_the_horizon_and_the_paradigm_change_nothing(batches: Batches, data: TinyData, tmp_path: Path):
    shorter = drawn(command(data.first(1), tmp_path / "shorter", "--alpha", "0.2"))
    continual = drawn(command(data.first(2), tmp_path / "continual", "--paradigm", "cpt"))
    assert len(shorter) == 10 and len(continual) == 18
    for (_, step), tokens in (*shorter.items(), *continual.items()):
        assert np.array_equal(tokens, batches["main", step])


def test_from_scratch_draws_every_sample_of_the_union_once(data: TinyData, tmp_path: Path):
    scratch = drawn(command(data.first(2), tmp_path / "run", "--paradigm", "ptfs"))
    rows = np.concatenate([tokens for (path, _), tokens in scratch.items() if path == "v2"])
    assert len(np.unique(rows, axis=0)) == len(rows) == 18 * BATCH


def test_the_seed_changes_the_order_and_not_the_samples(batches: Batches, data: TinyData, tmp_path: Path):
    other = drawn(command(data.first(1), tmp_path / "run", "--paradigm", "cpt", "--seed", "1"))
    reseeded = np.concatenate([other["v1", step] for step in range(1, 11)])
    usual = np.concatenate([batches["main", step] for step in range(1, 11)])
    assert not np.array_equal(reseeded, usual)
    assert np.array_equal(np.unique(reseeded, axis=0), np.unique(usual, axis=0))


def at(run: Run, rank: int, size: int) -> Loop:
    """The loop of data-parallel rank ``rank`` of ``size``."""
    return Loop(replace(run, mesh=replace(run.mesh, data=Group(rank, size, torch.device("cpu"), None))))


@pytest.mark.parametrize("size", [2, 4, 8])
def test_the_shares_of_the_ranks_are_the_batch_cut_in_order(data: TinyData, tmp_path: Path, size: int):
    with opened(command(data, tmp_path / "run")) as run:
        plan = run.job.plan
        ranks = [at(run, rank, size) for rank in range(size)]
        for path, step in (("main", 1), ("main", 11), ("v2", 18), ("v3", 28)):
            window = plan.window_at(path, step)
            whole, shares = Loop(run).batch(window, step), [rank.batch(window, step) for rank in ranks]
            assert {len(share.tokens) for share in shares} == {BATCH // size}
            assert np.array_equal(np.concatenate([share.tokens for share in shares]), whole.tokens)
            assert {share.global_tokens for share in shares} == {BATCH * SEQUENCE_LENGTH}


def test_two_ranks_draw_the_batches_of_one_process(run_ranks, batches: Batches, data: TinyData, tmp_path: Path):
    first, second = run_ranks(2, _drawn_by_rank, command(data, tmp_path / "run"))
    assert first.keys() == second.keys() == batches.keys()
    for key, whole in batches.items():
        assert np.array_equal(np.concatenate([first[key], second[key]]), whole)


def test_ranks_that_share_every_matrix_draw_the_same_samples(
    run_ranks, batches: Batches, data: TinyData, tmp_path: Path
):
    for drawn_by_rank in run_ranks(2, _drawn_by_rank, command(data, tmp_path / "run", *TENSOR_PARALLEL)):
        assert drawn_by_rank.keys() == batches.keys()
        assert all(np.array_equal(drawn_by_rank[key], whole) for key, whole in batches.items())


@pytest.mark.parametrize("micro_batch", [1, 2, 4, 8])
def test_the_passes_of_an_update_are_the_batch_cut_in_order(
    batches: Batches, data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro_batch: int
):
    passes: list[tuple[np.ndarray, np.ndarray]] = []
    forward, loss = Transformer.forward, Transformer.loss_of_logits
    inputs_of: list[np.ndarray] = []

    def entering(self: Transformer, inputs: torch.Tensor, *told: Any) -> Any:
        inputs_of.append(inputs.numpy().copy())
        return forward(self, inputs, *told)

    def leaving(self: Transformer, logits_BSV: torch.Tensor, labels_BS: torch.Tensor, mask: Any = None) -> Any:
        passes.append((inputs_of[-1], labels_BS.numpy().copy()))
        return loss(self, logits_BSV, labels_BS, mask)

    monkeypatch.setattr(Transformer, "forward", entering)
    monkeypatch.setattr(Transformer, "loss_of_logits", leaving)
    flags = ("--micro-batch-size", str(micro_batch), "--increment-steps", "2", "--alpha", "0.5")
    with opened(command(TinyData(data.increments[:1], ()), tmp_path / "run", *flags)) as run:
        loop.train(run)
    assert [len(inputs) for inputs, _ in passes] == [micro_batch] * (2 * BATCH // micro_batch)
    drawn_tokens = np.concatenate([batches["main", 1], batches["main", 2]])
    assert np.array_equal(np.concatenate([inputs for inputs, _ in passes]), drawn_tokens[:, :-1])
    assert np.array_equal(np.concatenate([labels for _, labels in passes]), drawn_tokens[:, 1:])
