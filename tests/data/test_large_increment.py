"""Large increments open by samples: quickly, in little memory, and damages are found in the blocks that are drawn."""

import os
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megalrps.data.block_reading import digest_dataset
from megalrps.data.increment import OpeningChecks, open_increment
from megalrps.data.index_format import bin_path, blocks_path, idx_path
from megalrps.data.index_writer import IndexedDatasetWriter
from megalrps.data.indexed import IndexedDataset
from megalrps.data.manifest import TokenizerIdentity, describe_written, digest_fields, read_manifest, write_manifest
from megalrps.data.verify import verify_increment
from megalrps.data.windows import IndexDamagedError
from megalrps.errors import InputError

TOKENIZER = TokenizerIdentity("SentencePieceTokenizer", 50_000, 2, "0" * 64)
BLOCK = 512
DOCUMENTS, EACH = 300, 9
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def sampled(draw=None, blocks=2):
    return OpeningChecks(whole_bytes=0, sampled_blocks=blocks, draw=draw)


EVERYTHING = sampled(0, 10**6)


def write(prefix, dtype=np.uint16):
    """300 documents of 9 tokens: .bin of 11 blocks in 3 groups, .idx of 12 in 3."""
    with IndexedDatasetWriter(prefix, dtype, block_bytes=BLOCK, group_blocks=4) as writer:
        writer.add_documents(np.arange(DOCUMENTS * EACH), np.full(DOCUMENTS, EACH))
    manifest = describe_written(writer, name="x", tokenizer=TOKENIZER, text_bytes=9, append_eod=False, sources=())
    write_manifest(prefix, manifest)
    return prefix


def flip(path, offset):
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


@pytest.fixture
def prefix(tmp_path):
    """A small increment that the checks of this file take for a large one."""
    return write(tmp_path / "set")


def test_what_is_whole_opens_by_samples(prefix):
    for draw in range(5):
        opened = open_increment(prefix, checks=sampled(draw))
    assert opened.dataset.tokens.tolist() == list(range(DOCUMENTS * EACH))
    starts = np.array([5, 2690], np.int64)
    assert opened.dataset.gather(starts, 10).tolist() == [list(range(5, 15)), list(range(2690, 2700))]
    assert opened.dataset.document_starts(starts, 10).tolist() == [[0] * 4 + [4] * 6, [0] + [1] * 9]
    assert opened.dataset.read(7, 9).tolist() == [7, 8]


@pytest.mark.parametrize(("path_of", "offset"), [(bin_path, 0), (bin_path, 5399), (idx_path, 40), (idx_path, 3200)])
def test_a_changed_byte_is_found_when_its_block_is_drawn_and_named(prefix, path_of, offset):
    path = path_of(prefix)
    flip(path, offset)
    start = offset // BLOCK * BLOCK
    words = (
        rf"{path.name}: changed since .*SHA-256 of bytes {start}-{min(start + BLOCK, path.stat().st_size) - 1} differs"
    )
    with pytest.raises(InputError, match=words):
        open_increment(prefix, checks=EVERYTHING)
    with pytest.raises(InputError, match=words):
        open_increment(prefix, verify=True, checks=sampled(0))
    found = 0
    for draw in range(60):
        try:
            open_increment(prefix, checks=sampled(draw))
        except InputError as error:
            assert str(error).startswith(f"{path}: ")
            found += 1
    assert 1 <= found < 40  # 2 blocks of 11 or 12 are drawn: 10 expected


def test_each_opening_draws_other_blocks_unless_told(prefix, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "megalrps.data.increment.check_blocks", lambda file, leaves, block_bytes: drawn.append((file.name, *leaves))
    )
    for _ in range(12):
        open_increment(prefix, checks=sampled())
    assert len(set(drawn)) > 6
    drawn.clear()
    for draw in (7, 7, 8):
        open_increment(prefix, checks=sampled(draw))
    assert drawn[:2] == drawn[2:4] != drawn[4:]


