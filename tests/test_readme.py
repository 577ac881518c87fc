"""The README does what it says: its commands run, its figures are those of the results files, its links resolve."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from warm_interpreter import warm_interpreter, warmed

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)

# Small enough for a test; everything else is as in the README. The first command trains the README's own model.
FEW_STEPS = "--increment-steps 6 5 5 --save-interval 3 --log-interval 1"
SMALL = "--num-layers 1 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 2 --num-query-groups 1"


def lines_of_commands() -> list[str]:
    return [line for block in COMMANDS for line in re.sub(r"\\\n\s*", "", block).splitlines() if line.strip()]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files git knows, and the new ones it would, in a directory of their own."""
    directory = tmp_path_factory.mktemp("readme") / "megalrps"
    directory.mkdir()
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    for name in listed:
        source, target = ROOT / name, directory / name
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
            target.chmod(source.stat().st_mode)
    return directory


def environment_of(clone: Path, **more: str) -> dict[str, str]:
    """This interpreter's environment, with the packages of ``clone``."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(clone), "OMP_NUM_THREADS": "1", **more}


def run(command: str, clone: Path, warm: Path | None) -> subprocess.CompletedProcess[str]:
    """The command as a reader would type it, with this interpreter's environment in place of a new one.

    With ``warm``, python and torchrun are those of that folder, and the model is small.
    """
    environment = environment_of(clone, TRAIN_ARGS=FEW_STEPS)
    if warm is not None:
        environment = warmed(environment_of(clone, TRAIN_ARGS=f"{FEW_STEPS} {SMALL}"), warm)
    if command.startswith("make"):  # the virtual environment is the one the tests run in: no second installation
        prefix = warm or sys.prefix
        command = command.replace("make", f"make VENV={prefix} --old-file={prefix}/.installed", 1)
    return subprocess.run(
        ["bash", "-c", command], cwd=clone, env=environment, capture_output=True, text=True, check=False, timeout=280
    )


def write_dated_text(folder: Path) -> None:
    """A quarter of the documents that the quickstart made: enough for three increments of a few steps."""
    folder.mkdir(parents=True)
    with open(folder / "corpus.jsonl", "w") as file:
        for month, name in enumerate(("language", "network", "tools"), start=1):
            text = (folder.parents[2] / f"runs/data/standard_library/text/{name}.train.jsonl").read_text()
            for line in text.splitlines()[:150]:
                file.write(json.dumps({"text": json.loads(line)["text"], "date": f"2024-{month:02d}-01"}) + "\n")


def test_the_commands_are_the_ones_this_file_runs():
    """A command added to the README is either run below or left out here by name, with the reason."""
    known = {
        "make quickstart": "run",
        "make test": "this run is it",
        "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make quickstart": "needs that index; else as above",
        "make compare": "run",
        "make quickstart CORPUS=path/to/folder RUN=runs/mine": "run, with a folder",
    }
    others = [line for line in lines_of_commands() if line not in known]
    assert [line.split()[0:2] for line in others] == [
        ["python", "tools/plan_versions.py"],
        ["python", "tools/preprocess_data.py"],
        ["python", "pretrain_gpt.py"],
        ["torchrun", "--nproc-per-node"],
        ["torchrun", "--nproc-per-node"],
    ]


@pytest.mark.slow
@pytest.mark.timeout(600)  # a dozen commands, each with a limit of its own
def test_the_commands_run_in_their_order(clone: Path, tmp_path: Path):
    """The first that trains with interpreters of its own; the others, which start thirty more, with warm ones."""
    with warm_interpreter(tmp_path / "warm", environment_of(clone)) as warm:
        (warm / ".installed").touch()
        run_in_order(clone, warm)


def run_in_order(clone: Path, warm: Path) -> None:
    for line in lines_of_commands():
        if line == "make test" or line.startswith("PIP_EXTRA_INDEX_URL"):
            continue
        if "CORPUS" in line:
            write_dated_text(clone / "path/to/folder")
        if line.startswith(("torchrun", "python pretrain_gpt.py")):
            steps = "6 5" if "network" in line else "6"
            line += f" --increment-steps {steps} --save-interval 3 {SMALL}"
        done = run(line, clone, None if line == "make quickstart" else warm)
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        if line == "make quickstart":
            assert "report: runs/quickstart/report.html" in done.stdout
            for file in ("report.html", "metrics.jsonl", "summary.json", "plan.json", "checkpoints"):
                assert (clone / "runs/quickstart" / file).exists()
        if line == "make compare":
            assert (clone / "runs/compare/summary.json").exists()


def test_its_figures_are_those_of_the_results_files():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from readme_tables import rendered
    finally:
        sys.path.pop(0)
    assert rendered(README) == README, "run python benchmarks/readme_tables.py"


def test_the_plan_it_shows_is_the_one_the_tool_prints():
    shown = re.search(r"```text\n(.*?)```", README, re.DOTALL)
    assert shown is not None
    command = next(line for line in lines_of_commands() if "plan_versions.py" in line)
    printed = subprocess.run(
        [sys.executable, *command.split()[1:]], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for line in shown[1].splitlines():
        assert line.rstrip() in {known.rstrip() for known in printed.splitlines()}, line


def test_its_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_it_is_short():
    assert 120 <= len(README.splitlines()) <= 200
