"""Defects that a store or a loop may have, each put into the package for the time of a block."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from test_histories import by_modulo, one_step_late

from megalrps.checkpoint import leases, lineage, manifest, publication, shards, storage, store
from megalrps.files import sync_directory
from megalrps.training.loop import Loop

Defect = Callable[[ExitStack], None]


def _replaced(owner: Any, name: str, by: Any) -> Defect:
    return lambda stack: stack.enter_context(mock.patch.object(owner, name, by)) and None


def _shard_not_synced(self: shards.ShardWriter) -> shards.Shard:
    return shards.Shard(self._path.name, self._position, self._digest.hexdigest())


def _text_not_synced(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT, 0o644)
    os.write(descriptor, text.encode())
    os.close(descriptor)
    os.replace(partial, path)  # noqa: PTH105 - what the recorder of file operations sees
    sync_directory(path.parent)


def _acknowledged_early(stack: ExitStack) -> None:
    """A checkpoint gets its name when the next one is saved."""
    commit, waiting = storage.CheckpointWriter._commit, []

    def later(self: storage.CheckpointWriter, written: Path) -> None:
        if waiting:
            commit(*waiting.pop())
        waiting.append((self, written))
        self._partial = None

    stack.enter_context(mock.patch.object(storage.CheckpointWriter, "_commit", later))


def _reference_first(stack: ExitStack) -> None:
    original = publication.Publisher.publish

    def publish(self: publication.Publisher, name: str, record: Any) -> publication.Publish:
        move = original(self, name, record)

        def reference_first(rename: Callable[[], None], digest: str) -> None:
            move(lambda: None, digest)
            rename()

        return reference_first

    stack.enter_context(mock.patch.object(publication.Publisher, "publish", publish))


def _sizes_only(directory: Path, shard: shards.Shard, content: bool) -> str | None:
    return shards.damage(directory, shard, content=False)


def _any_digest(text: str) -> dict[str, Any]:
    return {key: member for key, member in json.loads(text).items() if key != "digest"}


def _overwrites(stack: ExitStack) -> None:
    commit = storage.CheckpointWriter._commit

    def remove_and_commit(self: storage.CheckpointWriter, written: Path) -> None:
        final = self._directory / self._name
        if final.exists():
            shutil.rmtree(final)
        commit(self, written)

    stack.enter_context(mock.patch.object(storage.CheckpointWriter, "_refuse_taken_name", lambda self: None))
    stack.enter_context(mock.patch.object(storage.CheckpointWriter, "_commit", remove_and_commit))


def _everything_but_the_newest(self: lineage.Lineage, keep: int, used: Any = ()) -> tuple[str, ...]:
    return self.all()[:-keep]


def _moments_stay(stack: ExitStack) -> None:
    original = store.Store.load_first

    def load_first(self: store.Store, names: Any, tensors: Mapping[str, torch.Tensor]) -> store.Loaded:
        loaded = original(self, names, tensors)
        for name, tensor in tensors.items():
            if name.startswith("optimizer.exp_avg"):
                tensor.zero_()
        return loaded

    stack.enter_context(mock.patch.object(store.Store, "load_first", load_first))


DEFECTS: Mapping[str, Defect] = {
    "the shard is not synced": _replaced(shards.ShardWriter, "finish", _shard_not_synced),
    "the manifest is not synced": _replaced(storage, "write_text", _text_not_synced),
    "the directory is not synced after the rename": _replaced(storage, "sync_directory", lambda directory: None),
    "acknowledged before the rename": _acknowledged_early,
    "the reference moves before the rename": _reference_first,
    "no digest of shards is looked at": _replaced(store, "damage", _sizes_only),
    "the manifest's digest is not looked at": _replaced(manifest, "_verified_value", _any_digest),
    "a taken name is removed and written again": _overwrites,
    "the fence is not looked at": _replaced(
        leases.HeldLeases, "check", lambda self, locked, path: self._taken[path].fence
    ),
    "pruning spares no forks": _replaced(lineage.Lineage, "prunable", _everything_but_the_newest),
    "samples by rank modulo ranks": _replaced(Loop, "batch", by_modulo),
    "learning rate one step late on resume": _replaced(Loop, "step", one_step_late),
    "moments are not restored": _moments_stay,
}
"""What puts each defect in, until the stack ends."""


@contextmanager
def seeded(name: str | None) -> Iterator[None]:
    """The package has the defect ``name`` (None: none) while the block runs."""
    with ExitStack() as stack:
        if name is not None:
            DEFECTS[name](stack)
        yield
