"""Runs that replay older increments and draw from blends: which samples they see, and what they count."""

from collections import Counter
from contextlib import suppress
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from tiny_job import BATCH, SEQUENCE_LENGTH, TinyData, command, launch, opened

from megalrps.checkpoint.lineage import read_lineage
from megalrps.checkpoint.record import CheckpointRecord
from megalrps.checkpoint.store import Store
from megalrps.data.apportionment import Apportionment
from megalrps.data.blend import blend
from megalrps.data.increment import open_increment
from megalrps.data.stream import SampleStream
from megalrps.errors import PreemptedError
from megalrps.training import loop
from megalrps.training.describe import describe_size
from megalrps.training.loop import Loop
from megalrps.training.prepare import Job

SEED = 1234  # the default of --seed
ENDS = (10, 20, 40)
"""Of the increments of 80, 64 and 80 samples, in batches of 8 of which none, 2 and 4 are replayed."""
REPLAY = ("--replay", "0", "0.25", "0.5", "--save-interval", "5", "--save-keep", "99")

Batches = dict[tuple[str, int], np.ndarray]


def train(arguments: list[str], batches: Batches) -> bool:
    """Train until the run stops by itself, noting in ``batches`` what each update draws; whether all is trained."""
    original = Loop.batch

    def recording(self: Loop, window: Any, step: int) -> Any:
        batch = original(self, window, step)
        batches[str(self.state.path), step] = np.asarray(batch.tokens)
        return batch

    with mock.patch.object(Loop, "batch", recording), opened(arguments) as run, suppress(PreemptedError):
        loop.train(run)
        return True
    return False


def records_of(run: Path) -> dict[str, CheckpointRecord]:
    return dict(read_lineage(run / "checkpoints").records)


def digests(run: Path) -> dict[str, str]:
    store = Store(run / "checkpoints")
    return {name: store.manifest(name).digest for name in store.names()}


@lru_cache
def expected(data: TinyData, step: int) -> tuple[np.ndarray, list[str]]:
    """The closed form: the tokens of update ``step`` of any path of the run, and the increment of each sample."""
    version = next(place for place, end in enumerate(ENDS) if step <= end)
    opened_ones = [open_increment(prefix) for prefix in data.increments]
    first = (step - 1 - (ENDS[version - 1] if version else 0)) * BATCH
    new = SampleStream(opened_ones[version : version + 1], SEQUENCE_LENGTH, SEED)
    if version == 0:
        return new.samples(np.arange(first, first + BATCH)), ["a"] * BATCH
    older = SampleStream(opened_ones[:version], SEQUENCE_LENGTH, SEED)
    share = Fraction(version, 4)
    members, own = Apportionment([1 - share, share])(np.arange(first, first + BATCH))
    rows, names = [], []
    for member, index in zip(members.tolist(), own.tolist(), strict=True):
        source, at = (older, np.array([index])) if member else (new, np.array([index]))
        rows.append(source.samples(at)[0])
        names.append(source.increments[int(source.locate(at)[0][0])].manifest.name)
    return np.stack(rows), names


@pytest.fixture(scope="module")
def replayed(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Batches]:
    """A run over two increments, stopped and started again and again, that goes on with a third and another fraction;
    what every update drew, each one only once."""
    run, batches = tmp_path_factory.mktemp("replayed") / "run", Batches()
    launches = 0
    while not train(command(data.first(2), run, "--replay", "0.25", *REPLAY[4:], "--exit-interval", "9"), batches):
        launches += 1
    assert launches == 3, "stopped at another place than on a branch, on the main path and on a branch again"
    finished = digests(run)
    assert train(command(data, run, *REPLAY), batches)
    assert finished.items() <= digests(run).items(), "a finished checkpoint was trained again"
    return run, batches


