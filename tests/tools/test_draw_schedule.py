"""tools/draw_schedule.py as its users meet it: a process, its output, its exit status."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from one_process import launched_in_turn

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "draw_schedule.py"


ENVIRONMENT = {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}
Drawn = tuple[list[subprocess.CompletedProcess[str]], Path]


def arguments(schedule: str, ranks: int, micro_batches: int, *more: str | Path) -> list[str]:
    of_schedule = ["--pipeline-schedule", schedule, "--pipeline-model-parallel-size", str(ranks)]
    return [*of_schedule, "--micro-batches", str(micro_batches), *map(str, more)]


def draw_schedule(schedule: str, ranks: int, micro_batches: int, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOL), *arguments(schedule, ranks, micro_batches, *more)],
        env=ENVIRONMENT,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )


def test_json_holds_the_orders_and_what_they_cost() -> None:
    result = draw_schedule("1f1b", 2, 2, "--json")
    assert (result.returncode, result.stderr) == (0, "")
    printed = json.loads(result.stdout)
    assert printed.pop("bubble_fraction") == pytest.approx(1 / 3)
    assert printed == {
        "name": "1f1b",
        "stage_ranks": [0, 1],
        "orders": [
            [["F", 0, 0], ["F", 0, 1], ["B", 0, 0], ["B", 0, 1]],
            [["F", 1, 0], ["B", 1, 0], ["F", 1, 1], ["B", 1, 1]],
        ],
        "length": 9.0,
        "peak_in_flight": [2, 1],
        "peak_deferred": [0, 0],
    }


@pytest.fixture(scope="module")
def by_torch(tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    """Two schedules whose orders are torch's, which is imported for both: ZB-V, drawn, and interleaved; the picture."""
    picture = tmp_path_factory.mktemp("drawn") / "zbv.svg"
    zbv = arguments("zbv", 4, 8, "--svg", picture, "--width", "80")
    interleaved = arguments("interleaved", 2, 4, "--num-virtual-stages-per-pipeline-rank", "3", "--json")
    return launched_in_turn(TOOL, zbv, interleaved, environment=ENVIRONMENT), picture


def test_zbv_is_drawn_as_text_and_as_an_svg(by_torch: Drawn) -> None:
    (result, _), picture = by_torch
    assert (result.returncode, result.stderr) == (0, "")
    for shown in ("ZB-V: 4 ranks, 2 stages a rank, 8 micro-batches", "rank 3 .   .   .   F0a F0b", "idle 5.9 %"):
        assert shown in result.stdout
    assert picture.read_text().startswith("<svg ")


def test_interleaved_takes_more_stages_where_told(
    by_torch: tuple[list[subprocess.CompletedProcess[str]], Path],
) -> None:
    (_, result), _ = by_torch
    assert json.loads(result.stdout)["stage_ranks"] == [0, 1, 0, 1, 0, 1]


def test_1f1b_is_drawn_without_torch_and_numpy() -> None:
    command = [sys.executable, "-X", "importtime", str(TOOL), "--pipeline-model-parallel-size", "2"]
    environment = {"PYTHONPATH": str(ROOT)}
    log = subprocess.run(
        [*command, "--micro-batches", "2"], env=environment, capture_output=True, encoding="utf-8", check=True
    )
    imported = {line.rsplit("|", 1)[-1].strip() for line in log.stderr.splitlines()}
    assert "megalrps.parallel.schedule" in imported
    assert not imported & {"torch", "numpy"}


@pytest.mark.parametrize(
    ("schedule", "ranks", "micro_batches", "more", "complaint"),
    [
        ("1f1b", 4, 3, [], "make them at least 4 by --global-batch-size or --micro-batch-size"),
        ("1f1b", 0, 3, [], "--pipeline-model-parallel-size 0: give at least 1"),
        ("gpipe", 2, 0, [], "--micro-batches 0: give at least 1"),
        ("zbv", 2, 4, ["--num-virtual-stages-per-pipeline-rank", "3"], "--pipeline-schedule zbv takes exactly 2"),
        ("gpipe", 2, 2, ["--width", "39"], "--width 39 is too narrow"),
        ("gpipe", 2, 2, ["--svg", "/nowhere/at/all.svg"], "--svg /nowhere/at/all.svg cannot be written"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(
    schedule: str, ranks: int, micro_batches: int, more: list[str], complaint: str
) -> None:
    result = draw_schedule(schedule, ranks, micro_batches, *more)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("draw_schedule.py: error: ")
    assert complaint in result.stderr
    assert result.stderr.count("\n") == 1
