"""A preprocessing run that is broken off, by whatever: nothing is lost, nothing is done twice, nothing is mixed."""

import errno
import multiprocessing
from pathlib import Path

import pytest
from small_preprocessing import changed, contents, small_options

from megalrps.data.encode import EncodedPart, PartEncoder
from megalrps.data.index_writer import locked_partial
from megalrps.data.parts import Part
from megalrps.data.preprocess import preprocess
from megalrps.data.preprocess_options import (
    PreprocessOptions,
)
from megalrps.data.workers import WorkerProcesses
from megalrps.errors import InputError


@pytest.fixture
def options(tmp_path: Path, tokenizer_model: Path) -> PreprocessOptions:
    return small_options(tmp_path, tokenizer_model)


def interrupt_after(monkeypatch: pytest.MonkeyPatch, parts: int) -> list[int]:
    """Let a run end with a full disk after so many parts of 5 kB; the numbers of all parts that are tokenized."""
    encoded: list[int] = []
    encode = PartEncoder.encode

    def limited(self: PartEncoder, part: Part) -> EncodedPart:
        if len(encoded) == parts:
            raise OSError(errno.ENOSPC, "No space left on device")
        encoded.append(part.number)
        return encode(self, part)

    monkeypatch.setattr("megalrps.data.encode.PartEncoder.encode", limited)
    monkeypatch.setattr("megalrps.data.parts.plan_parts.__defaults__", (5000,))
    return encoded


def test_a_run_that_broke_off_goes_on_with_the_parts_that_are_left(
    options: PreprocessOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = changed(options, "output", output_prefix=tmp_path / "whole" / "v1")
    made = preprocess(whole)
    encoded = interrupt_after(monkeypatch, 4)
    with pytest.raises(OSError, match=r"No space left on device: '.*v1_text_document\.work'"):
        preprocess(options)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["v1_text_document.work"]
    with pytest.raises(OSError, match="No space left"):
        preprocess(options)  # nothing new, and nothing lost
    monkeypatch.undo()
    encoded_later = interrupt_after(monkeypatch, -1)
    result = preprocess(options)
    assert (encoded, result.parts_resumed) == ([0, 1, 2, 3], 4)
    assert encoded_later == list(range(4, result.parts)) and result.parts > 8
    assert (result.results, list(result.datasets.values())) == (made.results, list(made.datasets.values()))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["part", "part gone", "torn line", "changed line", "stray file"])
def test_what_a_power_cut_damaged_is_made_again(
    options: PreprocessOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    interrupt_after(monkeypatch, 4)
    with pytest.raises(OSError, match="No space left"):
        preprocess(options)
    work = tmp_path / "out" / "v1_text_document.work"
    journal, part = work / "journal", work / "00000001.0.tokens"
    if damage == "part":
        part.write_bytes(b"\0" * part.stat().st_size)
    elif damage == "part gone":
        part.unlink()
    elif damage == "torn line":
        journal.write_bytes(journal.read_bytes()[:-9])
    elif damage == "changed line":
        lines = journal.read_bytes().splitlines(keepends=True)
        journal.write_bytes(b"".join([*lines[:2], lines[2].replace(b'"number":1', b'"number":7'), *lines[3:]]))
    else:
        (work / "00000009.0.tokens").write_bytes(b"not in the journal")
    monkeypatch.undo()
    encoded = interrupt_after(monkeypatch, -1)
    result = preprocess(options)
    expected = {"part": [1], "part gone": [1], "torn line": [3], "changed line": [1, 2, 3], "stray file": []}[damage]
    assert encoded == [*expected, *range(4, result.parts)]
    preprocess(changed(options, "output", output_prefix=tmp_path / "whole" / "v1"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("change", ["input", "append_eod", "on_bad_line"])
def test_parts_are_reused_only_for_the_same_tokens(
    options: PreprocessOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    interrupt_after(monkeypatch, 4)
    with pytest.raises(OSError, match="No space left"):
        preprocess(options)
    if change == "input":
        content = (tmp_path / "in.jsonl").read_bytes()
        (tmp_path / "in.jsonl").write_bytes(content)  # the very same: but nobody looks before the work is done
    elif change == "append_eod":
        options = changed(options, "output", append_eod=False)
    else:
        options = changed(options, "text", on_bad_line="skip")
    monkeypatch.undo()
    interrupt_after(monkeypatch, -1)
    assert preprocess(options).parts_resumed == (4 if change == "on_bad_line" else 0)


def test_two_runs_do_not_write_one_output(options: PreprocessOptions, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with (
        locked_partial(tmp_path / "out" / "v1_text_document.work"),
        pytest.raises(InputError, match=r"v1_text_document\.work\.partial: another run is writing it"),
    ):
        preprocess(options)
    assert not preprocess(options).up_to_date


def test_an_input_that_changes_meanwhile_is_noticed(
    options: PreprocessOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = PartEncoder.encode

    def disturbed(self: PartEncoder, part: Part) -> EncodedPart:
        with open(tmp_path / "in.jsonl", "ab") as file:
            file.write(b'{"text": "late"}\n')
        return encode(self, part)

    monkeypatch.setattr("megalrps.data.encode.PartEncoder.encode", disturbed)
    with pytest.raises(InputError, match=r"in\.jsonl: changed while it was read"):
        preprocess(options)
    assert not list((tmp_path / "out").glob("*.idx"))


def test_a_worker_that_is_killed_is_noticed(options: PreprocessOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    start = WorkerProcesses.__enter__

    def start_and_kill(self: WorkerProcesses) -> WorkerProcesses:
        workers = start(self)
        multiprocessing.active_children()[0].kill()
        return workers

    monkeypatch.setattr(WorkerProcesses, "__enter__", start_and_kill)
    with pytest.raises(InputError, match="--workers 2: a worker was killed"):
        preprocess(changed(options, "work", workers=2))
    assert multiprocessing.active_children() == []
