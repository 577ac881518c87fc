"""The learning rate of every update, in metrics.jsonl and in the optimizer, is the closed form of its schedule."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from tiny_job import TinyData, command, metrics, opened

from megalrps.training import loop
from megalrps.training.optimizer import Optimizer

MAXIMUM, MINIMUM, WARMUP = 1e-2, 1e-3, 3
FORKS, ENDS, STARTS = {"v1": 4, "v2": 13, "v3": 22}, {"v1": 10, "v2": 18, "v3": 28}, {"v1": 0, "v2": 10, "v3": 18}

Rate = Callable[[str, int], float]


def cosine(x: float) -> float:
    return MINIMUM + (MAXIMUM - MINIMUM) * (1 + math.cos(math.pi * x)) / 2


def switching(branch: Callable[[str, float], float]) -> Rate:
    """main(t) = max * min(1, t / G); a branch over (F, E] is ``branch`` of x = (t - F) / (E - F)."""

    def rate(path: str, step: int) -> float:
        if path == "main":
            return MAXIMUM * min(1.0, step / WARMUP)
        return branch(path, (step - FORKS[path]) / (ENDS[path] - FORKS[path]))

    return rate


def multi_step(path: str, x: float) -> float:
    """Two drops of sqrt(min / max), the first for the whole steps of half a branch."""
    length = ENDS[path] - FORKS[path]
    return math.sqrt(MINIMUM * MAXIMUM) if x * length <= length // 2 else MINIMUM


def full_cosine(start: int, step: int, end: int) -> float:
    done = step - start
    return MAXIMUM * done / WARMUP if done <= WARMUP else cosine((done - WARMUP) / (end - start - WARMUP))


SCHEDULES: dict[str, tuple[Sequence[str], Rate]] = {
    "lrps-cosine": ((), switching(lambda path, x: cosine(x))),
    "lrps-knee": (("--lr-decay-style", "knee"), switching(lambda path, x: MAXIMUM + (MINIMUM - MAXIMUM) * x)),
    "lrps-multi-step": (("--lr-decay-style", "multi-step"), switching(multi_step)),
    "ptfs-cosine": (("--paradigm", "ptfs"), lambda path, step: full_cosine(0, step, ENDS[path])),
    "cpt-cosine": (("--paradigm", "cpt"), lambda path, step: full_cosine(STARTS[path], step, ENDS[path])),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_update_uses_and_records_the_closed_form(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: str
):
    flags, rate = SCHEDULES[schedule]
    used: list[float] = []
    original = Optimizer.step
    monkeypatch.setattr(Optimizer, "step", lambda self, lr, loss: used.append(lr) or original(self, lr, loss))
    with opened(command(data, tmp_path / "run", "--lr-warmup-iters", str(WARMUP), *flags)) as run:
        loop.train(run)
    lines = metrics(tmp_path / "run")
    assert used == [line["lr"] for line in lines], "metrics.jsonl tells another rate than the optimizer used"
    expected = [rate(line["path"], line["step"]) for line in lines]
    assert used == pytest.approx(expected, rel=1e-12)
    exact = {(line["path"], line["step"]): line["lr"] for line in lines}
    for version, end in ENDS.items():
        assert exact[version, end] == MINIMUM
    if schedule.startswith("lrps"):
        assert exact["main", WARMUP] == exact["main", FORKS["v1"]] == exact["main", FORKS["v3"]] == MAXIMUM
        assert exact["main", FORKS["v1"] + 1] == MAXIMUM > exact["v1", FORKS["v1"] + 1]
