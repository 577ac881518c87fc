"""The folder of unfinished work: the files of finished parts, and a journal that says which these are.

A part's file is written under a partial name, then renamed, then entered in the journal; nothing waits for the disk.
What a kill leaves behind is therefore whole or not in the journal, and what a power cut leaves is found out by the
digests: a part whose file is not what the journal says is done again.
"""

import json
import os
import secrets
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from megalrps.data.encode import PART_SUFFIX, EncodedPart, part_path, partial_part_path
from megalrps.errors import InputError
from megalrps.files import write_all
from megalrps.fingerprint import canonical_json, file_digest, fingerprint

VERSION = 1
JOURNAL_NAME = "journal"


class Work:
    """The folder of one unfinished output; a context manager. Whoever enters it holds the output's lock.

    ``identity`` is all that parts depend on: what was begun under another one is begun anew. A folder in which no part
    is finished is removed at the end.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self.run = secrets.token_hex(4)
        """In the partial names of this run: what a killed run's last worker still writes is never taken for ours."""
        self._header = {"version": VERSION, "identity": fingerprint(dict(identity))}
        self._places: dict[int, int] = {}  # of finished parts: where their lines of the journal begin
        self._journal = -1

    def __enter__(self) -> Self:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._open_journal()
        except OSError as error:
            raise InputError(
                f"{self.folder}: cannot be written ({error.strerror}); choose another output directory"
            ) from error
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._journal)
        if not self._places:
            self.discard()

    def discard(self) -> None:
        """Remove the folder."""
        self._places = {}
        discard_work(self.folder)

    def finished(self, number: int) -> EncodedPart | None:
        """What an earlier run made of part ``number``, if its files still are what it made."""
        if number not in self._places:
            return None
        part = EncodedPart.from_json(self._read(self._places[number]))
        for place, texts in enumerate(part.texts.values()):
            path = part_path(self.folder, number, place)
            if not path.is_file() or file_digest(path) != texts.digest:
                del self._places[number]
                return None
        return part

    def accept(self, part: EncodedPart) -> None:
        """Keep the files of ``part``, which lie under this run's partial names, and enter it in the journal."""
        for place in range(len(part.texts)):
            partial_part_path(self.folder, part.number, place, self.run).replace(
                part_path(self.folder, part.number, place)
            )
        self._places[part.number] = self._write(part.to_json())

    def _open_journal(self) -> None:
        path = self.folder / JOURNAL_NAME
        self._journal = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        end = 0
        with open(path, "rb") as file:
            for line in file:
                entry = _entry_of(line)
                if entry is None or (end == 0 and entry != self._header):
                    break
                if end:
                    self._places[entry["number"]] = end
                end += len(line)
        os.truncate(self._journal, end)
        os.lseek(self._journal, end, os.SEEK_SET)
        self._remove_unknown()
        if end == 0:
            self._write(self._header)

    def _remove_unknown(self) -> None:
        """Remove the files of all parts that are not finished, and whatever else a killed run left."""
        for path in self.folder.iterdir():
            number = path.name.split(".")[0]
            known = path.suffix == PART_SUFFIX and number.isdecimal() and int(number) in self._places
            if not known and path.name != JOURNAL_NAME:
                path.unlink()

    def _read(self, place: int) -> dict[str, Any]:
        with open(self.folder / JOURNAL_NAME, "rb") as file:
            file.seek(place)
            entry = _entry_of(file.readline())
        assert entry is not None, "a line that was whole"
        return entry

    def _write(self, entry: Mapping[str, Any]) -> int:
        """Append ``entry``; where its line begins."""
        place = os.lseek(self._journal, 0, os.SEEK_CUR)
        text = canonical_json(dict(entry)).encode()
        write_all(self._journal, b"%08x %s\n" % (zlib.crc32(text), text))
        return place


def discard_work(folder: Path) -> None:
    """Remove a folder of work; for who holds the output's lock."""
    shutil.rmtree(folder, ignore_errors=True)


def _entry_of(line: bytes) -> dict[str, Any] | None:
    """The entry of a line of the journal; None for one that was cut short or is damaged."""
    checksum, _, text = line.removesuffix(b"\n").partition(b" ")
    if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(text):
        return None
    entry: dict[str, Any] = json.loads(text)
    return entry
