"""Text in tables: parquet files, and the Arrow files of the folders that Hugging Face's ``datasets`` saves.

pyarrow reads both, where it is installed; it is imported only when such a file is read. A row is what a line is in a
file of JSON lines: rows are numbered from 1, and one without text under a key is bad. A table without the column is
another table than was meant, so that is an InputError whatever is done about bad rows.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megalrps.data.json_lines import BadDocument, Documents, UnusableError, text_of
from megalrps.errors import InputError

PARQUET_SUFFIX = ".parquet"
ARROW_SUFFIX = ".arrow"
COLUMNAR_SUFFIXES = (PARQUET_SUFFIX, ARROW_SUFFIX)

_BATCH_BYTES = 1 << 20
_MOST_ROWS = 4096
_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"


def is_columnar(path: Path | str) -> bool:
    """Whether the file ``path`` is a table, by its name."""
    return str(path).endswith(COLUMNAR_SUFFIXES)


def dataset_files(folder: Path, flag: str) -> list[Path] | None:
    """The Arrow files of a folder that ``Dataset.save_to_disk`` wrote, in order; None where it is no such folder.

    InputError for a folder of several splits, and for a view (rows chosen or shuffled by an index that is no Arrow
    column): its files alone would be other rows than the dataset's.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = _read_json(folder / "dataset_dict.json").get("splits", [])
        raise InputError(f"{flag} {folder}: a dataset of several splits ({', '.join(splits)}); name the folder of one")
    state_file = folder / "state.json"
    if not state_file.is_file():
        return None
    state = _read_json(state_file)
    if state.get("_indices_files"):
        raise InputError(
            f"{flag} {folder}: a view of other rows (selected or shuffled); save it with "
            "dataset.flatten_indices().save_to_disk(FOLDER) and name that folder"
        )
    names = [entry.get("filename") for entry in state.get("_data_files", []) if isinstance(entry, dict)]
    if not names or not all(isinstance(name, str) and (folder / name).is_file() for name in names):
        raise InputError(f"{flag} {folder}: state.json does not name its data files, or one is missing; save it again")
    return [folder / str(name) for name in names]


def count_groups(path: Path) -> int:
    """Row groups of a parquet file, or record batches of an Arrow file: what it can be cut at."""
    pyarrow = _pyarrow(path)
    try:
        if path.suffix == PARQUET_SUFFIX:
            with _parquet_file(path) as parquet:
                return int(parquet.num_row_groups)
        with pyarrow.memory_map(str(path)) as content:
            return sum(1 for _ in _arrow_batches(content))
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(path, error) from None


def read_groups(
    path: Path, start: int, stop: int, keys: Sequence[str], date_key: str | None = None
) -> Iterator[Documents]:
    """The documents of the row groups or record batches ``[start, stop)``, about a megabyte at a time."""
    pyarrow = _pyarrow(path)
    try:
        for batch in _batches(path, start, stop, keys, date_key):
            yield _documents(batch, keys, date_key)
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(path, error) from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path}: damaged ({error}); save the dataset again") from None
    return value if isinstance(value, dict) else {}


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"{path}: tables are read by pyarrow, which is not installed; pip install pyarrow") from None
    pyarrow.set_cpu_count(1)  # processes are what scales here
    return pyarrow


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(f"{path}: damaged, or not {path.suffix[1:]} ({error}); make or copy the file again")


def _parquet_file(path: Path) -> Any:
    from pyarrow import parquet

    # Without pre-buffering and with a small buffer a column is read page by page: a row group may be gigabytes.
    return parquet.ParquetFile(path, pre_buffer=False, buffer_size=_BATCH_BYTES)


def _batches(path: Path, start: int, stop: int, keys: Sequence[str], date_key: str | None) -> Iterator[Any]:
    """Record batches of about a megabyte that hold the columns asked for."""
    if path.suffix == PARQUET_SUFFIX:
        with _parquet_file(path) as parquet:
            columns = _columns(path, parquet.schema_arrow.names, keys, date_key)
            groups = [parquet.metadata.row_group(number) for number in range(start, stop)]
            size = sum(
                group.column(place).total_uncompressed_size
                for group in groups
                for place in range(group.num_columns)
                if group.column(place).path_in_schema in columns
            )
            rows = _rows_at_once(size, sum(group.num_rows for group in groups))
            wanted = list(range(start, stop))
            yield from parquet.iter_batches(rows, row_groups=wanted, columns=columns, use_threads=False)
        return
    with _pyarrow(path).memory_map(str(path)) as content:
        for number, batch in enumerate(_arrow_batches(content)):
            if number >= stop:
                return
            if number >= start:
                columns = _columns(path, batch.schema.names, keys, date_key)
                rows = _rows_at_once(batch.nbytes, batch.num_rows)
                for first in range(0, batch.num_rows, rows):
                    yield batch.slice(first, rows).select(columns)


def _arrow_batches(content: Any) -> Iterator[Any]:
    """The record batches of an Arrow file in either of its two forms; mapped, none is read to get past it."""
    from pyarrow import ipc

    if bytes(content.read(6)) == b"ARROW1":
        reader = ipc.open_file(content)
        yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
    else:
        # A stream that is cut between two batches still reads well: only its own end mark tells.
        content.seek(max(0, content.size() - len(_STREAM_END)))
        if bytes(content.read(len(_STREAM_END))) != _STREAM_END:
            raise OSError("cut short: it has no end mark")
        content.seek(0)
        yield from ipc.open_stream(content)


def _columns(path: Path, names: Sequence[str], keys: Sequence[str], date_key: str | None) -> list[str]:
    missing = [key for key in keys if key not in names]
    if missing:
        raise InputError(f"{path}: has no column {missing[0]!r}; it has {', '.join(names)}")
    return list(dict.fromkeys([*keys, date_key] if date_key is not None and date_key in names else keys))


def _rows_at_once(size: int, rows: int) -> int:
    return max(1, min(_MOST_ROWS, _BATCH_BYTES * rows // max(size, 1)))


def _documents(batch: Any, keys: Sequence[str], date_key: str | None) -> Documents:
    columns = {name: _as_written(batch.column(place)) for place, name in enumerate(batch.schema.names)}
    dates = columns[date_key].to_pylist() if date_key in columns else [None] * batch.num_rows
    if date_key is None:
        dates = []
    try:
        texts = [columns[key].to_pylist() for key in keys]
    except UnicodeDecodeError:
        texts = [[None]]
    if all(set(map(type, each)) <= {str} for each in texts):
        return Documents(texts, range(1, batch.num_rows + 1), dates, [], batch.num_rows)
    return _singly({key: columns[key] for key in keys}, dates)


def _as_written(column: Any) -> Any:
    """``column``, dates and times as ISO texts."""
    from pyarrow import types

    return column.cast("string") if types.is_date(column.type) or types.is_timestamp(column.type) else column


def _singly(columns: dict[str, Any], dates: list[Any]) -> Documents:
    found = Documents([[] for _ in columns], [], [], [], len(next(iter(columns.values()))))
    numbers: list[int] = []
    for row in range(found.lines):
        try:
            value = {key: _python_value(column[row]) for key, column in columns.items()}
            row_texts = [text_of(value, key) for key in columns]
        except UnusableError as error:
            found.bad.append(BadDocument(row + 1, error.kind, error.detail))
            continue
        for each, text in zip(found.texts, row_texts, strict=True):
            each.append(text)
        numbers.append(row + 1)
        found.dates.extend(dates[row : row + 1])
    found.numbers = numbers
    return found


def _python_value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        raise UnusableError("not UTF-8", f"byte {error.start + 1}") from None
