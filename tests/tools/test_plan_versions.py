"""tools/plan_versions.py as its users meet it: a process, its output, its exit status."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "plan_versions.py"
GOLDEN = ["--paradigm", "lrps", "--increment-steps", "10000", "10000", "10000", "10000", "--alpha", "0.6"]


def plan_versions(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", **(environment or {})}
    return subprocess.run(
        [sys.executable, str(TOOL), *arguments], env=environment, capture_output=True, encoding="utf-8", check=False
    )


def test_json_holds_the_golden_figures() -> None:
    result = plan_versions(*GOLDEN, "--json")
    assert (result.returncode, result.stderr) == (0, "")
    printed = json.loads(result.stdout)
    assert len(printed.pop("fingerprint")) == 64
    assert printed == {
        "paradigm": "lrps",
        "forks": [4000, 14000, 24000, 34000],
        "ends": [10000, 20000, 30000, 40000],
        "branch_steps": [6000, 6000, 6000, 6000],
        "warmup_steps": 2000,
        "cost_steps": 58000,
        "cost_steps_by_paradigm": {"ptfs": 100000, "cpt": 40000, "lrps": 58000},
        "relative_cost": {"ptfs": 1.0, "cpt": 0.4, "lrps": 0.58},
    }


def test_what_is_replayed_is_shown_and_costs_nothing() -> None:
    replay = (*GOLDEN, "--replay", "0", "0.05", "0", "1/3")
    printed = json.loads(plan_versions(*replay, "--json").stdout)
    assert (printed["replay"], printed["cost_steps"]) == (["0", "1/20", "0", "1/3"], 58000)
    shown = plan_versions(*replay).stdout
    assert "inc2 + 5 % replay" in shown and "inc4 + 33.3 % replay" in shown and "inc3 +" not in shown


@pytest.mark.parametrize(("paradigm", "cost"), [("ptfs", 60), ("cpt", 30)])
def test_paradigms_without_forks_print_none(paradigm: str, cost: int) -> None:
    printed = json.loads(plan_versions("--paradigm", paradigm, "--increment-steps", "10", "10", "10", "--json").stdout)
    assert (printed["forks"], printed["branch_steps"], printed["ends"]) == ([], [], [10, 20, 30])
    assert printed["cost_steps"] == cost


def test_text_view_shows_tree_versions_costs_and_curve() -> None:
    result = plan_versions(*GOLDEN, "--increment-names", "2021", "2022", "2023", "2024", "--width", "90")
    assert (result.returncode, result.stderr) == (0, "")
    for shown in ("main ●━", "◆ v4  34,000 → 40,000", "2023", "58.0 %", "◀ this plan", "3e-4 ┤", "warm-up 2,000 steps"):
        assert shown in result.stdout
    assert max(map(len, result.stdout.split("\n"))) <= 90


def test_a_terminal_without_box_drawing_gets_the_figures_all_the_same() -> None:
    result = plan_versions(*GOLDEN, environment={"PYTHONIOENCODING": "ascii"})
    assert (result.returncode, result.stderr) == (0, "")
    assert "34,000" in result.stdout


def test_starts_within_a_second() -> None:
    """The fastest of three: what else the machine does at the time is not the tool's affair."""
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        plan_versions(*GOLDEN)
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 1.0


def test_imports_neither_torch_nor_matplotlib() -> None:
    command = [sys.executable, "-X", "importtime", str(TOOL), *GOLDEN]
    log = subprocess.run(command, env={"PYTHONPATH": str(ROOT)}, capture_output=True, encoding="utf-8", check=True)
    imported = {line.rsplit("|", 1)[-1].strip() for line in log.stderr.splitlines()}
    assert "megalrps.paths.plan" in imported
    assert not imported & {"torch", "matplotlib", "numpy"}


def test_plot_writes_a_png(tmp_path: Path) -> None:
    picture = tmp_path / "curves.png"
    result = plan_versions(*GOLDEN, "--json", "--plot", str(picture))
    assert result.returncode == 0  # matplotlib may say on stderr that it builds its font cache
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert json.loads(result.stdout)["cost_steps"] == 58000


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "--increment-steps is required"),
        (["--increment-steps", "100", "--alpha", "1.5"], "--alpha 1.5 must lie in (0, 1]"),
        (["--increment-steps", "100", "--alpha", "-0.5"], "--alpha -0.5 must lie in (0, 1]"),
        (["--increment-steps", "100", "--paradigm", "lprs"], "did you mean lrps?"),
        (["--increment-steps", "100", "--lr-warmup-iters", "41"], "--lr-warmup-iters 41 does not fit"),
        (["--increment-steps", "100", "--increment-names", "a", "b"], "--increment-names has 2 names for 1"),
        (["--increment-steps", "100", "--width", "5"], "--width 5 is too narrow"),
        (["--increment-steps", "100", "--plot", "/nowhere/at/all.png"], "--plot /nowhere/at/all.png cannot be written"),
        (["--increment-steps", "100", "--plot", "figure.doc"], "--plot figure.doc cannot be written"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(arguments: list[str], complaint: str) -> None:
    result = plan_versions(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("plan_versions.py: error: ")
    assert complaint in result.stderr
    assert result.stderr.count("\n") == 1


def test_an_unknown_flag_is_refused_with_the_nearest_one() -> None:
    result = plan_versions("--increment-stepps", "100")
    assert (result.returncode, result.stdout) == (2, "")
    assert "--increment-steps" in result.stderr


def test_help_lists_the_flags_of_the_plan_without_a_prefix() -> None:
    result = plan_versions("--help")
    assert result.returncode == 0
    for flag in ("--paradigm", "--alpha", "--increment-steps", "--lr-decay-style", "--json", "--plot", "--width"):
        assert f" {flag} " in result.stdout
    assert "--no-json" not in result.stdout
