"""A run goes on at another world size or layout: the same tensors and samples; in one order of sums the same bits."""

import hashlib
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from counts import count, record
from distributed_harness import run_ranks
from rank_pieces import Found, Pieces, pieces, together
from tiny_job import ALONE, BATCH, TinyData, command, make_data, metrics, opened, tensors, world_of_harness

from megalrps.config import parse_config
from megalrps.errors import InputError, PreemptedError, RepeatedError
from megalrps.evaluation import report
from megalrps.parallel.world import World
from megalrps.paths.plan import Window
from megalrps.training import loop
from megalrps.training.loop import Loop
from megalrps.training.step import Batch

STEPS, HALF = 30, 15
HEADS = ("--num-attention-heads", "4", "--num-query-groups", "2")
TP2 = ("--tensor-model-parallel-size", "2", "--sequence-parallel")
PP2 = ("--pipeline-model-parallel-size", "2", "--micro-batch-size", "2")
STOPPED = ("--exit-interval", str(HALF))
IN_ORDER = count("steps with one order of sums", 10, 30)
UNORDERED = ("--micro-batch-size", "2", "--increment-steps", str(IN_ORDER))
ORDERED = (*UNORDERED, "--deterministic-reduction")
SHORT = ("--increment-steps", str(count("steps of a variant", 2, 30)))
MOST_DRIFT = 5e-4
"""Relative L2 distance of the parameters after 30 steps from those of one process, where sums come in other orders."""

Ids = dict[tuple[str, int], list[tuple[int, int]]]
"""By path and step: (increment, index in it) of the samples that one rank drew."""


@dataclass(frozen=True)
class Told:
    """What one rank knows of a launch: its place among those that share a batch out, and whether it has its own part
    of it; the tensors at the beginning and at the end, and the samples that it drew."""

    data_rank: int
    draws: bool
    loaded: Pieces
    left: Pieces
    ids: Ids


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def watched(arguments: list[str], world: World) -> Told:
    """Train until the end, or until the launch is asked to stop."""
    ids: Ids = {}
    at_first: list[Pieces] = []
    step, batch = Loop.step, Loop.batch

    def noting(self: Loop, segment: Any) -> None:
        if not at_first:
            at_first.append(pieces(self.state.tensors().items()))
        step(self, segment)

    def drawing(self: Loop, window: Window, now: int) -> Batch:
        drawn, indices, stream = batch(self, window, now), self._draw(window, now).indices(), self._stream(window)
        assert np.array_equal(drawn.tokens, stream.samples(indices))
        ids[str(self.state.path), now] = list(zip(*(each.tolist() for each in stream.locate(indices)), strict=True))
        return drawn

    undrawn = SimpleNamespace(page="")
    with (
        mock.patch.object(report, "write_report", lambda run, page: undrawn),
        mock.patch.object(Loop, "step", noting),
        mock.patch.object(Loop, "batch", drawing),
        opened(arguments, world) as run,
    ):
        try:
            loop.train(run)
        except (PreemptedError, RepeatedError):
            assert run.state.step == run.job.config.runtime.exit_interval
        mesh = run.mesh
        draws = mesh.tensor.rank == mesh.pipeline.rank == mesh.context.rank == 0
        return Told(mesh.data.rank, draws, at_first[0], pieces(run.state.tensors().items()), ids)


@dataclass(frozen=True)
class Launch:
    """So many ranks with these flags, in a directory of its own or in a copy of that of the launch ``after`` which."""

    ranks: int
    flags: tuple[str, ...] = ()
    after: str | None = None


VARIANTS: dict[str, tuple[tuple[int, int], tuple[str, ...]]] = {
    "three in a run": ((1, 4), ("--global-batch-size", "24")),
    "bf16, nothing sharded": ((1, 2), ("--bf16", "--data-parallel-sharding-strategy", "no_shard")),
    "fp16, offloaded, tied": (
        (1, 2),
        ("--fp16", "--optimizer-cpu-offload", "--no-untie-embeddings-and-output-weights"),
    ),
    "tensor parallel": ((2, 4), (*TP2, "--no-overlap-grad-reduce")),
}
"""Of ordered sums: on how many ranks, and the flags."""

