"""A copy of a checkpoint for another store: verified while it is copied, durable, whole or absent. Imports no torch."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from megalrps.checkpoint.manifest import MANIFEST_FILE, Manifest, corrupt, read_manifest, render
from megalrps.checkpoint.names import PARTIAL, check_name, hidden_name
from megalrps.checkpoint.shards import Shard, open_shard
from megalrps.errors import InputError
from megalrps.files import sync_directory, write_all, write_text

_BLOCK_BYTES = 8 << 20


def copy_checkpoint(
    directory: Path, name: str, output: Path, progress: Callable[[int], None] = lambda count: None
) -> Manifest:
    """Copy the checkpoint ``name`` of the store in ``directory`` to the store in ``output``, made where it is not.

    ``progress`` is told of each number of bytes copied. Raises InputError where ``output`` has one of that name or
    is no directory, and CorruptCheckpointError, naming the files, where what was read is not what was saved: then there
    is no copy.
    """
    manifest = read_manifest(directory / check_name(name))
    final = output / name
    _refuse_existing(final)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"--output {output} is not a directory: name one") from error
    partial = output / hidden_name(name, PARTIAL)
    partial.mkdir()
    try:
        damages = [_copy_shard(directory / name, shard, partial, progress) for shard in manifest.shards]
        if found := [damage for damage in damages if damage]:
            raise corrupt(directory / name, found)
        write_text(partial / MANIFEST_FILE, render(manifest.to_json()))
        _refuse_existing(final)
        partial.rename(final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_directory(output)
    sync_directory(output.parent)
    return manifest


def _refuse_existing(final: Path) -> None:
    if os.path.lexists(final):
        raise InputError(f"{final} exists: nothing is ever copied over it; name another --output")


def _copy_shard(source: Path, shard: Shard, target: Path, progress: Callable[[int], None]) -> str | None:
    """Copy one file, durably; what is wrong with what was read, in words that name the file, or None."""
    digest, position = hashlib.sha256(), 0
    # Read-only from the first byte, as a shard is that was saved.
    written = os.open(target / shard.file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444)
    try:
        for block in _blocks(source / shard.file):
            digest.update(block)
            position += len(block)
            progress(len(block))
            write_all(written, block)
        os.fsync(written)
    except _UnreadableError as error:
        return str(error)
    finally:
        os.close(written)
    if position != shard.bytes or digest.hexdigest() != shard.sha256:
        return f"{shard.file} does not have the SHA-256 it was saved with"
    return None


class _UnreadableError(Exception):
    """The source's file, not the copy's, failed."""


def _blocks(path: Path) -> Iterator[memoryview]:
    """The content of ``path``; a block is good until the next is asked for."""
    block, position = bytearray(_BLOCK_BYTES), 0
    try:
        with open_shard(path) as descriptor:
            while count := os.preadv(descriptor, [block], position):
                yield memoryview(block)[:count]
                position += count
    except OSError as error:
        raise _UnreadableError(f"{path.name} cannot be read ({error.strerror or error})") from error
