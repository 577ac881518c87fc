"""The input in numbered parts of about 8 MiB: what is tokenized, remembered and put together again.

How the input falls into parts is a function of the input alone, whoever works on them, so what was finished before a
kill is finished for ever. A plain file is cut at bytes, and a line belongs to the part in which it begins; a table is
cut between its row groups; a compressed file is decompressed by the process that hands out the parts, into files of
whole lines that last until their part is done.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megalrps.data.columnar import count_groups, is_columnar, read_groups
from megalrps.data.json_lines import Documents, decompressed_blocks, parse_lines, range_blocks, split_lines
from megalrps.data.text import COMPRESSED_SUFFIXES, open_input

PART_BYTES = 1 << 23


@dataclass(frozen=True)
class Part:
    """A piece of one input file; small, so that it travels to a worker."""

    number: int
    """From 0, in the order of the input."""
    path: str
    """The input file."""
    start: int
    stop: int
    """Bytes of a plain file; row groups of a table; bytes of ``lines`` of a compressed file."""
    stored_start: int
    stored_stop: int
    """The bytes of the input file, as stored, that this part stands for."""
    lines: str | None = None
    """For a part of a compressed file, the file of its decompressed lines."""


def plan_parts(paths: Sequence[Path], folder: Path, part_bytes: int = PART_BYTES) -> Iterator[Part]:
    """The parts of ``paths`` in order; the lines of compressed files are put into ``folder`` as it goes on.

    Who asks for the next part of a compressed file waits until it is decompressed.
    """
    number = 0
    for position, path in enumerate(paths):
        if is_columnar(path):
            parts = _groups(path, part_bytes)
        elif path.suffix in COMPRESSED_SUFFIXES:
            parts = _decompressed(path, folder / str(position), part_bytes)
        else:
            parts = _ranges(path, part_bytes)
        for part in parts:
            yield Part(number, *part)
            number += 1


_Piece = tuple[str, int, int, int, int, str | None]
"""The fields of a :class:`Part` after its number."""


def read_part(part: Part, keys: Sequence[str], date_key: str | None = None) -> Iterator[Documents]:
    """The documents of ``part``, some at a time."""
    if is_columnar(part.path):
        yield from read_groups(Path(part.path), part.start, part.stop, keys, date_key)
        return
    with open_input(part.lines or part.path) as file:
        blocks = range_blocks(file, part.start, part.stop)
        for lines in split_lines(blocks, at_file_start=part.stored_start == 0):
            yield parse_lines(lines, keys, date_key)


def _ranges(path: Path, part_bytes: int) -> Iterator[_Piece]:
    size = path.stat().st_size
    for start in range(0, size, part_bytes):
        stop = min(start + part_bytes, size)
        yield str(path), start, stop, start, stop, None


def _groups(path: Path, part_bytes: int) -> Iterator[_Piece]:
    size, groups = path.stat().st_size, count_groups(path)
    step = max(1, part_bytes * groups // max(size, 1))
    for start in range(0, groups, step):
        stop = min(start + step, groups)
        yield str(path), start, stop, size * start // groups, size * stop // groups, None


def _decompressed(path: Path, stem: Path, part_bytes: int) -> Iterator[_Piece]:
    """Parts that end with the line in which they reach ``part_bytes``, in files whose names begin with ``stem``."""
    with open_input(path) as file:
        blocks = decompressed_blocks(file, path)
        rest, behind, piece = b"", 0, 0
        while rest or (rest := next(blocks, b"")):
            lines = Path(f"{stem}.{piece}.lines")
            size, rest = _write_lines(lines, rest, blocks, part_bytes)
            at = path.stat().st_size if not rest else file.tell()
            yield str(path), 0, size, behind, at, str(lines)
            behind, piece = at, piece + 1


def _write_lines(path: Path, first: bytes, blocks: Iterator[bytes], part_bytes: int) -> tuple[int, bytes]:
    """Write blocks to ``path`` until it holds ``part_bytes`` and its last line is whole: its size, and what is left."""
    size = 0
    with open(path, "wb") as file:
        block = first
        while block:
            end = block.find(b"\n", max(0, part_bytes - size - 1)) + 1
            if size + len(block) >= part_bytes and end:
                file.write(block[:end])
                return size + end, block[end:]
            file.write(block)
            size += len(block)
            block = next(blocks, b"")
    return size, b""
