"""The main command at other layouts: the single process's numbers, its checkpoints, and the flags that are refused."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from distributed_harness import run_ranks
from rank_pieces import Pieces, pieces, together
from tiny_job import (
    ENTRY,
    TinyData,
    checkpoints,
    command,
    differing,
    launch,
    make_data,
    metrics,
    opened,
    results,
    summary,
    tensors,
    trained,
    world_of_harness,
)

from megalrps.errors import InputError, RepeatedError
from megalrps.evaluation import report
from megalrps.model.transformer import SummedLoss, Transformer
from megalrps.training import loop
from megalrps.training.stability import NonFiniteError

HEADS = ("--num-attention-heads", "4", "--num-query-groups", "2")
TP2 = ("--tensor-model-parallel-size", "2")
TP2_SP = (*TP2, "--sequence-parallel")
TP4_SP = ("--tensor-model-parallel-size", "4", "--sequence-parallel")
LAST = "v2-00000010"


def _rank_trains(rank: int, arguments: list[str]) -> None:
    undrawn = SimpleNamespace(page="")
    with mock.patch.object(report, "write_report", lambda run, page: undrawn):
        trained(arguments, world_of_harness())


def _rank_loads(rank: int, arguments: list[str], name: str) -> Pieces:
    """What a checkpoint fills at another layout."""
    with opened(arguments, world_of_harness()) as run:
        run.load_first([name])
        return pieces(run.state.tensors().items())


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    """Two increments of few steps: forks at 2 and 7, releases at 5 and 10, 13 steps in all."""
    return make_data(tmp_path_factory.mktemp("two"), (5, 5))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, two: TinyData) -> Path:
    return trained(command(two, tmp_path_factory.mktemp("alone") / "run", *HEADS))


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory, two: TinyData) -> Path:
    """The directory of a run at tp 2 x dp 2; not to be written to."""
    directory = tmp_path_factory.mktemp("cut")
    run_ranks(directory / "rendezvous", 4, _rank_trains, command(two, directory / "run", *HEADS, *TP2_SP))
    return directory / "run"


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in metrics(run)]


def test_a_run_at_tp2_dp2_tells_what_a_single_process_tells(alone: Path, cut: Path):
    found, expected = results(cut), results(alone)
    assert losses(cut) == pytest.approx(losses(alone), rel=1e-4)
    norms = [[line["grad_norm"] for line in each["metrics"]] for each in (found, expected)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    assert found["checkpoints"] == expected["checkpoints"]
    for release, wanted in zip(summary(cut)["releases"], summary(alone)["releases"], strict=True):
        assert release["perplexity"] == pytest.approx(wanted["perplexity"], rel=1e-4)
    assert found["plan"] == expected["plan"]


PP2 = ("--pipeline-model-parallel-size", "2")
CP2 = ("--context-parallel-size", "2")
FULL = ("--recompute-granularity", "full", "--recompute-method", "uniform")
MORE: dict[str, tuple[int, tuple[str, ...]]] = {
    "tp2-pp2-dp2": (8, (*TP2_SP, *PP2)),
    "pp2-gpipe-cp2": (4, (*PP2, *CP2, "--pipeline-schedule", "gpipe")),
    "dp4-zero2-recomputed": (4, ("--data-parallel-sharding-strategy", "optim_grads", "--micro-batch-size", "1", *FULL)),
    "cp2-dp2-offloaded": (4, (*CP2, "--optimizer-cpu-offload", "--cpu-offloading-num-layers", "1")),
}


@pytest.mark.parametrize("layout", MORE)
def test_every_dimension_of_the_main_command_tells_what_a_single_process_tells(
    run_ranks, two: TinyData, alone: Path, tmp_path: Path, layout: str
):
    ranks, flags = MORE[layout]
    run_ranks(ranks, _rank_trains, command(two, tmp_path / "run", *HEADS, *flags))
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), rel=1e-4)
    for release, wanted in zip(summary(tmp_path / "run")["releases"], summary(alone)["releases"], strict=True):
        assert release["perplexity"] == pytest.approx(wanted["perplexity"], rel=1e-4)


def test_a_checkpoint_does_not_tell_the_layout_that_made_it(alone: Path, cut: Path):
    found, expected = tensors(cut, LAST), tensors(alone, LAST)
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: tensor.shape for name, tensor in expected.items()
    }
    for name, tensor in expected.items():
        if name.startswith("model."):
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-3 * float(tensor.abs().max()))


@pytest.mark.parametrize(("ranks", "layout"), [(4, TP4_SP), (4, ()), (2, TP2), (1, ())], ids=["tp4", "dp4", "tp2", "1"])
def test_any_layout_loads_the_bits_that_tp2_dp2_saved(
    run_ranks, two: TinyData, cut: Path, tmp_path: Path, ranks: int, layout: tuple[str, ...]
):
    (tmp_path / "run").mkdir()
    for entry in cut.iterdir():
        (tmp_path / "run" / entry.name).symlink_to(entry)
    whole = tensors(cut, LAST)
    assert any(name.startswith("optimizer.exp_avg_sq.") for name in whole)
    found = together(run_ranks(ranks, _rank_loads, command(two, tmp_path / "run", *HEADS, *layout), LAST))
    assert differing({name: torch.from_numpy(value) for name, value in found.items()}, whole) == []


def test_a_run_goes_on_at_any_other_layout(run_ranks, two: TinyData, alone: Path, tmp_path: Path):
    for increments, ranks, layout in ((1, 4, TP2), (2, 4, TP4_SP)):
        run_ranks(ranks, _rank_trains, command(two.first(increments), tmp_path / "run", *HEADS, *layout))
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), rel=1e-4)
    assert checkpoints(tmp_path / "run") == checkpoints(alone)


def test_bf16_learns_at_tp2(run_ranks, two: TinyData, alone: Path, tmp_path: Path):
    run_ranks(2, _rank_trains, command(two, tmp_path / "run", *HEADS, *TP2_SP, "--bf16"))
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), rel=0.02)
    kept = tensors(tmp_path / "run", LAST)
    assert {tensor.dtype for name, tensor in kept.items() if name != "optimizer.updates"} == {torch.float32}


def _rank_trains_on_nothing_at_update_3(rank: int, arguments: list[str]) -> tuple[int, str]:
    original, calls = Transformer.loss_of_logits, []

    def failing(self: Transformer, *args: Any) -> SummedLoss:
        calls.append(args)
        loss = original(self, *args)
        return SummedLoss(loss.total * float("nan"), loss.tokens) if rank == 1 and len(calls) == 3 else loss

    with mock.patch.object(Transformer, "loss_of_logits", failing), opened(arguments, world_of_harness()) as run:
        try:
            loop.train(run)
        except (NonFiniteError, RepeatedError) as error:
            return len(calls), str(error).partition(":")[0]
    raise AssertionError("the loss of one rank was lost")


def test_what_is_no_number_on_one_tensor_parallel_rank_stops_them_all(run_ranks, two: TinyData, tmp_path: Path):
    told = run_ranks(4, _rank_trains_on_nothing_at_update_3, command(two, tmp_path / "run", *HEADS, *TP2))
    assert told == [(3, "path v1, step 3")] * 4


def test_what_is_no_number_on_the_last_stage_stops_the_first_too(run_ranks, two: TinyData, tmp_path: Path):
    """Rank 1 of two has the loss, in eight micro-batches an update; the third of them all is the first update's."""
    flags = (*PP2, "--micro-batch-size", "1")
    told = run_ranks(2, _rank_trains_on_nothing_at_update_3, command(two, tmp_path / "run", *HEADS, *flags))
    assert [text for _, text in told] == ["path main, step 1"] * 2


