"""A folder of text increments: the form in which text waits to become datasets, whoever made it.

``NAME.train.jsonl`` and ``NAME.valid.jsonl`` for each increment, and ``increments.json``, which names them in the order
in which they arrived. ``tools/split_increments.py`` and ``tools/make_corpus.py`` write such folders.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import orjson

from megalrps.data.manifest import check_increment_name
from megalrps.data.recipe import is_ours
from megalrps.data.text import text_files
from megalrps.errors import InputError
from megalrps.files import replacing, write_json

FORMAT = "megalrps-text-increments"
VERSION = 1
INDEX_NAME = "increments.json"
RECORD_NAME = "recipe.json"
"""The record of how the folder was made (see :mod:`megalrps.data.recipe`)."""


@dataclass(frozen=True)
class TextPart:
    """One file of JSON lines, each with its document under ``text``."""

    file: str
    """Name of the file in the folder."""
    file_bytes: int
    documents: int
    text_bytes: int
    """UTF-8 bytes of the texts."""
    first_date: str | None = None
    last_date: str | None = None


@dataclass(frozen=True)
class TextIncrement:
    """One increment: what is trained on, and what releases are evaluated on."""

    name: str
    train: TextPart
    valid: TextPart


def is_held_out(text: str, modulo: int) -> bool:
    """Whether ``text`` belongs to the held-out part: one in ``modulo``, by its hash, wherever it turns up."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % modulo == 0


def increment_files(folder: Path, names: Sequence[str]) -> list[Path]:
    """All the files of a folder with the increments ``names``, its index last."""
    parts = [folder / f"{name}.{part}.jsonl" for name in names for part in ("train", "valid")]
    return [*parts, folder / INDEX_NAME]


def read_increments(folder: Path | str) -> tuple[TextIncrement, ...]:
    """The increments of ``folder``, oldest first; InputError where the folder is not whole."""
    path = Path(folder) / INDEX_NAME
    mend = "make the folder again (tools/split_increments.py or tools/make_corpus.py)"
    try:
        value = json.loads(path.read_bytes())
        if value["format"] != FORMAT or value["version"] != VERSION:
            raise ValueError(f"not {FORMAT} of version {VERSION}")
        increments = tuple(
            TextIncrement(each["name"], TextPart(**each["train"]), TextPart(**each["valid"]))
            for each in value["increments"]
        )
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {mend}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged ({error!r}); {mend}") from None
    for increment in increments:
        for part in (increment.train, increment.valid):
            file = path.with_name(part.file)
            if not file.is_file() or file.stat().st_size != part.file_bytes:
                raise InputError(f"{file}: missing, or not of the size that {INDEX_NAME} says; {mend}")
    return increments


def is_finished(folder: Path, recipe: Mapping[str, Any], overwrite: bool) -> bool:
    """Whether ``folder`` holds the increments of ``recipe``, whole; InputError, unless ``overwrite``, if others."""
    existing = text_files(folder) if folder.is_dir() else []
    if not is_ours(folder / RECORD_NAME, recipe, [*existing, folder / INDEX_NAME], overwrite):
        return False
    try:
        read_increments(folder)
    except InputError:
        return False  # ours, but unfinished or damaged since: the very same is made again
    return True


class TextIncrementsWriter:
    """Writes a folder of increments; a context manager. Nothing is visible before the block ends without an exception.

    ``source`` is kept in the index: what the text is. Existing files of these names are replaced.
    """

    def __init__(self, folder: Path, names: Sequence[str], source: Mapping[str, Any]) -> None:
        for name in names:
            check_increment_name(name)
        self._folder = folder
        self._names = tuple(names)
        self._source = dict(source)
        self._stack = ExitStack()
        self._parts: dict[tuple[str, bool], _PartWriter] = {}
        self.increments: tuple[TextIncrement, ...] = ()
        """What was written; empty until the block has ended."""

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        for name in self._names:
            for held_out in (False, True):
                path = self._folder / f"{name}.{'valid' if held_out else 'train'}.jsonl"
                self._parts[name, held_out] = _PartWriter(path.name, self._stack.enter_context(replacing(path)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self._stack.__exit__(kind, error, traceback)
            return
        index = self._folder / INDEX_NAME
        index.unlink(missing_ok=True)  # it must never describe files that it was not written with
        self._stack.close()
        self.increments = tuple(
            TextIncrement(name, self._parts[name, False].finished(), self._parts[name, True].finished())
            for name in self._names
        )
        increments = [asdict(increment) for increment in self.increments]
        write_json(index, {"format": FORMAT, "version": VERSION, "source": self._source, "increments": increments})

    def add(self, name: str, text: str, held_out: bool, date: str | None = None) -> None:
        """Append one document to the held-out or the training part of the increment ``name``."""
        self._parts[name, held_out].add(text, date)

    def text_bytes(self, name: str, held_out: bool) -> int:
        """UTF-8 bytes of text added so far to one part."""
        return self._parts[name, held_out].text_bytes


class _PartWriter:
    def __init__(self, file_name: str, file: IO[bytes]) -> None:
        self._file_name = file_name
        self._file = file
        self._file_bytes = 0
        self._documents = 0
        self._dates: tuple[str, str] | None = None
        self.text_bytes = 0

    def add(self, text: str, date: str | None) -> None:
        # As json.dumps spaces it; orjson writes the texts just as that does, in a tenth of the time.
        dated = b"" if date is None else b', "date": ' + orjson.dumps(date)
        self._file_bytes += self._file.write(b'{"text": ' + orjson.dumps(text) + dated + b"}\n")
        self._documents += 1
        self.text_bytes += len(text) if text.isascii() else len(text.encode())
        if date is not None:
            first, last = self._dates or (date, date)
            self._dates = min(first, date), max(last, date)

    def finished(self) -> TextPart:
        first, last = self._dates or (None, None)
        return TextPart(self._file_name, self._file_bytes, self._documents, self.text_bytes, first, last)


def describe_increments(increments: Sequence[TextIncrement]) -> str:
    """A line for each increment: its parts, documents and bytes."""
    width = max(len(increment.name) for increment in increments)
    return "\n".join(
        f"  {each.name:{width}}  train {_describe_part(each.train)}, held out {_describe_part(each.valid)}"
        for each in increments
    )


def _describe_part(part: TextPart) -> str:
    dates = f" of {part.first_date}..{part.last_date}" if part.first_date else ""
    return f"{part.documents:,} documents, {part.text_bytes:,} bytes{dates}"
