"""tools/blend_increments.py as its users meet it: a process, its output, its exit status."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_job import TinyData, make_data

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tools"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    """Increments a and b of one step each."""
    return make_data(tmp_path_factory.mktemp("data"), (1, 1))


def run_tool(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOLS / f"{name}.py"), *arguments],
        env={"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )


def test_a_blend_is_written_told_and_left_when_it_is_there(data: TinyData, tmp_path: Path):
    prefix = tmp_path / "deep" / "mix"
    command = ("--output", str(prefix), "--name", "mix", "--data", *data.increments, "--weights", "2", "1/3")
    for _ in range(2):
        result = run_tool("blend_increments", *command)
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout == (
            f"{prefix}: increment mix, a blend of 2\n  85.7 % a, 129 tokens\n  14.3 % b, 129 tokens\n"
        )
    written = json.loads(Path(f"{prefix}.json").read_text())
    assert (written["format"], [member["weight"] for member in written["members"]]) == ("megalrps-blend", ["2", "1/3"])
    assert [path.name for path in prefix.parent.iterdir()] == ["mix.json"]
    verified = run_tool("verify_data", "--data", str(prefix)).stdout
    assert verified.count(": whole, 3 documents, 129 tokens") == 2, "the members of a blend are what is verified"


def test_a_mistake_is_one_line_and_status_2(data: TinyData, tmp_path: Path):
    result = run_tool(
        "blend_increments",
        "--output",
        str(tmp_path / "mix"),
        "--name",
        "m",
        "--data",
        *data.increments,
        "--weights",
        "2",
    )
    assert (result.returncode, result.stdout) == (2, "")
    told = "blend_increments.py: error: --weights holds 1 numbers for 2 prefixes of --data: give one each\n"
    assert result.stderr == told
    assert list(tmp_path.iterdir()) == []
