"""docs/reference.md says what the code says, and knows every flag that the command lines know, and no other."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reference.md"
TOOL = ROOT / "tools" / "reference.py"
PROGRAMS = ("pretrain_gpt.py", *sorted(f"tools/{path.name}" for path in (ROOT / "tools").glob("*.py")))


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, encoding="utf-8", check=False)


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


def test_the_page_is_what_the_code_says() -> None:
    result = run(TOOL, "--check")
    assert (result.returncode, result.stderr) == (0, ""), "run python tools/reference.py"


def test_a_stale_page_is_refused_and_then_mended(tmp_path: Path) -> None:
    page = tmp_path / "reference.md"
    page.write_text(PAGE.read_text(encoding="utf-8").replace("--alpha", "--alfa"), encoding="utf-8")
    assert run(TOOL, "--check", "--output", page).returncode == 2
    assert run(TOOL, "--output", page).returncode == 0
    assert page.read_bytes() == PAGE.read_bytes()


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_flags_are_those_of_the_help(program: str) -> None:
    result = subprocess.run(
        [sys.executable, str(ROOT / program), "--help"],
        env={"COLUMNS": "100", "PYTHONIOENCODING": "utf-8", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    assert flags_of_help(result.stdout) == flags_of_tables(section(program)) != set()


TORCHRUNS_FLAGS = {"--nproc-per-node", "--nnodes", "--node-rank", "--master-addr", "--rdzv-backend", "--max-restarts"}
OTHERS_FLAGS = TORCHRUNS_FLAGS | {"--nodes", "--constraint", "--no-build-isolation"}  # sbatch's, pip's
OTHERS_FLAGS |= {"--cpp_ext", "--cuda_ext"}  # apex's
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