def test_every_update_draws_the_samples_of_the_closed_form(replayed: tuple[Path, Batches], data: TinyData):
    _, batches = replayed
    assert {step for _, step in batches} == set(range(1, ENDS[-1] + 1))
    for (path, step), tokens in batches.items():
        assert np.array_equal(tokens, expected(data, step)[0]), (path, step)
    both = {step for path, step in batches if path != "main" and ("main", step) in batches}
    assert {5, 10, 15, 20} <= both, "no overlap of a branch with the main path"


def test_a_fraction_of_every_batch_is_replayed_and_no_new_sample_is_drawn_twice(data: TinyData):
    for version, (start, end) in enumerate(zip((0, *ENDS), ENDS, strict=False)):
        new = Counter()
        for step in range(start + 1, end + 1):
            tokens, names = expected(data, step)
            own = [row.tobytes() for row, name in zip(tokens, names, strict=True) if name == "abc"[version]]
            assert len(own) == BATCH - 2 * version, step
            new.update(own)
        assert max(new.values()) == 1


def test_a_pass_is_as_long_as_its_own_samples_last(data: TinyData, tmp_path: Path):
    """64 of b: beside 3 of 8 that are replayed, the 65th would be the last sample of update 13."""
    with opened(command(data.first(2), tmp_path / "run", "--replay", "3/8")) as run:
        window, source = run.job.plan.window_at("v2", 22), run.job.stream(run.job.plan.window_at("v2", 22))
        assert (window.start, window.end) == (10, 22)
        assert [source.consumed(size)["b"] for size in (12 * BATCH, 13 * BATCH - 1, 13 * BATCH)] == [60, 64, 65]


def test_every_checkpoint_counts_what_was_drawn_by_the_increment_it_came_from(
    replayed: tuple[Path, Batches], data: TinyData
):
    records = records_of(replayed[0])
    assert {record.kind for record in records.values()} == {"periodic", "fork", "release"}
    for name, record in records.items():
        counts = Counter(each for step in range(1, record.step + 1) for each in expected(data, step)[1])
        assert record.samples == counts, name
    assert records["v3-00000040"].samples.keys() == {"a", "b", "c"}


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--replay", "0", "0.5", "0.5"), "--replay was 0.25 and is 0 0.5 0.5"),
        ((), "--replay was 0.25 and is unset"),
        (("--replay", "0", "0.25", "0.5", "--allow", "replay=more"), "--allow replay is not possible: the samples"),
    ],
)
def test_what_was_trained_keeps_its_fraction(
    replayed: tuple[Path, Batches], data: TinyData, capsys: pytest.CaptureFixture[str], flags: tuple, complaint: str
):
    assert launch(command(data, replayed[0], *flags)) == 2
    assert complaint in capsys.readouterr().err


def test_a_fraction_is_the_same_however_it_is_written(replayed: tuple[Path, Batches], data: TinyData):
    with opened(command(data, replayed[0], "--replay", "0.0", "1/4", "5e-1")) as run:
        assert all(run.finished(segment) for segment in run.job.plan.segments)


def test_what_an_update_drew_is_told_by_increment(replayed: tuple[Path, Batches], data: TinyData):
    with opened(command(data, replayed[0], *REPLAY)) as run:
        drawn = Loop(run).drawn(run.job.plan.window_at("main", 21), 21)
        run.job.union("a").notes = ("counts are not kept",)
        told = describe_size(run.job)
        assert "b (10 steps, 25 % replay)" in told and told.endswith("\nnote        counts are not kept")
    counts = Counter(expected(data, 21)[1])
    assert {name: len(places) for name, places in drawn.items()} == counts
    assert counts["c"] == 4 and len(counts) > 1


