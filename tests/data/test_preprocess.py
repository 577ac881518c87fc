"""From JSON lines to Megatron's files: the bytes, whatever the workers; nothing replaced by mistake."""

import gzip
import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import zstandard
from small_preprocessing import TEXTS, changed, contents, small_options, write_lines

from megalrps.data.fast_check import CheckedTokenizer
from megalrps.data.increment import open_increment
from megalrps.data.manifest import read_manifest
from megalrps.data.preprocess import describe_result, preprocess
from megalrps.data.preprocess_options import (
    PreprocessOptions,
    WorkOptions,
)
from megalrps.data.tokenizer import Encoded
from megalrps.errors import InputError
from megalrps.fingerprint import file_digest


@pytest.fixture
def options(tmp_path: Path, tokenizer_model: Path) -> PreprocessOptions:
    return small_options(tmp_path, tokenizer_model)


@pytest.mark.parametrize("append_eod", [True, False])
def test_the_files_are_megatrons_byte_for_byte(options: PreprocessOptions, append_eod: bool) -> None:
    # The expectation is written out from the format's description: a document without tokens gets no end-of-document
    # token and no sequence, yet an entry in the document array.
    reference = sentencepiece.SentencePieceProcessor(model_file=str(options.tokenizer.tokenizer_model))
    documents = [reference.encode(text) for text in TEXTS]
    sequences = [ids + [2] * append_eod for ids in documents if ids]
    lengths = np.array([len(ids) for ids in sequences])
    array = np.cumsum([0, *(bool(ids) for ids in documents)])
    header = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, len(sequences), len(array))
    pointers = np.cumsum([0, *lengths[:-1]]) * 2
    index = header + lengths.astype("<i4").tobytes() + pointers.astype("<i8").tobytes() + array.astype("<i8").tobytes()
    preprocess(changed(options, "output", append_eod=append_eod))
    prefix = f"{options.output.output_prefix}_text_document"
    assert Path(f"{prefix}.bin").read_bytes() == np.concatenate(sequences).astype("<u2").tobytes()
    assert Path(f"{prefix}.idx").read_bytes() == index


def test_the_output_is_the_same_for_any_number_of_workers(
    options: PreprocessOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preprocess(options)
    monkeypatch.setattr("megalrps.data.parts.plan_parts.__defaults__", (2000,))
    other = changed(options, "output", output_prefix=tmp_path / "other" / "v1")
    preprocess(changed(other, "work", workers=2))
    assert contents(tmp_path / "other") == contents(tmp_path / "out")


def test_the_manifest_counts_documents_text_and_tokens(options: PreprocessOptions) -> None:
    result = preprocess(changed(options, "output", name="january"))
    prefix = f"{options.output.output_prefix}_text_document"
    manifest = open_increment(prefix, verify=True).manifest
    assert result.datasets == {Path(prefix): manifest}
    assert (manifest.name, manifest.documents, manifest.sequences) == ("january", len(TEXTS), len(TEXTS) - 2)
    assert manifest.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert (manifest.append_eod, manifest.dtype, manifest.sources) == (True, "uint16", options.text.input)
    assert manifest.tokenizer.fingerprint == file_digest(options.tokenizer.tokenizer_model)
    assert result.empty_documents == {"text": 2}
    assert f"{len(TEXTS):,} documents (2 empty)" in "\n".join(describe_result(result))


def test_several_files_are_one_increment_in_their_order(options: PreprocessOptions, tmp_path: Path) -> None:
    preprocess(options)
    write_lines(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS[:1500]])
    write_lines(tmp_path / "b.jsonl", [{"text": text} for text in TEXTS[1500:]])
    split = changed(options, "text", input=(f"{tmp_path}/[ab].jsonl",))
    preprocess(changed(split, "output", output_prefix=tmp_path / "two" / "v1"))
    for suffix in ("bin", "idx"):
        name = f"v1_text_document.{suffix}"
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_each_key_is_a_dataset_of_its_own(options: PreprocessOptions) -> None:
    result = preprocess(changed(options, "text", json_keys=("text", "title")))
    assert [(path.name, manifest.name) for path, manifest in result.datasets.items()] == [
        ("v1_text_document", "v1-text"),
        ("v1_title_document", "v1-title"),
    ]
    text, title = result.datasets.values()
    assert text.documents == title.documents == len(TEXTS)
    assert title.text_bytes == sum(len(text[:4].encode()) for text in TEXTS)