def _rank_opens(rank: int, arguments: list[str]) -> str:
    try:
        with opened(arguments, world_of_harness()):
            return "opened"
    except InputError as error:
        return str(error)


REFUSALS: tuple[tuple[int, tuple[str, ...], str], ...] = (
    (2, ("--tensor-model-parallel-size", "3"), "--tensor-model-parallel-size 3 does not divide the 2 ranks"),
    (2, (*TP2, "--num-attention-heads", "1"), "--tensor-model-parallel-size 2 does not divide --num-attention-h"),
    (2, (*TP2_SP, "--seq-length", "15"), "--tensor-model-parallel-size 2 cut --seq-length 15 into 2"),
    (2, (*TP2, "--ffn-hidden-size", "63"), "does not divide --ffn-hidden-size 63"),
    (4, (*TP2, "--global-batch-size", "3"), "not a multiple of the 2 data-parallel ranks"),
    (2, (*TP2, "--world-size", "2"), "--world-size is for --dry-run"),
    (2, (*PP2, "--num-layers", "1"), "--num-layers 1 cannot fill 2 pipeline stages"),
    (2, (*PP2, "--micro-batch-size", "8"), "--pipeline-schedule 1f1b cannot run 1 micro-batches a step over 2"),
    (2, (*PP2, "--pipeline-schedule", "dualpipev", "--micro-batch-size", "4"), "cannot run 2 micro-batches"),
    (2, (*PP2, "--num-virtual-stages-per-pipeline-rank", "2"), "--pipeline-schedule 1f1b takes exactly 1"),
    (2, (*PP2, "--pipeline-model-parallel-layout", "Et|L"), "spells 1 layers, --num-layers is 2"),
    (2, (*CP2, "--seq-length", "18"), "--context-parallel-size 2 cut --seq-length 18 into 4 unequal parts"),
    (3, CP2, "--context-parallel-size 2 does not divide the 3 ranks"),
    (2, (*CP2, "--reset-attention-mask"), "--reset-attention-mask does not go with --context-parallel-size 2"),
    (2, (*CP2, "--reset-position-ids"), "--reset-position-ids does not go with --context-parallel-size 2"),
    (2, ("--bf16", "--fp16"), "--bf16 and --fp16"),
    (2, ("--recompute-granularity", "full"), "--recompute-method"),
)


