"""The writer: the same bytes by every road, digests of what it wrote, constant memory, one run at a time."""

import hashlib
import io
import os
import signal
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from megalrps.data.index_format import bin_path, blocks_path, idx_path
from megalrps.data.index_writer import IndexedDatasetWriter
from megalrps.data.manifest import TokenizerIdentity, describe_dataset, describe_written
from megalrps.errors import InputError

TOKENIZER = TokenizerIdentity("SentencePieceTokenizer", 50_000, 2, "0" * 64)
DESCRIPTION = {"name": "x", "tokenizer": TOKENIZER, "text_bytes": 9, "append_eod": False, "sources": ("x.jsonl",)}
SMALL = {"block_bytes": 64, "group_blocks": 3}


def documents_of(lengths, highest=49_999):
    chance = np.random.default_rng(sum(lengths))
    return chance.integers(0, highest + 1, sum(lengths)), np.array(lengths, np.int64)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
@pytest.mark.parametrize("lengths", [[], [0], [5], [0, 3, 0, 0, 2, 1], [100, 0, 300]])
def test_documents_one_by_one_together_and_copied_are_the_same_bytes(tmp_path, dtype, lengths):
    tokens, counts = documents_of(lengths)
    folders = [tmp_path / name for name in ("single", "together", "copied")]
    with IndexedDatasetWriter(folders[0] / "set", dtype, **SMALL) as single:
        for start, length in zip(np.cumsum(counts) - counts, lengths, strict=True):
            single.add_document(tokens[start : start + length])
    with IndexedDatasetWriter(folders[1] / "set", dtype, **SMALL) as together:
        together.add_documents(tokens[: sum(lengths[:2])], counts[:2])
        together.add_documents(tokens[sum(lengths[:2]) :], counts[2:])
    with IndexedDatasetWriter(folders[2] / "set", dtype, **SMALL) as copied:
        stored = io.BytesIO(b"before" + tokens.astype(dtype).tobytes() + b"after")
        stored.seek(6)
        copied.copy_documents(stored, stored.getbuffer().nbytes - 11, counts)
        assert stored.read() == b"after"
    assert contents(folders[0]) == contents(folders[1]) == contents(folders[2])
    assert len({writer.digests for writer in (single, together, copied)}) == 1
    for writer in (single, together, copied):
        assert writer.highest_token == max(tokens.tolist(), default=-1)
        assert (writer.document_count, writer.token_count) == (len(lengths), sum(lengths))
        assert writer.sequence_count == np.count_nonzero(counts)