def test_run_again_it_touches_nothing(options: PreprocessOptions, tmp_path: Path) -> None:
    first = preprocess(options)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    # The same text under another name, and other work for the same output, is still the same.
    (tmp_path / "in.jsonl").rename(tmp_path / "moved.jsonl")
    moved = changed(options, "text", input=(str(tmp_path / "moved.jsonl"),))
    again = preprocess(changed(moved, "work", workers=2))
    assert (first.up_to_date, again.up_to_date) == (False, True)
    assert again.datasets == first.datasets
    assert again.empty_documents == first.empty_documents
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == times


@pytest.mark.parametrize(
    ("section", "values", "named"),
    [
        ("output", {"append_eod": False}, "append_eod"),
        ("output", {"name": "other"}, "names"),
        ("text", {"on_bad_line": "skip"}, "on_bad_line"),
    ],
)
def test_a_dataset_of_other_options_is_replaced_only_on_demand(
    options: PreprocessOptions, tmp_path: Path, section: str, values: dict[str, Any], named: str
) -> None:
    preprocess(options)
    before = contents(tmp_path / "out")
    other = changed(options, section, **values)
    with pytest.raises(InputError, match=rf"v1_text_document.* different {named}; .*--overwrite"):
        preprocess(other)
    assert contents(tmp_path / "out") == before
    assert not preprocess(changed(other, "output", overwrite=True)).up_to_date
    assert preprocess(other).up_to_date


def test_other_text_or_another_tokenizer_is_noticed(options: PreprocessOptions, tmp_path: Path) -> None:
    preprocess(options)
    content = options.tokenizer.tokenizer_model.read_bytes()
    (tmp_path / "other.model").write_bytes(content + b"\x12\x00")  # an empty field more: same pieces, another file
    with pytest.raises(InputError, match="different tokenizer"):
        preprocess(changed(options, "tokenizer", tokenizer_model=tmp_path / "other.model"))
    with open(tmp_path / "in.jsonl", "a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(InputError, match="different inputs"):
        preprocess(options)


def test_an_unfinished_or_damaged_output_of_ours_is_made_again(options: PreprocessOptions, tmp_path: Path) -> None:
    preprocess(options)
    whole = contents(tmp_path / "out")
    for name in ("v1_text_document.json", "v1_text_document.bin", "v1_text_document.idx"):
        path = tmp_path / "out" / name
        path.unlink()
        assert not preprocess(options).up_to_date
        assert contents(tmp_path / "out") == whole
        path.write_bytes(path.read_bytes()[:-2])
        assert not preprocess(options).up_to_date
        assert contents(tmp_path / "out") == whole


def test_a_dataset_of_another_tool_is_not_replaced(options: PreprocessOptions, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "v1_text_document.bin").write_bytes(b"precious")
    with pytest.raises(InputError, match="no record"):
        preprocess(options)
    assert contents(tmp_path / "out") == {"v1_text_document.bin": b"precious"}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_line_stops_the_run_or_is_counted(options: PreprocessOptions, tmp_path: Path, workers: int) -> None:
    options = changed(options, "work", workers=workers)
    with open(tmp_path / "in.jsonl", "ab") as file:
        file.write(b'{"title": "no text"}\nnot json\n{"text": "good"}\n')
    with pytest.raises(InputError, match=rf"in\.jsonl:{len(TEXTS) + 1}: no key 'text'"):
        preprocess(options)
    assert contents(tmp_path / "out") == {}
    result = preprocess(changed(options, "text", on_bad_line="skip"))
    (manifest,) = result.datasets.values()
    assert (manifest.documents, result.bad_lines) == (len(TEXTS) + 1, 2)
    assert f"1 x not JSON (first: {tmp_path}/in.jsonl:{len(TEXTS) + 2})" in result.bad_lines_summary


def test_a_failed_replacement_leaves_the_old_dataset(options: PreprocessOptions, tmp_path: Path) -> None:
    preprocess(options)
    before = contents(tmp_path / "out")
    with open(tmp_path / "in.jsonl", "a") as file:
        file.write("not json\n")
    with pytest.raises(InputError, match="not JSON"):
        preprocess(changed(options, "output", overwrite=True))
    assert contents(tmp_path / "out") == before
    read_manifest(tmp_path / "out" / "v1_text_document")


def test_input_without_any_token_is_refused(options: PreprocessOptions, tmp_path: Path) -> None:
    write_lines(tmp_path / "in.jsonl", [{"text": ""}])
    with pytest.raises(InputError, match="hold no token"):
        preprocess(options)
    assert contents(tmp_path / "out") == {}


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("work", {"workers": 0}, "--workers 0"),
        ("work", {"log_interval": 0}, "--log-interval 0"),
        ("text", {"json_keys": ()}, "--json-keys"),
        ("text", {"json_keys": ("text", "text")}, "--json-keys"),
        ("output", {"name": "a/b"}, "--name 'a/b'"),
        ("tokenizer", {"tokenizer_model": Path("absent.model")}, r"--tokenizer-model absent\.model"),
    ],
)
def test_impossible_options_are_refused(
    options: PreprocessOptions, section: str, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        preprocess(changed(options, section, **values))


def test_compressed_input_and_tables_give_the_same_files(options: PreprocessOptions, tmp_path: Path) -> None:
    preprocess(options)
    lines = (tmp_path / "in.jsonl").read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(lines))
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "a.parquet", row_group_size=700)
    for name in ("a.jsonl.gz", "a.jsonl.zst", "a.parquet"):
        other = changed(options, "text", input=(str(tmp_path / name),))
        preprocess(changed(other, "output", output_prefix=tmp_path / name[2:] / "v1"))
        for suffix in ("bin", "idx"):
            file = f"v1_text_document.{suffix}"
            assert (tmp_path / name[2:] / file).read_bytes() == (tmp_path / "out" / file).read_bytes(), name


