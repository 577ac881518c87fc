"""Files of a checkpoint that are not those that were saved are refused by name; tests/faults has random damage."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import megalrps.checkpoint
from megalrps.checkpoint.errors import CorruptCheckpointError, UnknownFormatError
from megalrps.checkpoint.manifest import read_manifest, render
from megalrps.checkpoint.store import Store
from megalrps.errors import InputError
from megalrps.fingerprint import fingerprint

SEED = 61
FILES = ("rank-00000.bin", "manifest.json")


@pytest.fixture
def saved(tmp_path: Path) -> Store:
    store = Store(tmp_path / "checkpoints")
    store.prepare()
    generator = torch.Generator().manual_seed(SEED)
    state = {
        "weight": torch.randn(50, 30, generator=generator),
        "step": torch.tensor(7),
        "odd": torch.ones(3, dtype=torch.uint8),
    }
    store.save("main-00000007", state, {"config": {"lr": 1e-05, "name": "é"}, "step": 7})
    return store


def refused(store: Store, pattern: str) -> None:
    """The load raises, names what ``pattern`` matches, and has touched nothing."""
    target = {"weight": torch.zeros(50, 30), "step": torch.tensor(0)}
    with pytest.raises(CorruptCheckpointError, match=pattern) as raised:
        store.load("main-00000007", target)
    assert isinstance(raised.value, InputError)
    assert "\n" not in str(raised.value)
    assert not target["weight"].any()
    assert not target["step"]


def rewrite(path: Path, content: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(content)


@pytest.mark.parametrize("file", FILES)
def test_a_file_that_has_grown_is_refused(saved: Store, file: str):
    path = saved.directory / "main-00000007" / file
    whole = path.read_bytes()
    for more in (b"\0", b"\n", whole):
        rewrite(path, whole + more)
        refused(saved, re.escape(file))
    rewrite(path, whole)
    saved.verify("main-00000007")


def test_every_bit_of_a_manifest_counts(saved: Store):
    """Also those that JSON would forgive: white space, and the case of an exponent's e."""
    path = saved.directory / "main-00000007" / "manifest.json"
    whole = path.read_bytes()
    assert b"1e-05" in whole
    for damaged in (whole.replace(b"1e-05", b"1E-05"), whole + b"\n", whole.replace(b'": ', b'":\t', 1), whole[:-1]):
        rewrite(path, damaged)
        refused(saved, "manifest.json")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("instead", ["nothing", "symbolic link", "directory", "pipe"])
def test_a_file_that_is_not_there_is_refused(saved: Store, file: str, instead: str, tmp_path: Path):
    path = saved.directory / "main-00000007" / file
    path.rename(tmp_path / "elsewhere")
    if instead == "symbolic link":
        path.symlink_to(tmp_path / "elsewhere")
    elif instead == "directory":
        path.mkdir()
    elif instead == "pipe":
        os.mkfifo(path)
    refused(saved, re.escape(file))


def test_all_damaged_files_are_named_at_once(saved: Store):
    rewrite(saved.directory / "main-00000007/rank-00000.bin", b"")
    with pytest.raises(CorruptCheckpointError, match=r"rank-00000\.bin has 0 bytes instead of \d+"):
        saved.verify("main-00000007")


def test_a_copy_under_another_name_is_foreign(saved: Store):
    shutil.copytree(saved.directory / "main-00000007", saved.directory / "main-00000008")
    with pytest.raises(CorruptCheckpointError, match="belongs to a checkpoint named 'main-00000007'"):
        saved.manifest("main-00000008")


# --- manifests that were forged: the digest is right, what it covers is not -------------------------------------------


def reforge(store: Store, change: Callable[[dict[str, Any]], object]) -> None:
    path = store.directory / "main-00000007" / "manifest.json"
    value = json.loads(path.read_text())
    del value["digest"]
    change(value)
    rewrite(path, render(value | {"digest": fingerprint(value)}).encode())


def chunk(value: dict[str, Any]) -> dict[str, Any]:
    return value["tensors"]["weight"]["chunks"][0]


FORGERIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "file outside": lambda value: value["shards"][0].update(file="../rank-00000.bin"),
    "hidden file": lambda value: value["shards"][0].update(file=".metadata"),
    "absolute file": lambda value: value["shards"][0].update(file="/etc/passwd"),
    "negative bytes": lambda value: value["shards"][0].update(bytes=-1),
    "true bytes": lambda value: value["shards"][0].update(bytes=True),
    "shard listed twice": lambda value: value["shards"].append(value["shards"][0]),
    "chunk of no shard": lambda value: chunk(value).update(file="rank-00001.bin"),
    "chunk past the end": lambda value: chunk(value).update(byte_offset=10**6),
    "negative offset": lambda value: chunk(value).update(byte_offset=-64),
    "bytes used twice": lambda value: value["tensors"].update(copy=value["tensors"]["weight"]),
    "wrong length": lambda value: chunk(value).update(byte_length=8),
    "chunk outside": lambda value: chunk(value).update(offsets=[1, 0]),
    "chunk too small": lambda value: chunk(value).update(sizes=[49, 30], byte_length=49 * 30 * 4),
    "huge shape": lambda value: value["tensors"]["weight"].update(shape=[2**40, 2**40]),
    "text shape": lambda value: value["tensors"]["weight"].update(shape="50"),
    "two overlapping chunks": lambda value: value["tensors"]["weight"].update(
        chunks=[
            {
                "offsets": [row, 0],
                "sizes": [25, 30],
                "file": "rank-00000.bin",
                "byte_offset": row * 120,
                "byte_length": 3000,
            }
            for row in (0, 24)
        ]
    ),
    "unknown type": lambda value: value["tensors"]["weight"].update(dtype="object"),
    "extra field": lambda value: value.update(pickle="gASV"),
    "no record": lambda value: value.pop("record"),
    "record a list": lambda value: value.update(record=[]),
    "tensors a list": lambda value: value.update(tensors=[]),
    "shards a number": lambda value: value.update(shards=5),
    "another name": lambda value: value.update(name="main-00000008"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_forged_manifests_are_refused(saved: Store, forgery: str):
    reforge(saved, FORGERIES[forgery])
    refused(saved, "manifest.json")


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{}", '{"digest": NaN}', "[" * 10**6, '{"a": ' * 10**5, "1" * 10**5]
)
def test_texts_that_are_no_manifest_are_refused(saved: Store, text: str):
    rewrite(saved.directory / "main-00000007/manifest.json", text.encode())
    refused(saved, "manifest.json")


def test_a_manifest_beyond_any_of_ours_is_not_even_read(saved: Store):
    path = saved.directory / "main-00000007/manifest.json"
    path.chmod(0o644)
    os.truncate(path, 1 << 40)
    refused(saved, "at most 67108864 bytes")


def test_another_format_is_told_from_damage(saved: Store):
    reforge(saved, lambda value: value.update(format=2))
    with pytest.raises(UnknownFormatError, match="format 2, this version reads 1"):
        read_manifest(saved.directory / "main-00000007")


# --- code -------------------------------------------------------------------------------------------------------------


def test_no_file_of_this_room_can_read_a_pickle():
    files = sorted(Path(str(megalrps.checkpoint.__file__)).parent.glob("*.py"))
    assert len(files) > 5
    for file in files:
        code = re.sub(r'""".*?"""', "", file.read_text(), flags=re.DOTALL)
        assert not re.search(r"\b(pickle|marshal|shelve|torch\.load|torch\.save|FileSystemReader|eval|exec)\b", code), (
            file
        )
