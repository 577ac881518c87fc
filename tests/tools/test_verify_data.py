"""What is whole is called whole; every file that is not is named, and no other."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megalrps.data.indexed import IndexedDatasetWriter, bin_path, idx_path, manifest_path
from megalrps.data.manifest import (
    TokenizerIdentity,
    describe_dataset,
    read_manifest,
    write_manifest,
)
from megalrps.data.verify import verify_increment
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
    """A manifest that was written about a damaged dataset, with the digests of the damage."""
    prefix = prefixes[0]
    bin_path(prefix).write_bytes(bin_path(prefix).read_bytes() + b"\0\0")
    write_manifest(prefix, replace(read_manifest(prefix), bin_digest=file_digest(bin_path(prefix))))
    (bad,) = verify_increment(prefix).bad_files
    assert bad.path == bin_path(prefix) and "are not what 2023.idx describes" in bad.complaint