@pytest.mark.parametrize("tokens", [0, 1, 31, 32, 33, 96, 97, 200])
def test_the_digests_are_those_of_the_files(tmp_path, tokens):
    """Around the bounds of blocks (32 tokens) and of groups (96)."""
    with IndexedDatasetWriter(tmp_path / "set", np.uint16, **SMALL) as writer:
        writer.add_documents(*documents_of([tokens]))
    expected = []
    leaves = b""
    for path in (bin_path(tmp_path / "set"), idx_path(tmp_path / "set")):
        content = path.read_bytes()
        own = [hashlib.sha256(content[at : at + 64]).digest() for at in range(0, len(content), 64)]
        groups = [hashlib.sha256(b"".join(own[at : at + 3])).hexdigest() for at in range(0, len(own), 3)]
        expected.append((hashlib.sha256(content).hexdigest(), tuple(groups)))
        leaves += b"".join(own)
    digests = writer.digests
    assert (digests.bin_digest, digests.blocks.bin_groups) == expected[0]
    assert (digests.idx_digest, digests.blocks.idx_groups) == expected[1]
    counts = [-(-path.stat().st_size // 64) for path in (bin_path(tmp_path / "set"), idx_path(tmp_path / "set"))]
    header = b"megalrps blocks\0" + counts[0].to_bytes(8, "little") + counts[1].to_bytes(8, "little")
    assert blocks_path(tmp_path / "set").read_bytes() == header + leaves


def test_what_was_written_is_described_without_reading_it_again(tmp_path):
    with IndexedDatasetWriter(tmp_path / "set", np.uint16, **SMALL) as writer:
        writer.add_documents(*documents_of([70, 0, 5]))
    blocks = blocks_path(tmp_path / "set").read_bytes()
    described = describe_dataset(tmp_path / "set", **DESCRIPTION, **SMALL)
    assert blocks_path(tmp_path / "set").read_bytes() == blocks
    for path in tmp_path.iterdir():
        path.unlink()
    assert describe_written(writer, **DESCRIPTION) == described
    smaller = replace(TOKENIZER, vocab_size=writer.highest_token)
    with pytest.raises(InputError, match=rf"set\.bin: token id {writer.highest_token} is outside"):
        describe_written(writer, **{**DESCRIPTION, "tokenizer": smaller})
    with pytest.raises(InputError, match="name"):
        describe_written(writer, **{**DESCRIPTION, "name": "../x"})


def test_the_digests_of_an_unfinished_dataset_are_not_known(tmp_path):
    with IndexedDatasetWriter(tmp_path / "set", np.uint16) as writer, pytest.raises(RuntimeError):
        _ = writer.digests


def test_wrong_lengths_and_cut_files_are_refused(tmp_path):
    with IndexedDatasetWriter(tmp_path / "set", np.uint16) as writer:
        tokens = np.arange(4)
        for lengths in ([3], [5], [5, -1], [[4]]):
            with pytest.raises(ValueError, match="lengths"):
                writer.add_documents(tokens, np.array(lengths))
        with pytest.raises(ValueError, match="whole number"):
            writer.copy_documents(io.BytesIO(b"abc"), 3, np.array([1]))
        assert (writer.document_count, writer.token_count) == (0, 0)
        with pytest.raises(EOFError):
            writer.copy_documents(io.BytesIO(b"ab"), 4, np.array([2]))
    with IndexedDatasetWriter(tmp_path / "signed", np.int32) as writer, pytest.raises(InputError, match="do not fit"):
        writer.copy_documents(io.BytesIO(np.array([1, -1], "<i4").tobytes()), 8, np.array([2]))


def test_memory_does_not_grow_with_the_dataset(tmp_path):
    """1.2 million documents, whose index has 24 MB: the buffers of the blocks are what there is."""
    lengths = np.full(30_000, 3)
    tokens = np.zeros(90_000, np.uint16)
    with IndexedDatasetWriter(tmp_path / "set", np.uint16) as writer:
        writer.add_documents(tokens, lengths)
        tracemalloc.start()
        for _ in range(39):
            writer.add_documents(tokens, lengths)
        assert tracemalloc.get_traced_memory()[0] < 2_000_000
    assert tracemalloc.get_traced_memory()[1] < 8_000_000
    tracemalloc.stop()


def test_two_runs_at_once_on_one_prefix_are_refused(tmp_path):
    with IndexedDatasetWriter(tmp_path / "set", np.uint16) as writer:
        writer.add_document([1])
        with (
            pytest.raises(InputError, match=r"\.set\.bin\.partial: another run is writing it; wait"),
            IndexedDatasetWriter(tmp_path / "set", np.uint16),
        ):
            pass
        writer.add_document([2])
    assert bin_path(tmp_path / "set").read_bytes() == b"\1\0\2\0"
    with IndexedDatasetWriter(tmp_path / "set", np.uint16, overwrite=True) as writer:
        writer.add_document([3])
    assert sorted(contents(tmp_path)) == ["set.bin", "set.blocks", "set.idx"]


def test_what_a_killed_run_leaves_is_replaced_by_the_next(tmp_path):
    process = os.fork()
    if process == 0:
        with IndexedDatasetWriter(tmp_path / "set", np.uint16, **SMALL) as writer:
            writer.add_documents(np.ones(1000, np.uint16), np.full(10, 100))
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(process, 0)
    left = contents(tmp_path)
    assert sorted(left) == [".set.bin.partial", ".set.blocks.partial", ".set.idx.partial"]
    assert len(left[".set.bin.partial"]) > 1000
    with IndexedDatasetWriter(tmp_path / "set", np.uint16) as writer:
        writer.add_document([7])
    assert sorted(contents(tmp_path)) == ["set.bin", "set.blocks", "set.idx"]
    assert bin_path(tmp_path / "set").read_bytes() == b"\7\0"


def test_a_partial_file_that_was_renamed_between_opening_and_locking_is_not_cut(tmp_path, monkeypatch):
    """The other run ends just then: what was its partial file is the finished dataset."""
    import fcntl

    lock = fcntl.flock
    finished = []

    def flock(descriptor, operation):
        if not finished:
            finished.append((tmp_path / ".set.bin.partial").replace(tmp_path / "set.bin"))
            os.pwrite(descriptor, b"precious", 0)
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(KeyError), IndexedDatasetWriter(tmp_path / "set", np.uint16) as writer:
        writer.add_document([7])
        raise KeyError
    assert contents(tmp_path) == {"set.bin": b"precious"}
