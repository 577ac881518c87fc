"""Increments under URLs: fetched block by block, checked before they are kept, and never a hole read as zeros."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest

import megalrps.data.remote
from megalrps.data.increment import OpeningChecks, open_increment
from megalrps.data.index_writer import IndexedDatasetWriter
from megalrps.data.manifest import TokenizerIdentity, describe_written, read_manifest, write_manifest
from megalrps.data.options import DataOptions
from megalrps.data.remote import Fetching, cached_increment
from megalrps.data.verify import verify_increment
from megalrps.errors import InputError

TOKENIZER = TokenizerIdentity("SentencePieceTokenizer", 50_000, 2, "0" * 64)
TOKENS = np.arange(1, 2701)
HASTY = Fetching(threads=4, attempts=2, pause_seconds=0.001)
SUFFIXES = ("bin", "idx", "blocks", "json")


def write(prefix, first=0):
    """300 documents of 9 tokens in blocks of 512 bytes: 11 of .bin."""
    with IndexedDatasetWriter(prefix, np.uint16, block_bytes=512, group_blocks=4) as writer:
        writer.add_documents(TOKENS + first, np.full(300, 9))
    manifest = describe_written(writer, name="x", tokenizer=TOKENIZER, text_bytes=9, append_eod=False, sources=())
    write_manifest(prefix, manifest)
    return prefix


class Elsewhere:
    """An increment in fsspec's memory:// and the reads that reach it."""

    def __init__(self, prefix, monkeypatch):
        self.url = f"memory:/{prefix}"
        self.system = fsspec.filesystem("memory")
        self.reads: list[tuple[str, int | None]] = []
        for suffix in SUFFIXES:
            self.put(suffix, Path(f"{prefix}.{suffix}").read_bytes())
        self._cat = self.system.cat_file
        self.fail = lambda path, start: None
        # Of the class: fsspec makes a file system for each thread.
        monkeypatch.setattr(
            type(self.system), "cat_file", lambda system, *given, **more: self._cat_file(*given, **more)
        )

    def put(self, suffix, content):
        self.system.pipe_file(f"{self.url.removeprefix('memory:/')}.{suffix}", content)

    def get(self, suffix):
        return self._cat(f"{self.url.removeprefix('memory:/')}.{suffix}")

    def flip(self, suffix, offset):
        content = bytearray(self.get(suffix))
        content[offset] ^= 1
        self.put(suffix, bytes(content))

    def _cat_file(self, path, start=None, end=None, **more):
        self.reads.append((path.rsplit(".", 1)[1], start))
        self.fail(path, start)
        return self._cat(path, start=start, end=end, **more)

    def blocks_read(self):
        """The blocks of .bin that were asked for, in any order."""
        return sorted(start // 512 for suffix, start in self.reads if suffix == "bin")


@pytest.fixture
def far(tmp_path, monkeypatch):
    made = Elsewhere(write(tmp_path / "source" / "set"), monkeypatch)
    monkeypatch.setattr("megalrps.data.increment.DEFAULT_FETCHING", HASTY)
    return made


def check_reads(dataset):
    starts = np.array([0, 700, 2690, 250], np.int64)
    assert dataset.gather(starts, 10).tolist() == [TOKENS[at : at + 10].tolist() for at in starts]
    assert dataset.read(1000, 1700).tolist() == TOKENS[1000:1700].tolist()
    assert dataset[299].tolist() == TOKENS[-9:].tolist()
    assert dataset.document_starts(starts[1:2], 10).tolist() == [[0] * 2 + [2] * 8]


def test_blocks_are_fetched_when_they_are_needed_and_once(far, tmp_path):
    opened = open_increment(far.url, cache=tmp_path / "cache")
    assert far.blocks_read() == [] and opened.dataset.tokens_count == 2700
    assert opened.dataset.gather(np.array([250], np.int64), 10).tolist() == [TOKENS[250:260].tolist()]
    assert far.blocks_read() == [0, 1]
    check_reads(opened.dataset)
    assert far.blocks_read() == [0, 1, 2, 3, 4, 5, 6, 10]
    check_reads(open_increment(far.url, cache=tmp_path / "cache").dataset)
    assert far.blocks_read() == [0, 1, 2, 3, 4, 5, 6, 10]
    assert [suffix for suffix, _ in far.reads].count("idx") == 12  # each block once, for both openings


def test_a_folder_is_a_url_too_and_the_same_content_is_kept_once(tmp_path):
    write(tmp_path / "a" / "set")
    write(tmp_path / "b" / "other")
    write(tmp_path / "b" / "third", first=1)
    for prefix in ("a/set", "b/other", "b/third"):
        opened = open_increment(f"file://{tmp_path}/{prefix}", cache=str(tmp_path / "cache"))
        assert opened.manifest == read_manifest(tmp_path / prefix)
        assert opened.dataset.read(0, 9).tolist() == (TOKENS[:9] + (prefix == "b/third")).tolist()
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_the_flat_array_of_tokens_with_its_holes_is_not_to_be_had(far, tmp_path):
    dataset = open_increment(far.url, cache=tmp_path / "cache").dataset
    with pytest.raises(RuntimeError, match="fetched as they are needed"):
        _ = dataset.tokens
    for start, length in ((-1, 5), (2700, 1), (2696, 5)):
        with pytest.raises(ValueError, match=r"windows of|tokens"):
            dataset.gather(np.array([start], np.int64), length)
    with pytest.raises(ValueError, match="tokens"):
        dataset.read(2699, 2701)
    assert far.blocks_read() == []


def test_a_changed_block_is_refused_before_it_is_kept_and_mended_later(far, tmp_path):
    dataset = open_increment(far.url, cache=tmp_path / "cache").dataset
    far.flip("bin", 600)
    for _ in range(2):
        with pytest.raises(InputError, match=r"set\.bin: cannot be fetched after 2 attempts \(bytes 512-1023 changed"):
            dataset.read(0, 600)
    (kept,) = (tmp_path / "cache").glob("*/increment.bin")
    assert not any(kept.read_bytes()[512:1024])
    far.flip("bin", 600)
    assert dataset.read(0, 600).tolist() == TOKENS[:600].tolist()


@pytest.mark.parametrize(
    ("suffix", "offset", "words"),
    [
        ("idx", 700, r"set\.idx: cannot be fetched .*bytes 512-1023 changed"),
        ("blocks", 0, r"set\.blocks: not the digests of these blocks"),
        ("blocks", 200, r"set\.blocks: changed since"),
        ("json", 30, r"set\.json: not a valid increment manifest"),
    ],
)
def test_other_damage_elsewhere_is_refused_and_leaves_nothing_half(far, tmp_path, suffix, offset, words):
    far.flip(suffix, offset)
    with pytest.raises(InputError, match=words):
        open_increment(far.url, cache=tmp_path / "cache")
    far.flip(suffix, offset)
    check_reads(open_increment(far.url, cache=tmp_path / "cache").dataset)


def test_what_fails_is_tried_again_and_told_in_the_end(far, tmp_path):
    failures = [ConnectionError("reset by peer")]

    def fail(path, start):
        if failures:
            raise failures.pop()

    far.fail = fail
    dataset = open_increment(far.url, cache=tmp_path / "cache").dataset
    failures.append(TimeoutError())
    assert dataset.read(0, 5).tolist() == TOKENS[:5].tolist()
    failures += [OSError("no route")] * 9
    with pytest.raises(InputError, match=r"set\.bin: cannot be fetched after 2 attempts \(no route\); check network"):
        dataset.read(600, 605)
    failures.clear()
    assert dataset.read(600, 605).tolist() == TOKENS[600:605].tolist()


def test_answers_that_are_cut_short_are_not_kept(far, tmp_path):
    dataset = open_increment(far.url, cache=tmp_path / "cache").dataset
    far.put("bin", far.get("bin")[:-100])
    with pytest.raises(InputError, match=r"set\.bin: has 5300 bytes where its manifest says 5400"):
        dataset.read(0, 5)


@pytest.mark.parametrize(
    "damage", ["zero marks", "random marks", "marks of ones", "no marks", "no tokens", "cut tokens"]
)
def test_a_damaged_cache_never_passes_a_hole_off_as_data(far, tmp_path, damage):
    open_increment(far.url, cache=tmp_path / "cache").dataset.read(0, 300)
    (present,) = (tmp_path / "cache").glob("*/increment.present")
    content = present.with_suffix(".bin")
    if damage.endswith("marks") and damage != "no marks":
        marks = {"zero marks": bytes(88), "random marks": os.urandom(88)}[damage]
        present.write_bytes(marks)
    elif damage == "marks of ones":
        present.write_bytes(b"\1\0\0\0\0\0\0\0" * 11)
    elif damage == "no marks":
        present.unlink()
    elif damage == "no tokens":
        content.unlink()
    else:
        os.truncate(content, 100)
    check_reads(open_increment(far.url, cache=tmp_path / "cache").dataset)


def test_marks_do_not_outlive_the_tokens_they_are_of(far, tmp_path, monkeypatch):
    """The tokens are lost, and the process that makes room for them again ends before it has made new marks."""
    open_increment(far.url, cache=tmp_path / "cache").dataset.read(0, 2700)
    (kept,) = (tmp_path / "cache").glob("*/increment.bin")
    kept.unlink()

    def ends(path):
        if path.suffix == ".present":
            raise KeyError
        return filling(path)

    filling = megalrps.data.remote._filling
    monkeypatch.setattr("megalrps.data.remote._filling", ends)
    with pytest.raises(KeyError):
        open_increment(far.url, cache=tmp_path / "cache")
    monkeypatch.setattr("megalrps.data.remote._filling", filling)
    assert kept.stat().st_size == 5400
    check_reads(open_increment(far.url, cache=tmp_path / "cache").dataset)


@pytest.mark.parametrize("suffix", ["bin", "idx", "blocks"])
def test_what_was_changed_in_the_cache_is_noticed_with_the_mend(far, tmp_path, suffix):
    open_increment(far.url, cache=tmp_path / "cache").dataset.read(0, 2700)
    (kept,) = (tmp_path / "cache").glob(f"*/increment.{suffix}")
    content = bytearray(kept.read_bytes())
    content[600] ^= 1
    kept.write_bytes(content)
    everything = OpeningChecks(whole_bytes=0, sampled_blocks=99)
    with pytest.raises(InputError, match=rf"increment\.{suffix}: .*; remove {kept.parent}: it is fetched again"):
        open_increment(far.url, cache=tmp_path / "cache", checks=everything)


def test_many_threads_and_openings_share_a_cache(far, tmp_path):
    barrier = threading.Barrier(6)

    def read(number):
        barrier.wait(30)
        dataset = open_increment(far.url, cache=tmp_path / "cache").dataset
        starts = np.random.default_rng(number).integers(0, 2690, 40)
        return dataset.gather(starts, 10).tolist() == [TOKENS[at : at + 10].tolist() for at in starts]

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(read, range(6))) == [True] * 6
    assert [suffix for suffix, _ in far.reads].count("idx") == 12


