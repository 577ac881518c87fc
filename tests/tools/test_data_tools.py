"""The command lines from text to increments, run as a user runs them, one after the other."""

import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from megalrps.data.increment import open_increment
from megalrps.data.text_increments import read_increments

ROOT = Path(__file__).parents[2]
TOOLS = ["preprocess_data", "train_tokenizer", "split_increments", "make_corpus"]


def run(tool: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / f"{tool}.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two increments, a tokenizer of the first and its dataset, each made by its tool."""
    folder = tmp_path_factory.mktemp("tools")
    lines = [{"text": f"document {n} of year {n % 20}\n" * 5, "date": str(2000 + n % 20)} for n in range(400)]
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for process in (
        run("split_increments", "--input", folder / "in.jsonl", "--output", folder / "text", "--boundaries", "2010"),
        run("train_tokenizer", *training(folder)),
        run("preprocess_data", *preprocessing(folder)),
    ):
        assert process.returncode == 0, process.stderr
        assert re.sub("^tokenizing with .+\n", "", process.stderr) == ""
    return folder


def training(folder: Path) -> list[object]:
    return ["--input", folder / "text/inc1.train.jsonl", "--vocab-size", 300, "--output", folder / "tok.model"]


def preprocessing(folder: Path) -> list[object]:
    model = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", folder / "tok.model"]
    output = ["--output-prefix", folder / "data/inc1", "--append-eod", "--name", "first", "--workers", 1]
    return ["--input", folder / "text/inc1.train.jsonl", *model, *output]


def test_text_becomes_an_increment_that_opens(folder: Path) -> None:
    increment = open_increment(folder / "data/inc1_text_document", verify=True)
    first, second = read_increments(folder / "text")
    assert (increment.manifest.name, increment.manifest.documents) == ("first", first.train.documents)
    assert increment.manifest.text_bytes == first.train.text_bytes
    assert first.train.documents + first.valid.documents + second.train.documents + second.valid.documents == 400


def cpu_seconds(tool: str, arguments: list[object]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = run(tool, *arguments)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert process.returncode == 0 and "up to date" in process.stdout
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_nothing_to_do_costs_less_than_an_import_of_torch(folder: Path) -> None:
    """A third of a second, or half where other work on the machine makes even CPU seconds more; the least of three."""
    for tool, arguments in (("train_tokenizer", training(folder)), ("preprocess_data", preprocessing(folder))):
        assert min(cpu_seconds(tool, arguments) for _ in range(3)) < 0.8


def test_the_tool_imports_neither_torch_nor_what_its_input_does_not_need(folder: Path) -> None:
    program = (
        "import runpy, sys; sys.argv[0] = 'preprocess_data.py'\n"
        f"runpy.run_path({str(ROOT / 'tools' / 'preprocess_data.py')!r})['main']()\n"
        "print(*sorted({name.split('.')[0] for name in sys.modules}))"
    )
    command = [sys.executable, "-c", program, *map(str, preprocessing(folder)), "--overwrite", "--name", "again"]
    output = ["--output-prefix", str(folder / "data/again")]
    process = subprocess.run([*command, *output], capture_output=True, text=True, cwd=ROOT, check=True)
    imported = set(process.stdout.splitlines()[-1].split())
    assert {"numpy", "orjson", "sentencepiece"} <= imported
    assert not imported & {"torch", "pyarrow", "zstandard", "tokenizers", "rich", "fsspec", "pandas"}


def test_an_error_is_one_line_and_status_two(folder: Path) -> None:
    for tool, arguments in {
        "preprocess_data": [*preprocessing(folder), "--output-prefix", folder / "in.jsonl" / "below_a_file"],
        "train_tokenizer": [*training(folder), "--vocab-size", 100_000, "--overwrite"],
        "split_increments": ["--input", folder / "absent.jsonl", "--output", folder / "none", "--parts", 2],
        "make_corpus": ["--output", folder / "text"],
    }.items():
        process = run(tool, *arguments)
        assert process.returncode == 2
        assert process.stderr.startswith(f"{tool}.py: error: ") and process.stderr.count("\n") == 1


@pytest.mark.parametrize("tool", TOOLS)
def test_help_shows_defaults_and_unknown_flags_are_refused(tool: str) -> None:
    process = run(tool, "--help")
    assert process.returncode == 0 and "(default: " in process.stdout and "(required)" in process.stdout
    assert run(tool, "--no-such-flag").returncode == 2
