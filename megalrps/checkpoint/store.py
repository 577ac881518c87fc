"""The store: what it has acknowledged is never lost, and what it loads is what was saved.

The state goes through torch.distributed.checkpoint's planners, so that any layout loads what any other saved; the
files and the commit are ours (megalrps.checkpoint.storage). No code is ever run from a file: there is no pickle in
the format.
"""

import os
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException

from megalrps.checkpoint.errors import CorruptCheckpointError, LoadError, MissingCheckpointError, SaveError
from megalrps.checkpoint.manifest import MANIFEST_FILE, Manifest, corrupt, read_manifest
from megalrps.checkpoint.names import (
    REFUSED,
    TRASH,
    check_name,
    checkpoint_directories,
    hide,
    leftovers,
    name_of_hidden,
)
from megalrps.checkpoint.planners import TensorLoadPlanner, TensorSavePlanner
from megalrps.checkpoint.publication import Publish, publish_at_once
from megalrps.checkpoint.ranks import Ranks, first_failure
from megalrps.checkpoint.shards import FILE_BYTES, Shard, damage
from megalrps.checkpoint.storage import CheckpointReader, CheckpointWriter
from megalrps.errors import InputError
from megalrps.files import sync_directory

_HASHING_THREADS = 4
_NAMED = 3
"""Tensors of a damaged file that its refusal names."""


@dataclass(frozen=True)
class Loaded:
    """What :meth:`Store.load_first` did: the checkpoint it loaded, and the refusals of those before it."""

    manifest: Manifest
    refused: tuple[CorruptCheckpointError, ...]