def test_processes_share_a_cache(tmp_path):
    """Each reads all in an order of its own while the others do."""
    url, cache = f"file://{write(tmp_path / 'set')}", tmp_path / "cache"
    children = []
    for number in range(4):
        process = os.fork()
        if process == 0:
            status = 1
            try:
                dataset = open_increment(url, cache=cache).dataset
                starts = np.random.default_rng(number).permutation(2691)
                rows = dataset.gather(starts, 9)
                status = 0 if np.array_equal(rows, TOKENS[starts[:, None] + np.arange(9)]) else 2
            finally:
                os._exit(status)
        children.append(process)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4


def test_tokens_are_on_the_disk_before_they_are_marked(far, tmp_path, monkeypatch):
    calls = []
    pwrite, sync = os.pwrite, os.fdatasync

    def name(descriptor):
        return Path(f"/proc/self/fd/{descriptor}").readlink().suffix

    dataset = open_increment(far.url, cache=tmp_path / "cache").dataset
    monkeypatch.setattr(os, "pwrite", lambda fd, *more: (calls.append(f"write {name(fd)}"), pwrite(fd, *more))[1])
    monkeypatch.setattr(os, "fdatasync", lambda fd: (calls.append(f"sync {name(fd)}"), sync(fd)))
    dataset.read(0, 300)
    assert calls == ["write .bin"] * 2 + ["sync .bin"] + ["write .present"] * 2


