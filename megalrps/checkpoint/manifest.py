"""The manifest of a checkpoint: one JSON file, written last, that says what the checkpoint holds and proves it.

Imports no torch. Format 1, the value of ``manifest.json`` (every field is required, no other is allowed):

    format    1
    name      the name of the checkpoint, and of its directory
    created   when it was saved, UTC, ISO 8601
    versions  {package: version} of what wrote it
    shards    [{file, bytes, sha256}]
    tensors   {name: {dtype, shape, chunks: [{offsets, sizes, file, byte_offset, byte_length}]}}
              a chunk is the box offsets <= index < offsets + sizes of the global tensor, stored contiguously,
              row-major and little-endian, from byte_offset of the file on; a tensor's chunks fill it without overlap
    record    an object of the caller's, not looked into
    digest    megalrps.fingerprint of all the other fields

The text is canonical too (see :func:`render`): a file that differs in one bit is refused, whatever the bit means.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from megalrps.checkpoint.errors import CorruptCheckpointError, MissingCheckpointError, UnknownFormatError
from megalrps.checkpoint.names import check_name
from megalrps.checkpoint.shards import Shard, open_shard, read_into
from megalrps.fingerprint import canonical_json, fingerprint

FORMAT = 1
MANIFEST_FILE = "manifest.json"

ITEM_BYTES: Mapping[str, int] = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
"""Bytes of one element of each type a checkpoint can hold, by its name in torch."""

_LARGEST_MANIFEST_BYTES = (
    64 << 20
)  # 3.1 B parameters on 64 ranks take about 8 MB; a file beyond this was not written by us
_FEWEST_CHARACTERS = 12  # for each list or object: "[]," would take twenty times as much memory as text
_FEW_BOXES = 8
_BOXES_AT_ONCE = 128
_MOST, _MOST_DIMENSIONS = 1 << 63, 64  # or multiplying the numbers of a forged shape takes minutes
_MEND = "restore it from a copy, or remove the directory to go on from an older checkpoint"


@dataclass(frozen=True)
class Chunk:
    """One box of a tensor and where its bytes are."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    byte_offset: int
    byte_length: int


