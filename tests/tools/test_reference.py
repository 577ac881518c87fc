"""docs/reference.md says what the code says, and knows every flag that the command lines know, and no other."""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from one_process import launched_in_turn

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reference.md"
TOOL = ROOT / "tools" / "reference.py"
PROGRAMS = ("pretrain_gpt.py", *sorted(f"tools/{path.name}" for path in (ROOT / "tools").glob("*.py")))


ENVIRONMENT = {"COLUMNS": "100", "PYTHONIOENCODING": "utf-8", "PYTHONPATH": str(ROOT)}


def section(program: str) -> str:
    """The part of the page between this program's heading and the next one's."""
    _, found, rest = PAGE.read_text(encoding="utf-8").partition(f"\n## {program}\n")
    assert found, f"{program} has no section in {PAGE.name}"
    return re.split(r"\n## ", rest)[0]


def flags_of_tables(text: str) -> set[str]:
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `--")]
    return {flag for cell in rows for flag in re.findall(r"--[a-z][a-z0-9-]*", cell)}


def flags_of_help(text: str) -> set[str]:
    """The flags a help page introduces: those at the beginning of a line, inside a box or not."""
    starts = re.findall(r"^[│ ]*((?:-h, )?--[a-z].*)$", text, re.MULTILINE)
    heads = [re.split(r"\s{2,}| [A-Z{\[(]", start)[0] for start in starts]
    return {flag for head in heads for flag in re.findall(r"--[a-z][a-z0-9-]*", head)} - {"--help"}


@dataclass(frozen=True)
class Runs:
    """Launches of tools/reference.py: for its help, to check the page, to check a stale one and to mend that."""

    help: subprocess.CompletedProcess[str]
    check: subprocess.CompletedProcess[str]
    stale: subprocess.CompletedProcess[str]
    mend: subprocess.CompletedProcess[str]
    mended: bytes


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    page = tmp_path_factory.mktemp("reference") / "reference.md"
    page.write_text(PAGE.read_text(encoding="utf-8").replace("--alpha", "--alfa"), encoding="utf-8")
    stale, launches = ("--output", page), (("--help",), ("--check",))
    ended = launched_in_turn(TOOL, *launches, ("--check", *stale), stale, environment=ENVIRONMENT)
    return Runs(*ended, page.read_bytes())


def test_the_page_is_what_the_code_says(runs: Runs) -> None:
    assert (runs.check.returncode, runs.check.stderr) == (0, ""), "run python tools/reference.py"


def test_a_stale_page_is_refused_and_then_mended(runs: Runs) -> None:
    assert (runs.stale.returncode, runs.mend.returncode) == (2, 0)
    assert runs.mended == PAGE.read_bytes()


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_flags_are_those_of_the_help(program: str, runs: Runs) -> None:
    if ROOT / program == TOOL:
        text = runs.help.stdout
    else:
        command = [sys.executable, str(ROOT / program), "--help"]
        text = subprocess.run(command, env=ENVIRONMENT, capture_output=True, encoding="utf-8", check=True).stdout
    assert flags_of_help(text) == flags_of_tables(section(program)) != set()


TORCHRUNS_FLAGS = {"--nproc-per-node", "--nnodes", "--node-rank", "--master-addr", "--rdzv-backend", "--max-restarts"}
OTHERS_FLAGS = TORCHRUNS_FLAGS | {"--nodes", "--constraint", "--no-build-isolation"}  # sbatch's, pip's
OTHERS_FLAGS |= {"--cpp_ext", "--cuda_ext", "--signal", "--signals-to-handle"}  # apex's, sbatch's, torchrun's
OTHERS_FLAGS |= {"--full-faults", "--faults-seed"}  # of tests/faults/conftest.py
OTHERS_FLAGS |= {"--processes", "--only"}  # of benchmarks/faults.py
UNCHECKED = {PAGE, PAGE.with_name("benchmarks.md"), PAGE.with_name("log.md")}  # benchmarks have options of their own
PAGES = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(set(PAGE.parent.glob("*.md")) - UNCHECKED)]


def our_text(page: Path) -> str:
    """The text of ``page``; of the comparison with Megatron-LM, the column of our flags alone."""
    text = page.read_text(encoding="utf-8")
    if page.name != "coming_from_megatron.md":
        return text
    return "\n".join(line.split("|")[2] for line in text.splitlines() if line.startswith("| `--"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_name_only_options_that_exist(page: Path) -> None:
    known = flags_of_tables(PAGE.read_text(encoding="utf-8")) | OTHERS_FLAGS
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]*[a-z0-9]", our_text(page)))
    assert named <= known