def test_the_fast_tokenizer_and_the_reference_give_the_same_files(options: PreprocessOptions, tmp_path: Path) -> None:
    preprocess(options)
    other = changed(options, "tokenizer", tokenizer_backend="reference")
    result = preprocess(changed(other, "output", output_prefix=tmp_path / "other" / "v1"))
    assert result.tokenizer.startswith("sentencepiece ")
    assert contents(tmp_path / "other") == contents(tmp_path / "out")


def test_long_documents_have_the_same_tokens_in_pieces(
    options: PreprocessOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [*(" ".join(TEXTS[number : number + 60]) for number in range(0, 2000, 50)), "", "short  "]
    write_lines(tmp_path / "in.jsonl", [{"text": text} for text in texts])
    preprocess(options)
    for name, value in {"json_lines.LONG_LINE": 9, "long_lines._LONG_STRING": 5, "encode._PIECE_BYTES": 50}.items():
        monkeypatch.setattr(f"megalrps.data.{name}", value)
    batches: list[int] = []
    encode = CheckedTokenizer.encode_batch

    def counted(self: CheckedTokenizer, texts: Sequence[str]) -> Encoded:
        batches.append(len(texts))
        return encode(self, texts)

    monkeypatch.setattr(CheckedTokenizer, "encode_batch", counted)
    preprocess(changed(options, "output", output_prefix=tmp_path / "other" / "v1"))
    assert contents(tmp_path / "other") == contents(tmp_path / "out")
    pytest.importorskip("megalrps._native")
    assert set(batches) == {1} and len(batches) > 5 * len(texts)


def test_dates_are_told(options: PreprocessOptions, tmp_path: Path) -> None:
    dates = ["2021-03", "2019-12-31T23:00:00Z", "soon", None, 2020]
    write_lines(tmp_path / "in.jsonl", [{"text": "a text", "date": date} for date in dates] + [{"text": "none"}])
    result = preprocess(changed(options, "text", date_key="date"))
    assert "dates 2019-12-31..2021-03-01, 4 documents without one" in "\n".join(describe_result(result))
    again = preprocess(changed(options, "text", date_key="date"))
    assert again.up_to_date and again.results == result.results


def test_progress_is_a_plain_line_where_there_is_no_terminal(
    options: PreprocessOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    options = changed(options, "tokenizer", tokenizer_backend="reference")
    preprocess(replace(options, work=WorkOptions(log_interval=1000)))
    which, *lines = capsys.readouterr().err.splitlines()
    assert which.startswith("tokenizing with sentencepiece ")
    assert [line.split(" documents, ")[0] for line in lines] == [f"{len(TEXTS):,}"]
    assert all("100%" in line and "MB/s" in line and line.endswith(" 0 s left") for line in lines)