class Store:
    """The checkpoints of one directory, ``RUN/checkpoints``, shared by the ranks of ``group``.

    ``group`` None is the default group, or this process alone where torch.distributed is not initialised. Methods
    marked *collective* are called by every rank with the same arguments and either return or raise on all of them.
    There is one writer at a time. A rank's files hold ``file_bytes`` each, and a chunk more at most.
    """

    def __init__(self, directory: Path, group: dist.ProcessGroup | None = None, file_bytes: int = FILE_BYTES) -> None:
        self.directory = Path(directory)
        self._file_bytes = file_bytes
        self._ranks = Ranks(group)

    def prepare(self, owns: Callable[[str], bool] = lambda name: True) -> None:
        """Make the directory and remove what died saves and removals have left; a writer calls it once. Collective.

        ``owns``: whether nobody else saves or removes the checkpoint of that name now. Raises InputError when the
        directory cannot be written.
        """
        self._ranks.together(partial(self._prepare, owns) if self._ranks.rank == 0 else _nothing)

    def names(self) -> tuple[str, ...]:
        """The names of the committed checkpoints, sorted. Whether they are whole is for :meth:`verify` to say."""
        return tuple(
            name for name in checkpoint_directories(self.directory) if (self.directory / name / MANIFEST_FILE).exists()
        )

    def manifest(self, name: str) -> Manifest:
        """The checked manifest of ``name``. Raises as :func:`megalrps.checkpoint.manifest.read_manifest`."""
        return read_manifest(self.directory / check_name(name))

    def save(
        self,
        name: str,
        tensors: Mapping[str, torch.Tensor],
        record: Mapping[str, Any],
        publish: Publish = publish_at_once,
    ) -> str:
        """Commit ``tensors`` and ``record`` as ``name``, durably, and return the digest of the manifest. Collective.

        A plain tensor is taken to be equal on all ranks that hold it and is written once; a DTensor is written by its
        shards. ``record`` is a JSON object, and rank 0's counts; so does its ``publish``, which is called when all is
        written, with the rename and the digest, and may refuse. Raises InputError for an impossible name,
        CheckpointExistsError when the name is taken, SaveError when any rank could not do its part (an entry that is
        no tensor, a full disk), and what ``publish`` raises; then nothing was committed.
        """
        writer = CheckpointWriter(self.directory, name, record, publish, self._file_bytes)
        try:
            _single_process_is_fine()
            metadata = dcp.save(
                dict(tensors),
                storage_writer=writer,
                planner=TensorSavePlanner(),
                process_group=self._ranks.group,
                no_dist=self._ranks.alone,
            )
        except CheckpointException as failures:
            raise first_failure(failures, SaveError, f"checkpoint {name} was not saved") from failures
        finally:
            writer.discard()
        digest: str = metadata.storage_data
        return digest

    def load(self, name: str, tensors: Mapping[str, torch.Tensor], verify: bool = True) -> Manifest:
        """Fill ``tensors`` (plain or DTensor, any layout) in place from ``name`` and return its manifest. Collective.

        Names, global shapes and types must be those of the checkpoint, which may hold more tensors than are asked
        for. With ``verify``, every byte of every file is checked, ranks sharing the work, before a tensor is touched;
        without, only manifest and file sizes are. Raises MissingCheckpointError, CorruptCheckpointError,
        UnknownFormatError, MissingTensorError, TensorMismatchError (all before a tensor is touched), or LoadError.
        """
        manifest = self._verified(name, content=verify)
        try:
            _single_process_is_fine()
            dcp.load(
                dict(tensors),
                storage_reader=CheckpointReader(self.directory / name, manifest),
                planner=TensorLoadPlanner(),
                process_group=self._ranks.group,
                no_dist=self._ranks.alone,
            )
        except CheckpointException as failures:
            raise first_failure(failures, LoadError, f"checkpoint {name} was not loaded") from failures
        return manifest

    def load_first(self, names: Sequence[str], tensors: Mapping[str, torch.Tensor]) -> Loaded:
        """Load the first of ``names`` that is undamaged, and say which were refused before it. Collective.

        Raises the last refusal when all are damaged: there is no falling back to nothing. Anything but damage raises
        at once.
        """
        refused: list[CorruptCheckpointError] = []
        for name in names:
            try:
                return Loaded(self.load(name, tensors), tuple(refused))
            except CorruptCheckpointError as refusal:
                refused.append(refusal)
        raise refused[-1] if refused else MissingCheckpointError(f"no checkpoint to load from in {self.directory}")

    def verify(self, name: str) -> Manifest:
        """Check every byte of ``name``; raises CorruptCheckpointError naming all damaged files. Collective."""
        return self._verified(name, content=True)

    def remove(self, name: str) -> None:
        """Remove ``name``: out of sight in one step, then off the disk; no reader sees a part of it. Collective."""
        self._ranks.together(partial(self._remove, name) if self._ranks.rank == 0 else _nothing)

    def set_aside(self, name: str) -> Path:
        """Hide the damaged ``name`` from the store, keep its files for a person, return where they are. Collective.

        The name is free again: a run that resumed from an older checkpoint comes past it once more.
        """
        places = self._ranks.together(
            partial(self._hide, name, REFUSED) if self._ranks.rank == 0 else lambda: self.directory
        )
        return places[0]

    def _prepare(self, owns: Callable[[str], bool]) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            sync_directory(self.directory.parent)
            for leftover in leftovers(self.directory):
                if owns(name_of_hidden(leftover.name)):
                    shutil.rmtree(leftover)
            if not os.access(self.directory, os.W_OK):
                raise PermissionError("it is read-only")
        except OSError as error:
            raise InputError(
                f"cannot write to {self.directory} ({error.strerror or error}): choose another directory"
            ) from error

    def _verified(self, name: str, content: bool) -> Manifest:
        results = self._ranks.together(partial(self._inspect, name, content))
        digests = {manifest.digest for manifest, _ in results}
        if len(digests) > 1:
            raise CorruptCheckpointError(
                f"checkpoint {name} differs between the ranks: put {self.directory} on a file system they share"
            )
        damages = [found for _, of_rank in results for found in of_rank]
        if damages:
            raise corrupt(self.directory / name, damages)
        return results[self._ranks.rank][0]

    def _inspect(self, name: str, content: bool) -> tuple[Manifest, list[str]]:
        """The manifest, and the damage found in this rank's share of the shards."""
        manifest = self.manifest(name)
        share = manifest.shards[self._ranks.rank :: self._ranks.size]
        with ThreadPoolExecutor(_HASHING_THREADS) as threads:
            found = list(threads.map(partial(damage, self.directory / name, content=content), share))
        return manifest, [
            f"{message} (it holds {_held(manifest, shard)})"
            for shard, message in zip(share, found, strict=True)
            if message
        ]

    def _remove(self, name: str) -> None:
        shutil.rmtree(self._hide(name, TRASH))

    def _hide(self, name: str, state: str) -> Path:
        return hide(self.directory, name, state)


def _held(manifest: Manifest, shard: Shard) -> str:
    """The names of the tensors with a chunk in ``shard``; the first few, and how many more."""
    names = sorted(
        name for name, entry in manifest.tensors.items() if any(chunk.file == shard.file for chunk in entry.chunks)
    )
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _nothing() -> None:
    """What the other ranks do while rank 0 changes the directory."""


def _single_process_is_fine() -> None:
    """torch warns at each save and load of a process that has no peers, which here is an ordinary run.

    For good: what warnings.catch_warnings restores at its end is every thread's, and saves have threads of their own.
    """
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
