"""The storage under torch.distributed.checkpoint: raw bytes in shard files, committed by a manifest and a rename.

The protocol, of which each step is durable before the next begins:

1. rank 0 makes a new directory, ``.<name>.<random>.partial``, whose name travels to the ranks with the plan;
2. every rank that has something to write makes its files there, hashed while written, and flushes them to the disk;
3. rank 0, told by all ranks that they have, writes the manifest and flushes it and the directory;
4. rank 0 renames the directory to ``<name>`` and flushes the parent: the checkpoint exists, never to be written again.
   Who publishes does so under a lock of its own, in which it may refuse and in which it moves its reference.

A process that dies anywhere leaves either nothing under ``<name>`` or all of it.
"""

import json
import math
import os
import shutil
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import StorageReader, StorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megalrps.checkpoint.errors import CheckpointExistsError, CorruptCheckpointError
from megalrps.checkpoint.manifest import MANIFEST_FILE, Chunk, Manifest, TensorEntry, parse_manifest, render
from megalrps.checkpoint.names import PARTIAL, check_name, hidden_name
from megalrps.checkpoint.planners import DTYPE_NAMES, DTYPES
from megalrps.checkpoint.provenance import versions
from megalrps.checkpoint.publication import Publish, publish_at_once
from megalrps.checkpoint.shards import FILE_BYTES, Shard, ShardFiles, open_shard, read_into
from megalrps.files import sync_directory, write_text
from megalrps.fingerprint import canonical_json

_READ_BYTES = 32 << 20


@dataclass(frozen=True)
class _Place:
    """Where a rank writes: rank 0's decision, sent with the plan. ``file`` is the first of its files."""

    partial: str
    file: str


@dataclass(frozen=True)
class _Written:
    """Where a rank wrote one chunk: its answer, sent with the write result."""

    shard: Shard
    byte_offset: int
    byte_length: int


