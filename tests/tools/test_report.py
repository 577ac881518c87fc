"""tools/report.py as its users meet it: a process, its output, its exit status."""

import json
import subprocess
import sys
from pathlib import Path

from synthetic_run import make_run

ROOT = Path(__file__).resolve().parents[2]


def report(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "COLUMNS": "100"}
    command = [sys.executable, str(ROOT / "tools" / "report.py"), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", check=False)


def test_a_run_gets_its_page_and_the_terminal_its_tables(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    result = report("--run", tmp_path / "run")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines()[-1] == f"report: {tmp_path / 'run' / 'report.html'}"
    assert all(words in result.stdout for words in ("Held-out perplexity", "lrps (this run)", "70.3 %", "main at 132"))
    assert {path.name for path in (tmp_path / "run").glob("*.png")} == {"tree.png", "learning_rate.png", "loss.png"}


def test_runs_are_compared_where_they_lie_and_a_page_can_be_written_elsewhere(tmp_path: Path) -> None:
    for paradigm in ("ptfs", "lrps"):
        make_run(tmp_path / paradigm, paradigm)
    result = report("--compare", tmp_path / "ptfs", tmp_path / "lrps")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines()[-1] == f"report: {tmp_path / 'report.html'}"
    assert list(json.loads((tmp_path / "summary.json").read_text())) == ["ptfs", "lrps"]
    elsewhere = report("--run", tmp_path / "lrps", "--output", tmp_path / "new" / "page.html")
    assert elsewhere.stdout.splitlines()[-1] == f"report: {tmp_path / 'new' / 'page.html'}"
    assert not (tmp_path / "lrps" / "report.html").exists()


def test_bad_input_is_one_line_and_status_2(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    result = report("--run", tmp_path / "run")
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert "metrics.jsonl: no such file; hand the directory of a run that has trained" in result.stderr
    assert not (tmp_path / "run" / "report.html").exists()
