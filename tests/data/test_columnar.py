"""Tables as input: parquet and the folders of Hugging Face datasets, beside the same documents as JSON lines."""

import json
import sys
from datetime import date
from pathlib import Path

import pytest

from megalrps.data.columnar import count_groups, dataset_files
from megalrps.data.parts import plan_parts, read_part
from megalrps.data.text import BadLines, expand_inputs, read_records
from megalrps.errors import InputError

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

TEXTS = [f"text {number} é日🦊" + "x" * (number * 37 % 400) for number in range(900)]


def write_parquet(path: Path, columns: dict[str, object], rows: int = 100) -> Path:
    parquet.write_table(pyarrow.table(columns), path, row_group_size=rows)
    return path


def write_arrow(path: Path, columns: dict[str, object], *, form: str = "stream", rows: int = 100) -> Path:
    table = pyarrow.table(columns)
    new = pyarrow.ipc.new_stream if form == "stream" else pyarrow.ipc.new_file
    with pyarrow.OSFile(str(path), "wb") as file, new(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)
    return path


def write_dataset(folder: Path, **state: object) -> Path:
    """A folder as ``Dataset.save_to_disk`` leaves it."""
    folder.mkdir()
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    write_arrow(folder / names[0], {"text": TEXTS[:500]})
    write_arrow(folder / names[1], {"text": TEXTS[500:]})
    content = {"_data_files": [{"filename": name} for name in names], "_split": "train", **state}
    (folder / "state.json").write_text(json.dumps(content))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def read_texts(*paths: Path) -> list[str]:
    return [record.values[0] for record in read_records(paths, ("text",), BadLines("error"))]


@pytest.mark.parametrize("kind", ["parquet", "stream", "file", "large_string", "dictionary"])
def test_the_rows_are_the_documents_in_order_whatever_the_parts(tmp_path: Path, kind: str) -> None:
    column = pyarrow.array(TEXTS, pyarrow.large_string() if kind == "large_string" else None)
    columns = {"id": range(len(TEXTS)), "text": column.dictionary_encode() if kind == "dictionary" else column}
    if kind in ("stream", "file"):
        path = write_arrow(tmp_path / "a.arrow", columns, form=kind)
    else:
        path = write_parquet(tmp_path / "a.parquet", columns)
    assert read_texts(path) == TEXTS
    assert count_groups(path) == 9
    for part_bytes in (1, path.stat().st_size // 4, 1 << 30):
        parts = list(plan_parts([path], tmp_path, part_bytes))
        assert len(parts) == {1: 9, 1 << 30: 1}.get(part_bytes, 5)
        assert parts[-1].stored_stop == path.stat().st_size
        texts = [text for part in parts for documents in read_part(part, ["text"]) for text in documents.texts[0]]
        assert texts == TEXTS


def test_a_saved_dataset_is_its_files_and_a_view_of_one_is_refused(tmp_path: Path) -> None:
    paths = expand_inputs([str(write_dataset(tmp_path / "data"))])
    assert [path.name[:10] for path in paths] == ["data-00000", "data-00001"]
    assert read_texts(*paths) == TEXTS
    view = write_dataset(tmp_path / "view", _indices_files=[{"filename": "indices.arrow"}])
    with pytest.raises(InputError, match=r"--input .*view: a view of other rows.*flatten_indices"):
        expand_inputs([str(view)])
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(InputError, match=r"several splits \(train, test\); name the folder of one"):
        expand_inputs([str(tmp_path)])
    (tmp_path / "data" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(InputError, match=r"state\.json does not name its data files, or one is missing"):
        dataset_files(tmp_path / "data", "--input")


def test_a_folder_may_hold_lines_and_tables(tmp_path: Path) -> None:
    write_parquet(tmp_path / "b.parquet", {"text": ["b"]})
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    assert read_texts(*expand_inputs([str(tmp_path)])) == ["a", "b"]


def test_a_row_without_text_is_bad_and_a_table_without_the_column_is_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"text": ["a", None, "b"]})
    with pytest.raises(InputError, match=r"a\.parquet:2: 'text' is not a text \(NoneType\)"):
        read_texts(path)
    bad_lines = BadLines("skip")
    assert [record.number for record in read_records([path], ("text",), bad_lines)] == [1, 3]
    assert bad_lines.counts.total() == 1
    with pytest.raises(InputError, match=r"a\.parquet: has no column 'body'; it has text"):
        list(read_records([path], ("body",), BadLines("skip")))


def test_bytes_that_are_no_utf_8_are_a_bad_row(tmp_path: Path) -> None:
    offsets = pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0")
    column = pyarrow.StringArray.from_buffers(3, offsets, pyarrow.py_buffer(b"a\xffb"))
    path = write_arrow(tmp_path / "a.arrow", {"text": column})
    bad_lines = BadLines("skip")
    assert [record.values[0] for record in read_records([path], ("text",), bad_lines)] == ["a", "b"]
    assert bad_lines.first["not UTF-8"].number == 2


def test_dates_of_any_type_are_read_as_iso_texts(tmp_path: Path) -> None:
    days = [date(2020, 5, 17), None]
    path = write_parquet(tmp_path / "a.parquet", {"text": ["a", "b"], "date": pyarrow.array(days)})
    (part,) = plan_parts([path], tmp_path)
    (documents,) = read_part(part, ["text"], "date")
    assert documents.dates == ["2020-05-17", None]
    (documents,) = read_part(part, ["text"], "no_such_column")
    assert documents.dates == [None, None]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_damaged_table_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write_parquet(path, {"text": TEXTS}) if name == "a.parquet" else write_arrow(path, {"text": TEXTS})
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], content[:-8], b"", b"PAR1"):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=f"{name}: damaged"):
            read_texts(path)


def test_without_pyarrow_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"text": TEXTS})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"a\.parquet: .* pip install pyarrow"):
        read_texts(path)
