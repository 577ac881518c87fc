"""Numbers that are none stop a run before they are saved; bfloat16 changes what is computed with, not what is kept."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from tiny_job import TinyData, checkpoints, command, differing, metrics, opened, results, tensors, world_of_harness

from megalrps.errors import RepeatedError
from megalrps.model.transformer import SummedLoss, Transformer
from megalrps.training import loop
from megalrps.training.stability import NonFiniteError


def train(arguments: list[str]) -> None:
    with opened(arguments) as run:
        loop.train(run)


@pytest.mark.parametrize(
    ("update", "where", "saved"),
    [
        (4, "path main, step 4", ("main-00000002", "main-00000003")),
        (6, "path v1, step 6", ("main-00000002", "main-00000003", "main-00000004", "v1-00000005")),
    ],
    ids=["on the way to a fork", "in a branch"],
)
def test_a_loss_that_is_no_number_stops_the_run_and_is_not_saved(
    data: TinyData, undisturbed: Path, tmp_path: Path, update: int, where: str, saved: tuple[str, ...]
):
    arguments = command(data, tmp_path / "run", "--save-interval", "1")
    original, results_seen = loop.train_step, []

    def failing(*args: Any, **kwargs: Any) -> Any:
        results_seen.append(original(*args, **kwargs))
        return replace(results_seen[-1], loss=float("nan")) if len(results_seen) == update else results_seen[-1]

    with mock.patch.object(loop, "train_step", failing), pytest.raises(NonFiniteError, match=f"{where}: loss nan"):
        train(arguments)
    assert len(metrics(tmp_path / "run")) == len(results_seen) - 1 == update - 1
    assert checkpoints(tmp_path / "run") == saved
    train(arguments)
    for name in ("main-00000022", "v1-00000010", "v2-00000018", "v3-00000028"):
        assert differing(tensors(tmp_path / "run", name), tensors(undisturbed, name)) == []


def test_an_exploding_run_says_what_to_do(data: TinyData, tmp_path: Path):
    with pytest.raises(NonFiniteError, match=r"nothing of this step was saved.* lower --lr .* new --save"):
        train(command(data, tmp_path / "run", "--lr", "1e30"))
    assert checkpoints(tmp_path / "run") == ()


def _rank_trains_on_nothing_at_update_3(rank: int, arguments: list[str]) -> tuple[int, str]:
    original, calls = Transformer.loss_of_logits, []

    def failing(self: Transformer, *args: Any) -> SummedLoss:
        calls.append(args)
        loss = original(self, *args)
        return SummedLoss(loss.total * float("inf"), loss.tokens) if rank == 1 and len(calls) == 3 else loss

    with mock.patch.object(Transformer, "loss_of_logits", failing), opened(arguments, world_of_harness()) as run:
        try:
            loop.train(run)
        except (NonFiniteError, RepeatedError) as error:
            return len(calls), str(error)
    raise AssertionError("the loss of one rank was lost")


def test_an_infinite_loss_of_one_rank_stops_them_all_at_the_same_update(run_ranks, data: TinyData, tmp_path: Path):
    first, second = run_ranks(2, _rank_trains_on_nothing_at_update_3, command(data, tmp_path / "run"))
    assert first == second and first[0] == 3
    assert "path main, step 3" in first[1]


def test_fp16_learns_and_leaves_out_the_updates_that_overflow(data: TinyData, undisturbed: Path, tmp_path: Path):
    """From a scale that overflows soon: it is halved, the run goes on, and a fork goes on from the main path's."""
    scale = ("--initial-loss-scale", "1048576", "--hysteresis", "1", "--loss-scale-window", "4")
    train(command(data, tmp_path / "run", "--fp16", *scale))
    lines, exact = metrics(tmp_path / "run"), results(undisturbed)["metrics"]
    skipped = [place for place, line in enumerate(lines) if line["grad_norm"] is None]
    assert 0 < len(skipped) < len(lines) / 2
    assert all(lines[place + 1]["loss_scale"] == lines[place]["loss_scale"] / 2 for place in skipped)
    assert any(later["loss_scale"] == 2 * line["loss_scale"] for line, later in itertools.pairwise(lines))
    assert lines[-1]["loss"] < 0.75 * lines[0]["loss"]
    assert lines[0]["loss"] == pytest.approx(exact[0]["loss"], rel=1e-3)
    assert tensors(tmp_path / "run", "v3-00000028")["optimizer.updates"] < 28
    branch, main = (next(x for x in lines if (x["path"], x["step"]) == (path, 5)) for path in ("v1", "main"))
    assert (branch["loss_scale"], branch["grad_norm"]) == (main["loss_scale"], main["grad_norm"])


def test_bf16_learns_and_keeps_fp32_weights(data: TinyData, undisturbed: Path, tmp_path: Path):
    train(command(data, tmp_path / "run", "--bf16"))
    lines, exact = metrics(tmp_path / "run"), results(undisturbed)["metrics"]
    assert lines[-1]["loss"] < 0.6 * lines[0]["loss"]
    assert [line["loss"] for line in lines] != [line["loss"] for line in exact], "nothing was rounded to bfloat16"
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in exact], rel=0.02)
    kept = tensors(tmp_path / "run", "v3-00000028")
    assert {tensor.dtype for name, tensor in kept.items() if name != "optimizer.updates"} == {torch.float32}
