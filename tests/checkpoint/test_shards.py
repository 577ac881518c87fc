"""The files of a rank: of a bounded size, all of them durable before anything refers to them."""

import os
from pathlib import Path

import pytest
import torch
from bit_patterns import equal_bits, random_tensor, zeros_like

from megalrps.checkpoint.errors import CorruptCheckpointError, NoSpaceError
from megalrps.checkpoint.store import Store

LENGTHS = (0, 1, 15, 16, 17, 100, 3, 16, 1)


def state() -> dict[str, torch.Tensor]:
    """Tensors of 0 to 400 bytes."""
    return {f"x{place}": random_tensor((length,), torch.float32, place) for place, length in enumerate(LENGTHS)}


@pytest.mark.parametrize(("file_bytes", "files"), [(1, 8), (64, 6), (65, 5), (128, 4), (1 << 20, 1)])
def test_any_size_of_file_gives_the_same_tensors(tmp_path: Path, file_bytes: int, files: int):
    store = Store(tmp_path, file_bytes=file_bytes)
    store.save("a", state(), {})
    manifest = store.verify("a")
    assert len(manifest.shards) == files == len(list((tmp_path / "a").glob("*.bin")))
    assert all(len(entry.chunks) == 1 for entry in manifest.tensors.values()), "no chunk is cut"
    last_chunk = max(LENGTHS) * 4
    assert all(shard.bytes < file_bytes + 64 + last_chunk for shard in manifest.shards)
    loaded = zeros_like(state())
    Store(tmp_path).load("a", loaded)
    assert all(equal_bits(tensor, loaded[name]) for name, tensor in state().items())


def test_every_file_is_looked_at_before_a_tensor_is_touched(tmp_path: Path):
    Store(tmp_path, file_bytes=64).save("a", state(), {})
    for place, file in enumerate(sorted((tmp_path / "a").glob("*.bin"))):
        content = file.read_bytes()
        file.chmod(0o644)
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        loaded = zeros_like(state())
        with pytest.raises(CorruptCheckpointError, match=file.name):
            Store(tmp_path).load("a", loaded)
        assert not any(tensor.any() for tensor in loaded.values()), place
        file.write_bytes(content)
    Store(tmp_path).verify("a")


@pytest.mark.parametrize("call", [1, 2, 5])
def test_a_file_that_cannot_be_flushed_commits_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int):
    flush, calls = os.fsync, iter(range(1, 100))

    def fail(descriptor: int) -> None:
        if next(calls) == call:
            raise OSError(28, "No space left on device")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(NoSpaceError):
        Store(tmp_path, file_bytes=64).save("a", state(), {})
    assert list(tmp_path.iterdir()) == []