LAUNCHES: dict[str, Launch] = {
    "straight": Launch(1),
    "dp2": Launch(2, STOPPED),
    "tp2": Launch(2, (*TP2, *STOPPED)),
    "pp2": Launch(2, (*PP2, *STOPPED)),
    "dp2 to 1": Launch(1, after="dp2"),
    "dp2 to 4": Launch(4, after="dp2"),
    "tp2 to 1": Launch(1, after="tp2"),
    "pp2 to 1": Launch(1, after="pp2"),
    "unordered": Launch(1, UNORDERED),
    "ordered": Launch(2, (*ORDERED, "--exit-interval", str(IN_ORDER // 2))),
    **{f"ordered, {ranks}": Launch(ranks, ORDERED) for ranks in (1, 2, 4)},
    **{f"ordered, 2 to {ranks}": Launch(ranks, ORDERED, after="ordered") for ranks in (1, 4)},
    **{
        f"{name}, {ranks}": Launch(ranks, (*ORDERED, *SHORT, "--ddp-bucket-size", str(1000 * ranks), *flags))
        for name, (worlds, flags) in VARIANTS.items()
        for ranks in worlds
    },
}


@dataclass(frozen=True)
class Launched:
    """What every rank of every launch tells, by the launch's name; ``place`` has their directories."""

    place: Path
    told: Mapping[str, list[Told]]

    def left(self, name: str) -> Found:
        """The tensors at the end of a launch."""
        return together(each.left for each in self.told[name])


def _rank_watches(rank: int, launches: list[list[str]]) -> list[Told]:
    return [watched(arguments, world_of_harness()) for arguments in launches]


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    """All launches; those of as many ranks in the same processes, whose start costs more than what they train."""
    place = tmp_path_factory.mktemp("launched")
    data = make_data(place / "data", (STEPS,))  # main to its fork at step 12, v1 from there to 30
    told: dict[str, list[Told]] = {}
    for ranks in (2, 4, 1):  # those of two are gone on with by the others
        named = {name: launch for name, launch in LAUNCHES.items() if launch.ranks == ranks}
        for name, launch in named.items():
            if launch.after is not None:
                shutil.copytree(place / launch.after, place / name)
        commands = [command(data, place / name, *HEADS, *launch.flags) for name, launch in named.items()]
        if ranks == 1:
            by_rank = [[watched(arguments, ALONE) for arguments in commands]]
        else:
            by_rank = run_ranks(place / f"rendezvous{ranks}", ranks, _rank_watches, commands, timeout=200)
        told.update(zip(named, map(list, zip(*by_rank, strict=True)), strict=True))
    return Launched(place, told)


def batches(told: Iterable[Told]) -> Ids:
    """The samples of every step's global batch, in its order."""
    whole: Ids = {}
    for rank in sorted((each for each in told if each.draws), key=lambda each: each.data_rank):
        for step, ids in rank.ids.items():
            whole.setdefault(step, []).extend(ids)
    return whole


def digest(named: Mapping[str, np.ndarray]) -> str:
    """sha256 over names and bytes."""
    told = hashlib.sha256()
    for name, value in sorted(named.items()):
        told.update(name.encode() + np.ascontiguousarray(value).tobytes())
    return told.hexdigest()


def drift(found: Found, expected: Found) -> float:
    """Relative L2 distance of all parameters together."""
    names = [name for name in expected if name.startswith("model.")]
    apart = sum(float(np.square(found[name].astype(np.float64) - expected[name]).sum()) for name in names)
    return float(np.sqrt(apart / sum(float(np.square(expected[name].astype(np.float64)).sum()) for name in names)))


@pytest.mark.parametrize("name", ["dp2 to 1", "dp2 to 4", "tp2 to 1", "pp2 to 1"])
def test_a_run_that_goes_on_elsewhere_has_the_tensors_and_draws_the_samples(launched: Launched, name: str):
    before, after = launched.told[str(LAUNCHES[name].after)], launched.told[name]
    planned = batches(launched.told["straight"])
    assert len(planned) == STEPS and all(len(ids) == BATCH for ids in planned.values())
    held, loaded = together(each.left for each in before), together(each.loaded for each in after)
    assert any(key.startswith("optimizer.exp_avg_sq.") for key in held)
    assert digest(loaded) == digest(held), "what was loaded is not what was held"
    assert batches(before) == {place: ids for place, ids in planned.items() if place[1] <= HALF}
    assert batches(after) == {place: ids for place, ids in planned.items() if place[1] > HALF}
    apart = drift(launched.left(name), launched.left("straight"))
    assert 0 < apart <= MOST_DRIFT
    record("F10", **{name: {"tensors": len(held), "steps after": STEPS - HALF, "relative_l2": apart}})


def test_with_one_order_of_sums_no_world_changes_a_bit(launched: Launched):
    """Undisturbed on 1, 2 and 4 ranks; stopped on 2 and gone on with on 1 and 4."""
    names = [name for name in LAUNCHES if name.startswith("ordered, ")]
    ends = {name: digest(launched.left(name)) for name in names}
    numbers = {
        name: [(line["step"], line["loss"], line["grad_norm"]) for line in metrics(launched.place / name)]
        for name in names
    }
    assert len(names) == 5 and len(numbers["ordered, 1"]) == IN_ORDER
    assert ends == dict.fromkeys(names, ends["ordered, 1"])
    assert numbers == dict.fromkeys(names, numbers["ordered, 1"]), "the losses or norms that were told differ"
    assert ends["ordered, 1"] != digest(launched.left("unordered")), "the order is the one without the option"
    kept = tensors(launched.place / "ordered, 2 to 4", f"v1-{IN_ORDER:08d}")
    assert digest({name: tensor.numpy() for name, tensor in kept.items()}) == ends["ordered, 1"]
    record("F10", ordered={"runs": len(ends), "different ends": len(set(ends.values())), "steps": IN_ORDER})


@pytest.mark.parametrize("variant", VARIANTS)
def test_neither_precision_nor_sharding_nor_buckets_bring_the_world_back(launched: Launched, variant: str):
    """``--ddp-bucket-size`` is another one in every world, too."""
    worlds, _ = VARIANTS[variant]
    first, second = (launched.left(f"{variant}, {ranks}") for ranks in worlds)
    assert digest(first) == digest(second)


REFUSALS: tuple[tuple[tuple[str, ...], int, str], ...] = (
    ((), 1, "give --micro-batch-size"),
    (("--micro-batch-size", "2", "--global-batch-size", "6"), 3, "takes 1, 2, 4, 8 ... data-parallel ranks, not 3"),
    (("--micro-batch-size", "1", "--pipeline-model-parallel-size", "2"), 2, "with --pipeline-model-parallel-size"),
    (("--micro-batch-size", "1", "--context-parallel-size", "2"), 2, "with --context-parallel-size"),
    (("--micro-batch-size", "1", "--data-parallel-sharding-strategy", "optim_grads"), 2, "strategy optim_grads"),
    (("--micro-batch-size", "1", "--optimizer-backend", "torch"), 1, "--optimizer-backend torch"),
    (("--micro-batch-size", "3"), 1, "--micro-batch-size 3 does not divide the 8 samples of a rank"),
)


@pytest.mark.parametrize(("flags", "ranks", "words"), REFUSALS)
def test_what_one_order_of_sums_does_not_go_with_is_refused(
    tmp_path: Path, flags: tuple[str, ...], ranks: int, words: str
):
    data = TinyData(("nothing is read of it",), ())
    config = parse_config(command(data, tmp_path / "run", "--deterministic-reduction", *flags))
    with pytest.raises(InputError, match=words):
        config.check(ranks)