def test_a_url_needs_a_cache_and_digests_of_blocks(far, tmp_path):
    with pytest.raises(InputError, match=r"set: .*add --data-cache-path"):
        open_increment(far.url)
    with pytest.raises(InputError, match=r"set: .*add --data-cache-path"):
        DataOptions(increments=(far.url,)).check()
    DataOptions(increments=(far.url,), data_cache_path="cache").check()
    prefix = tmp_path / "source" / "set"
    write_manifest(prefix, replace(read_manifest(prefix), blocks=None))
    far.put("json", Path(f"{prefix}.json").read_bytes())
    with pytest.raises(InputError, match=r"set\.json: has no digests of blocks .*adopt_dataset\.py"):
        open_increment(far.url, cache=tmp_path / "cache")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("memory://nowhere/set", r"memory://nowhere/set\.json: no such file"),
        ("strange://nowhere/set", r"strange://nowhere/set\.json: no such kind of URL"),
    ],
)
def test_what_cannot_be_reached_is_named(tmp_path, url, words):
    with pytest.raises(InputError, match=words):
        open_increment(url, cache=tmp_path / "cache")


def test_a_url_is_verified_without_a_cache(far, tmp_path):
    read = []
    found = verify_increment(far.url, read.append)
    assert found.bad_files == () and found.manifest == read_manifest(tmp_path / "source" / "set")
    assert sum(read) >= found.manifest.bin_bytes + found.manifest.idx_bytes
    far.flip("bin", 600)
    far.flip("bin", 1600)
    far.flip("idx", 50)
    idx, content = verify_increment(far.url).bad_files
    assert idx.path == f"{far.url}.idx" and "bytes 0-511 differs" in idx.complaint
    assert content.path == f"{far.url}.bin" and "bytes 512-1023, 1536-2047 differs" in content.complaint


def test_verified_while_opening(far, tmp_path):
    open_increment(far.url, verify=True, cache=tmp_path / "cache")
    far.flip("bin", 600)
    with pytest.raises(InputError, match=r"set\.bin: changed since .*bytes 512-1023"):
        open_increment(far.url, verify=True, cache=tmp_path / "cache")


def test_a_full_disk_is_told_with_the_folder(far, tmp_path, monkeypatch):
    kept = cached_increment(far.url, tmp_path / "cache", HASTY)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="choose another --data-cache-path") as caught:
        kept.need(np.array([0], np.int64), 10)
    assert caught.value.errno == 28 and str(tmp_path / "cache") in str(caught.value.filename)
