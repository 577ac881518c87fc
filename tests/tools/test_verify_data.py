"""What is whole is called whole; every file that is not is named, and no other."""

import io
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megalrps.data.indexed import IndexedDatasetWriter, bin_path, blocks_path, idx_path, manifest_path
from megalrps.data.manifest import (
    TokenizerIdentity,
    describe_dataset,
    describe_written,
    read_manifest,
    write_manifest,
)
from megalrps.data.verify import bytes_to_read, verify_increment
from megalrps.fingerprint import file_digest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "verify_data.py"


@pytest.fixture
def prefixes(tmp_path: Path) -> list[Path]:
    """Two increments of the same structure and other tokens."""
    made = [tmp_path / "2023", tmp_path / "2024"]
    for number, prefix in enumerate(made):
        with IndexedDatasetWriter(prefix, np.uint16) as writer:
            writer.add_document([number, 2, 3])
            writer.add_document([4, 5])
        identity = TokenizerIdentity("SentencePieceTokenizer", 100, 2, "0" * 64)
        manifest = describe_dataset(
            prefix, name=prefix.name, tokenizer=identity, text_bytes=9, append_eod=False, sources=()
        )
        write_manifest(prefix, manifest)
    return made


def verify(*prefixes: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), "--data", *map(str, prefixes)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def test_whole_increments_end_well(prefixes: list[Path]):
    done = verify(*prefixes)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "".join(f"{prefix}: whole, 2 documents, 5 tokens\n" for prefix in prefixes)


def test_every_bad_file_is_named_in_one_line(prefixes: list[Path]):
    first, second = prefixes
    flip_bit(idx_path(first))
    flip_bit(bin_path(first))
    bin_path(second).unlink()
    done = verify(first, second)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"{first}.idx, {first}.bin, {second}.bin;" in done.stderr
    assert f"{first}: BAD\n  {first}.idx: changed since" in done.stdout


def swap_tokens(prefix: Path) -> None:
    other = prefix.with_name("2024")
    bin_path(prefix).write_bytes(bin_path(other).read_bytes())


def promise_more_tokens(prefix: Path) -> None:
    write_manifest(prefix, replace(read_manifest(prefix), tokens=6))


@pytest.mark.parametrize(
    ("damage", "suffixes"),
    [
        (lambda prefix: flip_bit(bin_path(prefix)), [".bin"]),
        (lambda prefix: flip_bit(idx_path(prefix)), [".idx"]),
        (lambda prefix: flip_bit(manifest_path(prefix)), [".json"]),
        (lambda prefix: manifest_path(prefix).unlink(), [".json"]),
        (lambda prefix: idx_path(prefix).unlink(), [".idx"]),
        (lambda prefix: flip_bit(blocks_path(prefix)), [".blocks"]),
        (lambda prefix: blocks_path(prefix).unlink(), [".blocks"]),
        (swap_tokens, [".bin"]),
        (promise_more_tokens, [".json"]),
    ],
)
def test_the_file_that_is_bad_is_the_one_named(
    prefixes: list[Path], damage: Callable[[Path], None], suffixes: list[str]
):
    assert verify_increment(prefixes[0]).bad_files == ()
    damage(prefixes[0])
    found = verify_increment(prefixes[0]).bad_files
    assert [str(bad.path) for bad in found] == [f"{prefixes[0]}{suffix}" for suffix in suffixes]
    assert all(bad.complaint.startswith(f"{bad.path}: ") and "\n" not in bad.complaint for bad in found)
    assert verify_increment(prefixes[1]).bad_files == ()


def test_a_dataset_that_no_longer_opens_though_its_digests_fit_is_named(prefixes: list[Path]):
    """A manifest of version 1 that was written about a damaged dataset, with the digests of the damage."""
    prefix = prefixes[0]
    bin_path(prefix).write_bytes(bin_path(prefix).read_bytes() + b"\0\0")
    digest = file_digest(bin_path(prefix))
    write_manifest(prefix, replace(read_manifest(prefix), bin_digest=digest, blocks=None))
    (bad,) = verify_increment(prefix).bad_files
    assert bad.path == f"{prefix}.bin" and "are not what 2023.idx describes" in bad.complaint


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """An increment of several groups of blocks: 3 blocks of 512 bytes in each."""
    prefix = tmp_path / "large"
    with IndexedDatasetWriter(prefix, np.uint16, block_bytes=512, group_blocks=3) as writer:
        writer.add_documents(np.arange(3000), np.full(300, 10))
    identity = TokenizerIdentity("SentencePieceTokenizer", 50_000, 2, "0" * 64)
    manifest = describe_written(writer, name="large", tokenizer=identity, text_bytes=9, append_eod=False, sources=())
    write_manifest(prefix, manifest)
    return prefix


def flip_at(path: Path, *offsets: int) -> None:
    content = bytearray(path.read_bytes())
    for offset in offsets:
        content[offset] ^= 1
    path.write_bytes(content)


def test_the_bytes_that_were_changed_are_named(large: Path):
    flip_at(bin_path(large), 600, 1030, 5999)
    flip_at(idx_path(large), 40)
    idx, content = verify_increment(large).bad_files
    assert idx.path == f"{large}.idx" and "SHA-256 of bytes 0-511 differs" in idx.complaint
    assert content.path == f"{large}.bin" and "SHA-256 of bytes 512-1535, 5632-5999 differs" in content.complaint


def test_without_the_digests_of_blocks_the_group_is_named(large: Path):
    flip_at(bin_path(large), 600)
    blocks_path(large).unlink()
    blocks, content = verify_increment(large).bad_files
    assert blocks.path == f"{large}.blocks" and "no such file" in blocks.complaint
    assert "SHA-256 of bytes 0-1535 differs" in content.complaint


def test_all_bytes_are_told_to_the_progress(large: Path):
    read: list[int] = []
    assert verify_increment(large, read.append).bad_files == ()
    assert bytes_to_read(large) <= sum(read) < bytes_to_read(large) + 2 * 512
    assert bytes_to_read(large.with_name("absent")) == 0


def test_a_terminal_shows_a_bar(large: Path, monkeypatch: pytest.MonkeyPatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    with runpy.run_path(str(TOOL))["progress"](str(large)) as advance:
        advance(bytes_to_read(large))
    assert "large" in terminal.getvalue() and "kB" in terminal.getvalue()


def test_a_url_is_verified_like_a_path(large: Path):
    done = subprocess.run(
        [sys.executable, str(TOOL), "--data", f"file://{large}"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, f"file://{large}: whole, 300 documents, 3,000 tokens\n")