class CheckpointWriter(StorageWriter):
    """Writes the checkpoint ``name`` with rank 0's ``record`` (JSON) into the store at ``directory``; for one save.

    ``publish`` is called on rank 0 when all is written and durable but for the rename. Raises InputError for a name
    that cannot be one, CheckpointExistsError when the name is taken, OSError as the file system does, and what
    ``publish`` raises.
    """

    def __init__(
        self,
        directory: Path,
        name: str,
        record: Mapping[str, Any],
        publish: Publish = publish_at_once,
        file_bytes: int = FILE_BYTES,
    ) -> None:
        self._directory = directory
        self._file_bytes = file_bytes
        self._name = name
        self._record = record
        self._publish = publish
        self._partial: Path | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing to do: a writer is made for one save."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the plan says who writes where."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Send the name along, so that ranks which save different checkpoints find out."""
        return replace(plan, storage_data=check_name(self._name))

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On rank 0: make the partial directory and tell every rank its file in it."""
        if any(plan.storage_data != self._name for plan in plans):
            raise ValueError(f"the ranks save under different names: {sorted({plan.storage_data for plan in plans})}")
        self._refuse_taken_name()
        made = self._directory / hidden_name(self._name, PARTIAL)
        made.mkdir()
        self._partial = made
        return [
            replace(plan, storage_data=_Place(made.name, f"rank-{rank:05d}.bin")) for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's chunks, in the order of the plan; a rank without any writes no file."""
        place: _Place = plan.storage_data
        written: Future[list[WriteResult]] = Future()
        written.set_result(
            self._write_shard(self._directory / place.partial / place.file, plan, planner) if plan.items else []
        )
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On rank 0, when all ranks have written: manifest and commit. The digest goes to all ranks in ``metadata``."""
        assert self._partial is not None, "prepare_global_plan comes first"
        manifest = self._manifest(metadata, [result for of_rank in results for result in of_rank])
        text = render(manifest.to_json())
        digest = parse_manifest(text).digest  # nothing is committed that would be refused when read
        metadata.storage_data = digest
        write_text(self._partial / MANIFEST_FILE, text)
        self._publish(partial(self._commit, self._partial), digest)

    def discard(self) -> None:
        """Remove what an unfinished save has left; after a commit there is nothing to remove."""
        if self._partial is not None:
            shutil.rmtree(self._partial, ignore_errors=True)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Never chosen by looking at a path."""
        return False

    def _refuse_taken_name(self) -> None:
        if os.path.lexists(self._directory / self._name):
            raise CheckpointExistsError(
                f"checkpoint {self._name} exists in {self._directory}; a committed checkpoint is never written again"
            )

    def _write_shard(self, path: Path, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        places = []
        with ShardFiles(path, self._file_bytes) as files:
            for item in plan.items:
                tensor = planner.resolve_data(item)
                assert isinstance(tensor, torch.Tensor), "the planner lets only tensors in"
                content = _bytes_of(tensor.detach().to("cpu").contiguous())
                places.append((*files.append(content), len(content)))
            shards = files.finish()
        return [
            WriteResult(item.index, length, _Written(shards[number], offset, length))
            for item, (number, offset, length) in zip(plan.items, places, strict=True)
        ]

    def _manifest(self, metadata: Metadata, results: list[WriteResult]) -> Manifest:
        places: dict[tuple[str, tuple[int, ...]], _Written] = {
            (result.index.fqn, tuple(result.index.offset or ())): result.storage_data for result in results
        }
        tensors = {}
        for name, saved in metadata.state_dict_metadata.items():
            assert isinstance(saved, TensorStorageMetadata), "the planner lets only tensors in"
            chunks = tuple(_chunk(box, places[name, tuple(box.offsets)]) for box in saved.chunks)
            tensors[name] = TensorEntry(DTYPE_NAMES[saved.properties.dtype], tuple(saved.size), chunks)
        return Manifest(
            name=self._name,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            versions=versions(),
            shards=tuple(sorted({place.shard for place in places.values()}, key=lambda shard: shard.file)),
            tensors=tensors,
            record=_plain(self._record),
        )

    def _commit(self, written: Path) -> None:
        self._refuse_taken_name()
        # Onto a name taken meanwhile the rename fails: a directory with something in it is never replaced.
        final = self._directory / self._name
        written.rename(final)
        try:
            sync_directory(self._directory)
        except OSError:
            final.rename(written)  # not known to be durable, so not committed
            raise


class CheckpointReader(StorageReader):
    """Reads the tensors of the committed checkpoint in ``directory``, whose ``manifest`` was read before."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self._directory = directory
        self._manifest = manifest
        self._chunks = {
            (name, chunk.offsets): chunk for name, entry in manifest.tensors.items() for chunk in entry.chunks
        }

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing to do: a reader is made for one load."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The manifest's index in the terms of the planner."""
        return Metadata({name: _tensor_metadata(entry) for name, entry in self._manifest.tensors.items()})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the manifest says what is where."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The plan is good as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The plans are good as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read every item of ``plan`` into its place; raises CorruptCheckpointError when a file cannot be read."""
        items_by_file: defaultdict[str, list[tuple[Chunk, ReadItem]]] = defaultdict(list)
        for item in plan.items:
            chunk = self._chunks[item.storage_index.fqn, tuple(item.storage_index.offset or ())]
            items_by_file[chunk.file].append((chunk, item))
        for file, items in sorted(items_by_file.items()):
            self._read_file(file, items, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Never chosen by looking at a path."""
        return False

    def _read_file(self, file: str, items: list[tuple[Chunk, ReadItem]], planner: LoadPlanner) -> None:
        path = self._directory / file
        try:
            with open_shard(path) as descriptor:
                for chunk, item in sorted(items, key=lambda pair: pair[0].byte_offset):
                    target = planner.resolve_tensor(item).detach()
                    _read_box(descriptor, chunk, tuple(item.storage_offsets), target)
                    planner.commit_tensor(item, target)
        except OSError as error:
            raise CorruptCheckpointError(f"{path} cannot be read ({error.strerror or error})") from error


def _read_box(descriptor: int, chunk: Chunk, start: tuple[int, ...], target: torch.Tensor) -> None:
    """Copy into ``target`` the box of its shape that begins at ``start`` of the stored ``chunk``.

    Reads whole rows of the chunk, a bounded number at a time, and straight into ``target`` where rows lie in it as
    they do in the file.
    """
    if target.numel() == 0:
        return
    if not chunk.sizes:
        target, chunk, start = target.reshape(1), replace(chunk, sizes=(1,)), (0,)
    row_shape = chunk.sizes[1:]
    row_bytes = math.prod(row_shape) * target.element_size()
    if target.is_cpu and target.is_contiguous() and target.shape[1:] == row_shape:
        read_into(descriptor, chunk.byte_offset + start[0] * row_bytes, _bytes_of(target))
        return
    rows_at_once = max(1, _READ_BYTES // row_bytes)
    for first in range(0, target.shape[0], rows_at_once):
        part = target[first : first + rows_at_once]
        rows = torch.empty((part.shape[0], *row_shape), dtype=target.dtype)
        read_into(descriptor, chunk.byte_offset + (start[0] + first) * row_bytes, _bytes_of(rows))
        for dimension, (offset, length) in enumerate(zip(start[1:], part.shape[1:], strict=True), start=1):
            rows = rows.narrow(dimension, offset, length)
        part.copy_(rows)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, as bytes: no copy, and any type."""
    # as_strided, not reshape: a dimension of length 1 may have any stride and the tensor still counts as contiguous.
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data


def _chunk(box: ChunkStorageMetadata, written: _Written) -> Chunk:
    return Chunk(tuple(box.offsets), tuple(box.sizes), written.shard.file, written.byte_offset, written.byte_length)


def _tensor_metadata(entry: TensorEntry) -> TensorStorageMetadata:
    boxes = [ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)) for chunk in entry.chunks]
    return TensorStorageMetadata(TensorProperties(dtype=DTYPES[entry.dtype]), torch.Size(entry.shape), boxes)


def _plain(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record as it will be read: tuples become lists and keys texts before the digest is taken, not after."""
    plain: dict[str, Any] = json.loads(canonical_json(dict(record)))
    return plain