@pytest.mark.parametrize(
    ("layout", "offset", "value"),
    [
        ("<i", 34 + 4 * 100, -1),
        ("<q", 34 + 4 * DOCUMENTS + 8 * 100, 2**62),
        ("<q", 34 + 4 * DOCUMENTS + 8 * 100, -2),
        ("<q", 34 + 4 * DOCUMENTS + 8 * 100, 1),
        ("<q", 34 + 12 * DOCUMENTS + 8 * 100, DOCUMENTS + 5),
        ("<q", 34 + 12 * DOCUMENTS + 8 * 100, 98),
    ],
)
def test_the_entries_of_sampled_blocks_are_checked_too(prefix, layout, offset, value):
    """Of an index whose digests fit: one that was written wrong."""
    content = bytearray(idx_path(prefix).read_bytes())
    struct.pack_into(layout, content, offset, value)
    idx_path(prefix).write_bytes(content)
    dataset = IndexedDataset(prefix, checked_bytes=0)
    with pytest.raises(InputError, match=r"set\.(idx|bin): .*(damaged|another dataset)"):
        dataset.check_entries(offset // BLOCK * BLOCK, (offset // BLOCK + 1) * BLOCK)
    if layout == "<q" and offset < 34 + 12 * DOCUMENTS:
        starts = np.array([100 * EACH - 3], np.int64)
        with pytest.raises(IndexDamagedError):
            dataset.document_starts(starts, 20)
        if value != 1:
            with pytest.raises(InputError, match=r"sequence 100 lies outside"):
                dataset[100]


@pytest.mark.parametrize(
    ("start", "value"),
    [
        (34 + 4 * DOCUMENTS, 2**40),
        (34 + 4 * DOCUMENTS, -4),
        (34 + 4 * DOCUMENTS, 1001),
        (34 + 12 * DOCUMENTS, DOCUMENTS + 1),
        (34 + 12 * DOCUMENTS, -1),
    ],
)
def test_entries_in_order_that_lead_outside_are_noticed(prefix, start, value):
    """Offsets or documents 100 to 149, all the same: in order, but out of bounds, or no start of a token."""
    with open(idx_path(prefix), "r+b") as file:
        file.seek(start + 8 * 100)
        file.write(struct.pack("<q", value) * 50)
    dataset = IndexedDataset(prefix, checked_bytes=0)
    dataset.check_entries(0, start + 8 * 100)
    dataset.check_entries(start + 8 * 150, len(idx_path(prefix).read_bytes()))
    with pytest.raises(InputError, match=r"set\.idx: .*damaged"):
        dataset.check_entries(start + 8 * 101, start + 8 * 149)


def test_an_index_written_wrong_is_refused_though_its_digests_fit(prefix):
    content = bytearray(idx_path(prefix).read_bytes())
    struct.pack_into("<i", content, 34 + 4 * 100, -1)
    idx_path(prefix).write_bytes(content)
    digests = digest_dataset(prefix, BLOCK, 4, lambda block: None)
    write_manifest(prefix, replace(read_manifest(prefix), **digest_fields(digests)))
    with pytest.raises(InputError, match=r"set\.idx: holds a negative sequence length"):
        open_increment(prefix, checks=EVERYTHING)
    found = verify_increment(prefix)
    assert [bad.complaint.split(":")[1] for bad in found.bad_files] == [" holds a negative sequence length"]


@pytest.mark.parametrize("part", ["first pointer", "last pointer", "last length", "first document", "last document"])
def test_the_ends_of_an_index_are_always_checked(prefix, part):
    offset, value = {
        "first pointer": (34 + 4 * DOCUMENTS, 2),
        "last pointer": (34 + 12 * DOCUMENTS - 8, 2 * EACH * (DOCUMENTS - 2)),
        "last length": (34 + 4 * DOCUMENTS - 4, -1),
        "first document": (34 + 12 * DOCUMENTS, 1),
        "last document": (34 + 20 * DOCUMENTS, DOCUMENTS - 1),
    }[part]
    content = bytearray(idx_path(prefix).read_bytes())
    struct.pack_into("<i" if part == "last length" else "<q", content, offset, value)
    idx_path(prefix).write_bytes(content)
    with pytest.raises(InputError, match=r"(set\.idx: .*damaged|set\.bin: .*another dataset)"):
        IndexedDataset(prefix, checked_bytes=0)


@pytest.mark.parametrize("size", [5399, 5398, 5402, 0])
def test_tokens_of_another_size_are_refused(prefix, size):
    os.truncate(bin_path(prefix), size)
    with pytest.raises(InputError, match=r"set\.bin: .*cut short"):
        open_increment(prefix, checks=sampled(0))


def test_half_a_token_at_the_end_is_refused(prefix):
    """The last sequence begins within a token, and .bin ends so: both ends of the index fit."""
    with open(idx_path(prefix), "r+b") as file:
        file.seek(34 + 12 * DOCUMENTS - 8)
        file.write(struct.pack("<q", 2 * EACH * (DOCUMENTS - 1) + 1))
    with open(bin_path(prefix), "ab") as file:
        file.write(b"\0")
    with pytest.raises(InputError, match=r"set\.bin: .*another dataset"):
        IndexedDataset(prefix, checked_bytes=0)


def test_digests_of_blocks_that_are_missing_or_changed_are_named(prefix):
    path = blocks_path(prefix)
    whole = path.read_bytes()
    for content, words in (
        (whole[:-1], "not the digests of these blocks"),
        (whole + b"\0", "not the digests of these blocks"),
        (b"x" + whole[1:], "not the digests of these blocks"),
        (whole[:40] + bytes([whole[40] ^ 1]) + whole[41:], r"bytes 32 to 160 do not have its SHA-256"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=rf"set\.blocks: .*{words}.*preprocess_data\.py again"):
            open_increment(prefix, checks=EVERYTHING)
    path.unlink()
    with pytest.raises(InputError, match=r"set\.blocks: no such file"):
        open_increment(prefix, checks=sampled(0))
    open_increment(prefix)  # small: compared whole


def test_a_manifest_of_version_1_is_opened_as_ever(prefix):
    """Without digests of blocks the whole index is read; of the tokens, if there are many, nothing."""
    before = read_manifest(prefix)
    write_manifest(prefix, replace(before, blocks=None))
    blocks_path(prefix).unlink()
    opened = open_increment(prefix, checks=sampled(0))
    assert opened.manifest.blocks is None and opened.manifest.fingerprint == before.fingerprint
    flip(bin_path(prefix), 9)
    open_increment(prefix, checks=sampled(0))
    with pytest.raises(InputError, match=r"set\.bin: changed since"):
        open_increment(prefix, verify=True, checks=sampled(0))
    flip(bin_path(prefix), 9)
    flip(idx_path(prefix), 34 + 12 * DOCUMENTS + 8 * 100)
    with pytest.raises(InputError, match=r"set\.idx: "):
        open_increment(prefix, checks=sampled(0))


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """Two million documents: an index of 40 MB over 4 GB of tokens, which are a hole."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import big_increment
    finally:
        sys.path.pop(0)
    prefix = tmp_path_factory.mktemp("big") / "big"
    big_increment.write_big_increment(prefix, 2_000_000)
    yield prefix
    big_increment.remove(prefix)


def test_opening_reads_little_of_a_big_increment(big):
    """The samples are 8 MiB, the files 4 GB; what is resident must not be the index of 40 MB either."""
    code = (
        "import sys, time, resource\n"
        "from megalrps.data.increment import open_increment\n"
        "size = lambda: int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize()\n"
        "before, read = size(), int(open('/proc/self/io').read().split()[1])\n"
        "used = time.process_time()\n"
        "opened = open_increment(sys.argv[1])\n"
        "print(size() - before, int(open('/proc/self/io').read().split()[1]) - read, time.process_time() - used)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(big)], capture_output=True, text=True, check=True)
    resident, read, seconds = map(float, done.stdout.split())
    assert resident < 24e6
    assert read < 10e6
    assert seconds < 0.2
    assert open_increment(big).manifest.documents == 2_000_000


def test_a_big_increment_is_read_at_its_ends(big):
    dataset = open_increment(big).dataset
    starts = np.array([0, 1_999_999_990], np.int64)
    assert dataset.gather(starts, 10).tolist() == [[0] * 10] * 2
    assert dataset.document_starts(np.array([999_999_995], np.int64), 10).tolist() == [[0] * 5 + [5] * 5]
    started = time.process_time()
    dataset.document_starts(np.arange(0, 1_999_000_000, 10**7), 2048)
    assert time.process_time() - started < 1.0
