"""Reading JSON lines: compressions, places of bad lines, damaged files."""

import gzip
import json
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megalrps.data.text import BadLines, expand_inputs, read_records
from megalrps.errors import InputError

COMPRESSIONS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


def write(folder: Path, content: bytes, suffix: str = "", name: str = "text.jsonl") -> Path:
    path = folder / f"{name}{suffix}"
    path.write_bytes(COMPRESSIONS[suffix](content))
    return path


def read_texts(*paths: Path, on_bad_line: str = "error") -> list[str]:
    return [record.values[0] for record in read_records(paths, ("text",), BadLines(on_bad_line))]


@pytest.mark.parametrize("suffix", COMPRESSIONS)
@settings(deadline=None, max_examples=15)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), max_size=20))
def test_every_text_comes_back_in_order(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, texts: list[str]
) -> None:
    content = "".join(json.dumps({"text": text}, ensure_ascii=len(text) % 2 == 0) + "\n" for text in texts).encode()
    path = write(tmp_path_factory.mktemp("texts"), content, suffix)
    assert read_texts(path) == texts


def test_lines_longer_than_a_block_and_a_missing_last_newline(tmp_path: Path) -> None:
    texts = ["a" * 700_000, "b", "c" * 300_000]
    path = write(tmp_path, "\n".join(json.dumps({"text": text}) for text in texts).encode())
    assert read_texts(path) == texts


def test_blank_lines_are_no_documents_but_count_as_lines(tmp_path: Path) -> None:
    path = write(tmp_path, b'\n{"text": "a"}\r\n  \n{"text": "b"}\n\n')
    records = list(read_records([path], ("text",), BadLines("error")))
    assert [(record.number, record.values) for record in records] == [(2, ("a",)), (4, ("b",))]


def test_zstandard_frames_and_gzip_members_may_follow_one_another(tmp_path: Path) -> None:
    parts = [b'{"text": "a"}\n{"te', b'xt": "b"}\n']
    for suffix in (".zst", ".gz"):
        path = tmp_path / f"two.jsonl{suffix}"
        path.write_bytes(b"".join(COMPRESSIONS[suffix](part) for part in parts))
        assert read_texts(path) == ["a", "b"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_file_cut_short_is_refused_not_read_in_part(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path, b'{"text": "a"}\n' * 50_000, suffix)
    path.write_bytes(path.read_bytes()[:-6])
    with pytest.raises(InputError, match=r"text\.jsonl.*cut short"):
        read_texts(path, on_bad_line="skip")


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_file_that_is_not_compressed_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"plain.jsonl{suffix}"
    path.write_bytes(b'{"text": "a"}\n')
    with pytest.raises(InputError, match="damaged"):
        read_texts(path)


BAD_LINES = {
    b'{"text": "a"': "not JSON",
    b"[" * 100_000: "not JSON",
    b'{"text": "\xff"}': "not UTF-8",
    b'["a"]': "not a JSON object",
    b'{"txt": "a"}': "no key 'text' (it has txt)",
    b'{"text": 5}': "'text' is not a text (int)",
    b'{"text": null}': "'text' is not a text",
    b'{"text": "\\ud800"}': "'text' holds a lone surrogate",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: repr(line[:20]))
def test_a_bad_line_stops_with_its_place_or_is_counted(tmp_path: Path, line: bytes) -> None:
    path = write(tmp_path, b'{"text": "a"}\n\n' + line + b'\n{"text": "b"}\n')
    with pytest.raises(InputError) as caught:
        read_texts(path)
    assert str(caught.value).startswith(f"{path}:3: {BAD_LINES[line]}")
    assert "--on-bad-line skip" in str(caught.value)
    bad_lines = BadLines("skip")
    assert [record.values for record in read_records([path], ("text",), bad_lines)] == [("a",), ("b",)]
    assert bad_lines.counts.total() == 1
    assert f"(first: {path}:3)" in bad_lines.describe()


def test_documents_before_a_bad_line_are_handed_out_first(tmp_path: Path) -> None:
    path = write(tmp_path, b'{"text": "a"}\n{}\n{"text": "b"}\n')
    records = read_records([path], ("text",), BadLines("error"))
    assert next(records).values == ("a",)
    with pytest.raises(InputError, match=":2: no key 'text'"):
        next(records)


def test_who_asks_hears_how_much_is_read(tmp_path: Path) -> None:
    first = write(tmp_path, b'{"text": "a"}\n' * 120_000, ".gz", "a.jsonl")
    second = write(tmp_path, b'{"text": "b"}\n', name="b.jsonl")
    heard: list[tuple[int, int]] = []
    records = read_records([first, second], ("text",), BadLines("error"), lambda *each: heard.append(each))
    assert sum(1 for _ in records) == sum(documents for documents, _ in heard) == 120_001
    assert sum(read for _, read in heard) == first.stat().st_size + second.stat().st_size
    assert len(heard) > 2


def test_a_line_is_bad_as_a_whole_if_one_of_several_keys_is(tmp_path: Path) -> None:
    path = write(tmp_path, b'{"a": "1", "b": "2"}\n{"a": "3"}\n')
    bad_lines = BadLines("skip")
    assert [record.values for record in read_records([path], ("a", "b"), bad_lines)] == [("1", "2")]
    assert bad_lines.first["no key 'b'"].number == 2


def test_inputs_are_files_folders_and_globs(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl.gz", "c.jsonl.zst", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in expand_inputs([str(tmp_path)])] == ["a.jsonl.gz", "b.jsonl", "c.jsonl.zst"]
    assert [path.name for path in expand_inputs([f"{tmp_path}/c*", f"{tmp_path}/*.txt"])] == [
        "c.jsonl.zst",
        "notes.txt",
    ]


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "[a].jsonl").write_bytes(b"")
    assert expand_inputs([f"{tmp_path}/[a].jsonl"]) == (tmp_path / "[a].jsonl",)


def test_inputs_that_cannot_be_meant_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, b"")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="is empty"):
        expand_inputs([])
    with pytest.raises(InputError, match="no such file"):
        expand_inputs([str(tmp_path / "absent.jsonl")])
    with pytest.raises(InputError, match="holds no file"):
        expand_inputs([str(tmp_path / "empty")])
    with pytest.raises(InputError, match="named twice"):
        expand_inputs([str(path), f"{tmp_path}/*.jsonl"])


def test_a_byte_order_mark_before_the_first_line_is_no_part_of_it(tmp_path):
    path = tmp_path / "marked.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\n{"text": "two"}\n')
    records = list(read_records(expand_inputs([str(path)]), ("text",), BadLines("error")))
    assert [record.values for record in records] == [("one",), ("two",)]
