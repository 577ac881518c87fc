"""Dated text into increments: where each text goes, and that none is trained on and held out."""

import hashlib
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalrps.data.dates import parse_day
from megalrps.data.first_places import FirstPlaces
from megalrps.data.split import SplitOptions, split_increments
from megalrps.data.text_increments import describe_increments, is_held_out, read_increments
from megalrps.errors import InputError

DAYS = [f"{2000 + year}-{month:02d}-15" for year in range(10) for month in range(1, 13)]
LINES = [{"text": f"text {n} " + "x" * (n % 50), "date": DAYS[n * 7 % len(DAYS)]} for n in range(960)]


@pytest.fixture
def options(tmp_path: Path) -> SplitOptions:
    write_lines(tmp_path / "in.jsonl", LINES)
    return SplitOptions((str(tmp_path / "in.jsonl"),), tmp_path / "out", boundaries=("2003-01-01", "2006-06"))


def write_lines(path: Path, lines: list[dict[str, str]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def read_lines(folder: Path) -> dict[str, list[dict[str, str]]]:
    return {
        path.name.removesuffix(".jsonl"): [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(folder.glob("*.jsonl"))
    }


def test_every_text_lies_in_the_increment_of_its_date(options: SplitOptions) -> None:
    result = split_increments(options)
    parts = read_lines(options.output)
    assert list(parts) == [f"inc{n}.{part}" for n in (1, 2, 3) for part in ("train", "valid")]
    starts = ["0000", "2003-01-01", "2006-06-01", "9999"]
    for number in (1, 2, 3):
        lines = parts[f"inc{number}.train"] + parts[f"inc{number}.valid"]
        expected = [line for line in LINES if starts[number - 1] <= line["date"] < starts[number]]
        assert sorted(map(str, lines)) == sorted(map(str, expected))
    assert [increment.name for increment in result.increments] == ["inc1", "inc2", "inc3"]
    assert "of 2003-01-15..2006-05-15" in describe_increments(result.increments)


def test_a_text_is_held_out_by_its_hash_alone(options: SplitOptions) -> None:
    split_increments(options)
    for name, lines in read_lines(options.output).items():
        for line in lines:
            digest = hashlib.blake2b(line["text"].encode(), digest_size=8).digest()
            assert (int.from_bytes(digest, "big") % 16 == 0) == name.endswith(".valid")


@settings(deadline=None, max_examples=30)
@given(st.text(st.characters(exclude_categories=["Cs"])), st.integers(2, 5))
def test_held_out_by_a_multiple_is_held_out_by_its_divisors(text: str, modulo: int) -> None:
    assert not is_held_out(text, 6 * modulo) or is_held_out(text, modulo)


def test_equal_parts_follow_the_dates_and_balance_the_bytes(options: SplitOptions) -> None:
    result = split_increments(replace(options, boundaries=(), parts=4))
    parts = [(each.train, each.valid) for each in result.increments]
    sizes = [train.text_bytes + valid.text_bytes for train, valid in parts]
    assert max(sizes) - min(sizes) < 0.05 * sum(sizes)
    lasts = [max(str(train.last_date), str(valid.last_date)) for train, valid in parts]
    firsts = [min(str(train.first_date), str(valid.first_date)) for train, valid in parts]
    assert all(last < first for last, first in zip(lasts, firsts[1:], strict=False))


def test_more_parts_than_dates_are_refused(options: SplitOptions) -> None:
    with pytest.raises(InputError, match="has only 120 dates"):
        split_increments(replace(options, boundaries=(), parts=121))


def test_split_files_are_taken_as_they_are(tmp_path: Path) -> None:
    for name, part, text in [("b", "train", "1"), ("b", "valid", "2"), ("a", "train", "3"), ("a", "val", "4")]:
        write_lines(tmp_path / "in" / f"{name}.{part}.jsonl", [{"text": text}])
    result = split_increments(SplitOptions((str(tmp_path / "in"),), tmp_path / "out"))
    assert [increment.name for increment in result.increments] == ["a", "b"]
    texts = {name: lines[0]["text"] for name, lines in read_lines(tmp_path / "out").items()}
    assert texts == {"a.train": "3", "a.valid": "4", "b.train": "1", "b.valid": "2"}
    (tmp_path / "in" / "a.val.jsonl").unlink()
    with pytest.raises(InputError, match=r"a\.train\.jsonl has no a\.val\.jsonl beside it"):
        split_increments(SplitOptions((str(tmp_path / "in"),), tmp_path / "other"))


def test_a_duplicate_stays_in_the_earliest_increment_only(options: SplitOptions, tmp_path: Path) -> None:
    # Later dates first: the order of reading must not decide.
    copies = [{**line, "date": "2009-09-09"} for line in LINES[:100]]
    write_lines(tmp_path / "in.jsonl", copies + LINES + LINES[:50])
    result = split_increments(replace(options, deduplicate=True))
    assert result.duplicates == 150
    lines = [line for part in read_lines(options.output).values() for line in part]
    assert len({line["text"] for line in lines}) == len(lines) == len(LINES)
    increments = {line["text"]: name[:4] for name, part in read_lines(options.output).items() for line in part}
    first, last = LINES[0], LINES[-1]
    assert first["date"] < "2003" and increments[first["text"]] == "inc1"
    assert last["date"] > "2003" and increments[last["text"]] != "inc1"


def test_first_places_are_those_of_a_dictionary() -> None:
    chance = random.Random(6)
    texts = [(f"text {chance.randrange(400)}", chance.randrange(5)) for _ in range(2000)]
    places, earliest = FirstPlaces(), {}
    for number, (text, increment) in enumerate(texts):
        places.look(text, increment)
        earliest[text] = min(earliest.get(text, (increment, number)), (increment, number))
    expected = [earliest[text] == (increment, number) for number, (text, increment) in enumerate(texts)]
    assert [places.take() for _ in texts] == expected and 300 < sum(expected) <= 400
    with pytest.raises(RuntimeError, match="more texts"):
        places.take()


def test_lines_are_written_as_the_json_module_writes_them(options: SplitOptions, tmp_path: Path) -> None:
    every = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    lines = [{"text": every, "date": '2001-01-01T\u00e9"'}, *LINES]
    write_lines(tmp_path / "in.jsonl", lines)
    split_increments(options)
    written = b"".join((options.output / f"inc1.{part}.jsonl").read_bytes() for part in ("train", "valid"))
    assert json.dumps(lines[0], ensure_ascii=False).encode() + b"\n" in written


def test_a_replaced_split_is_recognised_when_its_input_has_moved(options: SplitOptions, tmp_path: Path) -> None:
    split_increments(options)
    write_lines(tmp_path / "in.jsonl", [*LINES, LINES[0]])
    with pytest.raises(InputError, match="made with different inputs"):
        split_increments(options)
    assert not split_increments(replace(options, overwrite=True)).up_to_date
    (tmp_path / "folder").mkdir()
    (tmp_path / "in.jsonl").rename(tmp_path / "folder" / "in.jsonl")
    assert split_increments(replace(options, input=(str(tmp_path / "folder" / "in.jsonl"),))).up_to_date


def test_progress_is_told(options: SplitOptions, capsys: pytest.CaptureFixture[str]) -> None:
    split_increments(replace(options, deduplicate=True, boundaries=(), parts=3, log_interval=900))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.startswith("960 documents, 100%, ") for line in lines)


def test_a_text_both_trained_on_and_held_out_is_kept_held_out(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.train.jsonl", [{"text": "both"}, {"text": "train"}])
    write_lines(tmp_path / "in" / "a.val.jsonl", [{"text": "both"}])
    split_increments(SplitOptions((str(tmp_path / "in"),), tmp_path / "out", deduplicate=True))
    assert read_lines(tmp_path / "out") == {"a.train": [{"text": "train"}], "a.valid": [{"text": "both"}]}


def test_run_again_it_is_up_to_date_until_something_changes(options: SplitOptions) -> None:
    assert not split_increments(options).up_to_date
    times = {path: path.stat().st_mtime_ns for path in options.output.iterdir()}
    assert split_increments(options).up_to_date
    assert {path: path.stat().st_mtime_ns for path in options.output.iterdir()} == times
    other = replace(options, held_out_modulo=8)
    with pytest.raises(InputError, match=r"different held_out_modulo; .*--overwrite"):
        split_increments(other)
    assert not split_increments(replace(other, overwrite=True)).up_to_date


def test_a_damaged_folder_of_ours_is_made_again(options: SplitOptions) -> None:
    split_increments(options)
    whole = read_lines(options.output)
    (options.output / "inc2.train.jsonl").write_text("cut")
    with pytest.raises(InputError, match=r"inc2\.train\.jsonl: missing, or not of the size"):
        read_increments(options.output)
    assert not split_increments(options).up_to_date
    assert read_lines(options.output) == whole


def test_the_input_is_never_replaced(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.train.jsonl", [{"text": "train"}])
    write_lines(tmp_path / "a.valid.jsonl", [{"text": "valid"}])
    options = SplitOptions((str(tmp_path),), tmp_path, overwrite=True)
    with pytest.raises(InputError, match="would replace the input"):
        split_increments(options)
    assert (tmp_path / "a.train.jsonl").read_text() == '{"text": "train"}\n'


def test_an_increment_without_text_is_refused_and_nothing_written(options: SplitOptions) -> None:
    with pytest.raises(InputError, match=r"increment inc3 gets no text .*--boundaries"):
        split_increments(replace(options, boundaries=("2003", "2030")))
    with pytest.raises(InputError, match=r"gets no held-out text; pass a smaller --held-out-modulo"):
        split_increments(replace(options, held_out_modulo=10**6))
    assert not list(options.output.iterdir())


def test_a_line_without_a_date_is_bad(options: SplitOptions, tmp_path: Path) -> None:
    write_lines(tmp_path / "in.jsonl", [*LINES, {"text": "a", "date": "yesterday"}, {"text": "b"}])
    with pytest.raises(InputError, match=r"in\.jsonl:961: 'date' is not a date \('yesterday'\)"):
        split_increments(options)
    result = split_increments(replace(options, on_bad_line="skip"))
    assert result.bad_lines_summary.startswith("2 bad lines skipped")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"parts": 2}, "exclude each other"),
        ({"boundaries": (), "parts": 0}, "--parts 0"),
        ({"boundaries": ()}, "pass --boundaries DATE ... or --parts N"),
        ({"boundaries": ("2010", "2009")}, "must lie after"),
        ({"boundaries": ("2010-13-01",)}, "--boundaries 2010-13-01: not a date"),
        ({"held_out_modulo": 1}, "--held-out-modulo 1"),
        ({"log_interval": 0}, "--log-interval 0"),
    ],
)
def test_impossible_options_are_refused(options: SplitOptions, values: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        split_increments(replace(options, **values))


@pytest.mark.parametrize(
    ("value", "day"),
    [
        ("2010", "2010-01-01"),
        ("2010-07", "2010-07-01"),
        ("2010-07-31", "2010-07-31"),
        ("2010-07-31T23:59:59Z", "2010-07-31"),
        ("2010-07-31 23:59", "2010-07-31"),
        ("2010-02-30", None),
        ("10-02-03", None),
        ("2010-07-311", None),
        ("", None),
    ],
)
def test_a_date_is_read_strictly(value: str, day: str | None) -> None:
    assert parse_day(value) == day