@pytest.fixture(scope="module")
def blended(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    """Increment a, and b and c blended 1 to 3: 32 windows of b with all 80 of c make no pass, 26 and 80 do."""
    prefix = tmp_path_factory.mktemp("blended") / "mix"
    blend(prefix, "mix", data.increments[1:], ["0.25", "0.75"])
    return TinyData((data.increments[0], str(prefix)), ())


def counted(job: Job, path: str, step: int) -> Counter[str]:
    """The samples of a trajectory by increment, one by one."""
    counts: Counter[str] = Counter()
    for update in range(1, step + 1):
        window = job.plan.window_at(path, update)
        source = job.stream(window)
        indices = np.arange(BATCH, dtype=np.int64) + (update - 1 - window.start) * BATCH
        counts.update(source.increments[at].manifest.name for at in source.locate(indices)[0].tolist())
    return counts


@pytest.mark.parametrize("flags", [("--paradigm", "ptfs"), ("--paradigm", "cpt"), ("--replay", "0.2")], ids=" ".join)
def test_a_blend_is_an_increment_and_its_members_are_counted(blended: TinyData, tmp_path: Path, flags: tuple[str, ...]):
    with opened(command(blended, tmp_path / "run", *flags)) as run:
        job = run.job
        last = job.plan.releases[-1]
        assert [increment.name for increment in job.plan.increments] == ["a", "mix"]
        assert job.plan.increments[1].steps == (106 if "--replay" not in flags else 132) // BATCH
        for step in (1, 10, 11, 15, last.end):
            counts = counted(job, last.name, step)
            assert {name: n for name, n in job.consumed(last.name, step).items() if n} == counts, step
        assert counts.keys() == {"a", "mix/b", "mix/c"}
        assert set(job.data_fingerprints()) == {"a", "mix"}
        drawn = Loop(run).drawn(job.plan.window_at(last.name, last.end), last.end)
        assert drawn.keys() <= counts.keys() and sum(map(len, drawn.values())) == BATCH


def test_a_run_over_a_blend_trains(blended: TinyData, tmp_path: Path):
    batches = Batches()
    assert train(command(blended, tmp_path / "run", "--alpha", "0.5", "--increment-steps", "2", "5"), batches)
    record = records_of(tmp_path / "run")["v2-00000007"]
    assert record.samples == {"a": 16, "mix/b": 10, "mix/c": 30}
    rows = np.concatenate([tokens for (path, step), tokens in batches.items() if step > 2])
    assert len(np.unique(rows, axis=0)) == 40


def test_a_blend_and_its_members_are_not_measured(
    blended: TinyData, data: TinyData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    both = TinyData(blended.increments, (data.held_out[0], blended.increments[1]))
    assert launch(command(both, tmp_path / "run")) == 2
    assert "mix is a blend, and what is measured is one text read in order" in capsys.readouterr().err
    member = TinyData(blended.increments, (data.held_out[0], data.increments[1]))
    assert launch(command(member, tmp_path / "run")) == 2
    assert "b.train holds the tokens of an increment that is trained on" in capsys.readouterr().err


def test_a_count_goes_on_from_the_checkpoints_before_it(
    replayed: tuple[Path, Batches], data: TinyData, monkeypatch: pytest.MonkeyPatch
):
    """At 1e9 samples, a look at each would take minutes at every save."""
    records = records_of(replayed[0])
    looked_at: list[int] = []
    locate = SampleStream.locate

    def looking(self: SampleStream, indices: Any) -> Any:
        looked_at.append(len(indices))
        return locate(self, indices)

    with opened(command(data, replayed[0], *REPLAY)) as run:
        monkeypatch.setattr(SampleStream, "locate", looking)
        for path, step in (("main", 27), ("main", 26), ("v3", 40), ("v3", 33), ("v2", 20)):
            earlier = [record for record in records.values() if record.step < step]
            looked_at.clear()
            assert run.job.consumed(path, step, earlier) == run.job.consumed(path, step) == counted(run.job, path, step)
            looked_at.clear()
            run.job.consumed(path, step, earlier)
            assert sum(looked_at) <= 5 * BATCH // 2, (path, step)
        looked_at.clear()
        run.state.step = 28
        segment = next(each for each in run.job.plan.segments if each.path == "main" and each.end == 28)
        assert run._record(segment, "fork").samples == counted(run.job, "main", 28)
        assert sum(looked_at) - 28 * BATCH <= 5 * BATCH // 2, "a save looks at all that was drawn before"