def _rank_opens_each(rank: int, commands: list[list[str]]) -> list[str]:
    return [_rank_opens(rank, arguments) for arguments in commands]


@pytest.fixture(scope="module")
def refused(two: TinyData, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, tuple[str, ...]], list[str]]:
    """What every rank of a launch is told, by its ranks and flags; one launch of so many ranks asks for all."""
    place, told = tmp_path_factory.mktemp("refused"), {}
    for ranks in {ranks for ranks, _, _ in REFUSALS}:
        of_these = [flags for count, flags, _ in REFUSALS if count == ranks]
        commands = [command(two, place / f"run{ranks}-{at}", *flags) for at, flags in enumerate(of_these)]
        by_rank = run_ranks(place / f"rendezvous{ranks}", ranks, _rank_opens_each, commands)
        told |= {(ranks, flags): [of_rank[at] for of_rank in by_rank] for at, flags in enumerate(of_these)}
    assert not list(place.glob("run*")), "a refused launch has written something"
    return told


@pytest.mark.parametrize(("ranks", "flags", "named"), REFUSALS)
def test_what_cannot_be_cut_is_refused_by_all_ranks_before_anything_is_written(
    refused: dict[tuple[int, tuple[str, ...]], list[str]], ranks: int, flags: tuple[str, ...], named: str
):
    assert [named in told for told in refused[ranks, flags]] == [True] * ranks


def described(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    assert launch([*arguments, "--dry-run"]) == 0
    return capsys.readouterr().out


def test_a_dry_run_tells_the_layout_without_its_ranks(two: TinyData, tmp_path: Path, capsys, monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    arguments = command(two, tmp_path / "run", *HEADS)
    one = json.loads(described(capsys, [*arguments, "--json"]))
    cut = json.loads(described(capsys, [*arguments, *TP2_SP, "--world-size", "4", "--json"]))
    assert one["layout"] == {"pp": 1, "dp": 1, "cp": 1, "tp": 1}
    assert cut["layout"] == {"pp": 1, "dp": 2, "cp": 1, "tp": 2}
    (alone,), ranks = one["ranks"], cut["ranks"]
    assert [rank["coordinates"] for rank in ranks] == [
        {"pp": 0, "dp": dp, "cp": 0, "tp": tp} for dp in range(2) for tp in range(2)
    ]
    assert one["parameters"] == cut["parameters"] == alone["parameters"] < 2 * ranks[0]["parameters"]
    assert all(rank["bytes_total"] < alone["bytes_total"] / 2 for rank in ranks)
    assert set(alone["bytes_sent_per_step"].values()) == {0}
    assert min(rank["bytes_sent_per_step"][name] for rank in ranks for name in ("dp", "tp")) > 0
    assert "layout      dp 1 x tp 2" in described(capsys, [*arguments, *TP2])
    assert ENTRY.exists() and not (tmp_path / "run").exists()