@dataclass(frozen=True)
class TensorEntry:
    """One tensor by its global shape, whatever the ranks that saved it held of it."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Manifest:
    """All that is known of a committed checkpoint; see the format at the top of this file."""

    name: str
    created: str
    versions: Mapping[str, str]
    shards: tuple[Shard, ...]
    tensors: Mapping[str, TensorEntry]
    record: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """SHA-256 over all the other fields: equal for two checkpoints that hold the same and say the same of it."""
        return fingerprint(self._content())

    def to_json(self) -> dict[str, Any]:
        """The value of ``manifest.json``."""
        content = self._content()
        return content | {"digest": fingerprint(content)}

    def _content(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "name": self.name,
            "created": self.created,
            "versions": dict(self.versions),
            "shards": [asdict(shard) for shard in self.shards],
            "tensors": {name: asdict(entry) for name, entry in self.tensors.items()},
            "record": dict(self.record),
        }


def render(value: Mapping[str, Any]) -> str:
    """The one text of a manifest: keys sorted, a line for each member of the two outer levels, for a person to read."""
    lines = (f"{canonical_json(key)}: {_render_member(member)}" for key, member in sorted(value.items()))
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _render_member(value: Any) -> str:
    if isinstance(value, dict) and value:
        return (
            "{\n  "
            + ",\n  ".join(f"{canonical_json(k)}: {canonical_json(v)}" for k, v in sorted(value.items()))
            + "\n}"
        )
    if isinstance(value, list) and value:
        return "[\n  " + ",\n  ".join(canonical_json(member) for member in value) + "\n]"
    return canonical_json(value)


def read_manifest(directory: Path) -> Manifest:
    """The manifest of the checkpoint in ``directory``; its digest, text, fields, chunks and byte ranges are checked.

    Raises MissingCheckpointError when there is no such directory, UnknownFormatError for a whole manifest of another
    format, and CorruptCheckpointError, with the file and the damage named, for anything else that is not exactly what
    was saved.
    """
    if not directory.is_dir():
        raise MissingCheckpointError(f"no checkpoint {directory.name} in {directory.parent}")
    path = directory / MANIFEST_FILE
    try:
        manifest = parse_manifest(_read_text(path))
        if manifest.name != directory.name:
            raise ValueError(f"it belongs to a checkpoint named {manifest.name!r}")
    except UnknownFormatError as error:
        raise UnknownFormatError(f"{path}: {error}") from error
    except OSError as error:
        raise CorruptCheckpointError(f"{path} cannot be read ({error.strerror or error}): {_MEND}") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CorruptCheckpointError(f"{path} is damaged ({type(error).__name__}: {error}): {_MEND}") from error
    return manifest


def parse_manifest(text: str) -> Manifest:
    """The manifest that :func:`render` made ``text`` of, checked throughout.

    Raises UnknownFormatError for a whole manifest of another format, and ValueError, TypeError, KeyError or
    RecursionError, whichever comes first, for anything else.
    """
    _require(len(text) <= _LARGEST_MANIFEST_BYTES, f"a manifest has at most {_LARGEST_MANIFEST_BYTES} bytes")
    containers = text.count("[") + text.count("{")
    _require(containers <= 64 + len(text) // _FEWEST_CHARACTERS, "more lists and objects than a manifest has")
    value = _verified_value(text)
    if value["format"] != FORMAT:
        raise UnknownFormatError(
            f"format {value['format']!r}, this version reads {FORMAT}: use the megalrps that wrote it"
        )
    return _parse(value)


def corrupt(directory: Path, damages: Sequence[str]) -> CorruptCheckpointError:
    """The refusal of the checkpoint in ``directory``, whose files suffered ``damages``."""
    return CorruptCheckpointError(f"checkpoint {directory} is damaged: {'; '.join(damages)}: {_MEND}")


def _read_text(path: Path) -> str:
    with open_shard(path) as descriptor:
        size = path.stat().st_size
        if size > _LARGEST_MANIFEST_BYTES:
            raise ValueError(f"a manifest has at most {_LARGEST_MANIFEST_BYTES} bytes, not {size}")
        content = bytearray(size)
        read_into(descriptor, 0, memoryview(content))
    return content.decode()


def _verified_value(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    if render(value) != text:
        raise ValueError("its text is not the one that was written")
    content = {key: member for key, member in value.items() if key != "digest"}
    if value.get("digest") != fingerprint(content):
        raise ValueError("its digest is not that of its content")
    return content


def _parse(value: Mapping[str, Any]) -> Manifest:
    _require(
        set(value) == {"format", "name", "created", "versions", "shards", "tensors", "record"},
        "its fields are not those of format 1",
    )
    name, created = check_name(value["name"]), value["created"]
    _require(isinstance(created, str), "created is not a text")
    _require(
        all(isinstance(value[field], dict) for field in ("versions", "tensors", "record")), "a field is not an object"
    )
    _require(all(isinstance(version, str) for version in value["versions"].values()), "a version is not a text")
    shards = tuple(_parse_shard(shard) for shard in value["shards"])
    _require(len({shard.file for shard in shards}) == len(shards), "a shard is listed twice")
    tensors = {tensor: _parse_tensor(tensor, entry) for tensor, entry in value["tensors"].items()}
    _check_bytes(shards, tensors)
    return Manifest(name, created, value["versions"], shards, tensors, value["record"])


def _parse_shard(value: Mapping[str, Any]) -> Shard:
    _require(set(value) == {"file", "bytes", "sha256"}, "a shard's fields are not those of format 1")
    check_name(value["file"])  # nothing outside the directory, nothing hidden
    _require(_is_count(value["bytes"]), f"{value['file']}: bytes is not a count")
    return Shard(value["file"], value["bytes"], str(value["sha256"]))


def _parse_tensor(name: str, value: Mapping[str, Any]) -> TensorEntry:
    _require(set(value) == {"dtype", "shape", "chunks"}, f"tensor {name}: its fields are not those of format 1")
    _require(value["dtype"] in ITEM_BYTES, f"tensor {name}: unknown dtype {value['dtype']!r}")
    shape = _counts(value["shape"])
    chunks = tuple(_parse_chunk(name, shape, ITEM_BYTES[value["dtype"]], chunk) for chunk in value["chunks"])
    _require(
        sum(math.prod(chunk.sizes) for chunk in chunks) == math.prod(shape), f"tensor {name}: its chunks do not fill it"
    )
    _require(not _overlapping(chunks), f"tensor {name}: two chunks overlap")
    return TensorEntry(value["dtype"], shape, chunks)


def _parse_chunk(name: str, shape: tuple[int, ...], item_bytes: int, value: Mapping[str, Any]) -> Chunk:
    fields = {"offsets", "sizes", "file", "byte_offset", "byte_length"}
    _require(set(value) == fields, f"tensor {name}: a chunk's fields are not those of format 1")
    offsets, sizes = _counts(value["offsets"]), _counts(value["sizes"])
    _require(len(offsets) == len(sizes) == len(shape), f"tensor {name}: a chunk has another number of dimensions")
    inside = all(offset + size <= length for offset, size, length in zip(offsets, sizes, shape, strict=True))
    _require(inside, f"tensor {name}: a chunk is outside the tensor")
    _require(_is_count(value["byte_offset"]), f"tensor {name}: byte_offset is not a count")
    _require(
        value["byte_length"] == math.prod(sizes) * item_bytes, f"tensor {name}: a chunk has the wrong number of bytes"
    )
    return Chunk(offsets, sizes, value["file"], value["byte_offset"], value["byte_length"])


def _check_bytes(shards: Sequence[Shard], tensors: Mapping[str, TensorEntry]) -> None:
    """Every chunk inside its file, and no byte in two chunks: nothing claims more than the files have."""
    ends = dict.fromkeys((shard.file for shard in shards), 0)
    sizes = {shard.file: shard.bytes for shard in shards}
    chunks = [
        (chunk.file, chunk.byte_offset, chunk.byte_length, name) for name, t in tensors.items() for chunk in t.chunks
    ]
    for file, offset, length, name in sorted(chunks):
        _require(file in ends, f"tensor {name}: {file!r} is not a shard")
        _require(
            ends[file] <= offset and offset + length <= sizes[file],
            f"tensor {name}: bytes outside {file} or of another chunk",
        )
        ends[file] = offset + length


def _overlapping(chunks: Sequence[Chunk]) -> bool:
    """Whether two chunks share an element. Sweeps along the dimension cut most often: fast for any regular sharding.

    Raises ValueError where they are cut so irregularly that this would take more comparisons than any grid of as many
    chunks does: such a manifest is made to keep its reader busy.
    """
    boxes = [chunk for chunk in chunks if chunk.byte_length]
    if len(boxes) < 2:
        return False
    if not boxes[0].sizes:
        return True
    if len(boxes) <= _FEW_BOXES:
        return any(_intersect(one, other) for one, other in combinations(boxes, 2))
    starts = np.array([box.offsets for box in boxes], np.int64)
    ends = starts + np.array([box.sizes for box in boxes], np.int64)
    axis = max(range(starts.shape[1]), key=lambda dimension: len(np.unique(starts[:, dimension])))
    order = np.argsort(starts[:, axis], kind="stable")
    starts, ends = np.ascontiguousarray(starts[order].T), np.ascontiguousarray(ends[order].T)
    active = np.empty(0, np.int64)
    left = 16 * len(boxes) ** 1.5  # a grid in two dimensions takes no more than n**1.5, in three n**(5/3)
    for first in range(0, len(boxes), _BOXES_AT_ONCE):
        block = np.arange(first, min(first + _BOXES_AT_ONCE, len(boxes)))
        others = np.append(active[ends[axis, active] > starts[axis, first]], block)
        left -= len(block) * len(others)
        _require(left >= 0, "chunks that are cut too irregularly to tell whether they overlap")
        shared = others[None, :] < block[:, None]  # each pair once
        for begin, end in zip(starts, ends, strict=True):
            shared &= begin[others][None, :] < end[block][:, None]
            shared &= begin[block][:, None] < end[others][None, :]
        if shared.any():
            return True
        active = others
    return False


def _intersect(one: Chunk, other: Chunk) -> bool:
    spans = zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
    return all(
        start < other_start + other_size and other_start < start + size
        for start, size, other_start, other_size in spans
    )


def _counts(value: Any) -> tuple[int, ...]:
    _require(isinstance(value, list) and all(_is_count(member) for member in value), "a shape is not a list of counts")
    _require(len(value) <= _MOST_DIMENSIONS, f"a shape has more than {_MOST_DIMENSIONS} dimensions")
    return tuple(value)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MOST  # a bool is an int, and no count


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise ValueError(problem)
