"""The increment manifest: what it says is true, and no changed manifest is read."""

import contextlib
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megalrps.data.block_digests import BlockDigests
from megalrps.data.indexed import IndexedDatasetWriter
from megalrps.data.manifest import (
    IncrementManifest,
    TokenizerIdentity,
    check_increment_name,
    describe_dataset,
    read_manifest,
    write_manifest,
)
from megalrps.errors import InputError
from megalrps.fingerprint import fingerprint

MANIFEST = IncrementManifest(
    name="2024-05",
    tokens=7,
    documents=3,
    sequences=2,
    text_bytes=30,
    dtype="uint16",
    append_eod=True,
    tokenizer=TokenizerIdentity("SentencePieceTokenizer", 100, 2, "c" * 64),
    bin_digest="a" * 64,
    idx_digest="b" * 64,
    sources=("may é.jsonl.gz",),
)

# .bin has 14 bytes, .idx 34 + 12 * 2 + 8 * 4 = 90: with blocks of 64 bytes in groups of one, 1 and 2 groups.
BLOCKS = BlockDigests(64, 1, ("d" * 64,), ("e" * 64, "f" * 64))
WITH_BLOCKS = replace(MANIFEST, blocks=BLOCKS)


def signed(manifest=MANIFEST, **changes):
    """A stored manifest with some fields changed and a digest that fits."""
    body = {key: value for key, value in {**manifest.to_json(), **changes}.items() if key != "digest"}
    return {**body, "digest": fingerprint(body)}


def blocks_with(**changes):
    return signed(WITH_BLOCKS, blocks={**WITH_BLOCKS.to_json()["blocks"], **changes})


@pytest.mark.parametrize("manifest", [MANIFEST, WITH_BLOCKS], ids=["version 1", "version 2"])
def test_what_was_written_is_read(tmp_path, manifest):
    path = write_manifest(tmp_path / "set", manifest)
    assert path == tmp_path / "set.json"
    assert read_manifest(tmp_path / "set") == manifest


def test_a_manifest_without_digests_of_blocks_is_the_one_of_version_1():
    stored = MANIFEST.to_json()
    assert stored["version"] == 1 and "blocks" not in stored
    assert stored["digest"] == "16ac66968534cca2b4b8b008d0c893423daaaf1bcef170a7c813393452b04521"
    assert WITH_BLOCKS.to_json()["version"] == 2


def test_digests_of_blocks_do_not_enter_the_fingerprint():
    """The order of samples follows from it."""
    assert WITH_BLOCKS.fingerprint == MANIFEST.fingerprint


def test_fingerprint_is_of_the_content_and_golden():
    assert MANIFEST.fingerprint == "30e2dba05e4507f99a11b8eb441f7cc3c4760baf8d63a4ecac76d73913ccb29c"
    assert replace(MANIFEST, name="may", sources=(), text_bytes=0).fingerprint == MANIFEST.fingerprint
    for changes in (
        {"bin_digest": "d" * 64},
        {"idx_digest": "d" * 64},
        {"tokenizer": replace(MANIFEST.tokenizer, fingerprint="d" * 64)},
        {"tokenizer": replace(MANIFEST.tokenizer, eod=3)},
    ):
        assert replace(MANIFEST, **changes).fingerprint != MANIFEST.fingerprint


def test_describes_a_dataset(tmp_path):
    with IndexedDatasetWriter(tmp_path / "set", np.uint16) as writer:
        writer.add_document([1, 2, 3])
        writer.add_document([])
        writer.add_document([4, 99], [1, 1])
    manifest = describe_dataset(
        tmp_path / "set", name="x", tokenizer=MANIFEST.tokenizer, text_bytes=9, append_eod=False, sources=("x.jsonl",)
    )
    assert (manifest.tokens, manifest.documents, manifest.sequences, manifest.dtype) == (5, 3, 3, "uint16")
    assert manifest.bin_digest == "1f176b5dafebbd621fe6d792f36ee8a5e5386f9e91241da1a461025570310b95"
    with pytest.raises(InputError, match=r"set\.bin: token id 99 is outside .* vocabulary of 99"):
        smaller = replace(MANIFEST.tokenizer, vocab_size=99)
        describe_dataset(tmp_path / "set", name="x", tokenizer=smaller, text_bytes=9, append_eod=False, sources=())
    with pytest.raises(InputError, match="name"):
        describe_dataset(
            tmp_path / "set", name="../x", tokenizer=MANIFEST.tokenizer, text_bytes=9, append_eod=False, sources=()
        )


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        ({**MANIFEST.to_json(), "tokens": 8}, "digest"),
        ({**MANIFEST.to_json(), "digest": None}, "digest"),
        (signed(version=3), "format version 3, where only 1 to 2 are known"),
        (signed(format="other"), "format"),
        ([], "format"),
        (signed(extra=1), "exactly the fields"),
        (signed(tokenizer=None), "exactly the fields"),
        (signed(tokens="7"), "tokens: not of the right type"),
        (signed(tokens=7.0), "tokens: not of the right type"),
        (signed(tokens=True), "tokens: not of the right type"),
        (signed(append_eod=1), "append_eod: not of the right type"),
        (signed(sources="a"), "sources"),
        (signed(sources=[1]), "sources"),
        (signed(documents=-1), "negative"),
        (signed(name="a/b"), "name"),
        (signed(name=".."), "name"),
        (signed(dtype="float32"), "dtype"),
        (signed(bin_digest="A" * 64), "64 hexadecimal"),
        (signed(tokenizer={**MANIFEST.to_json()["tokenizer"], "eod": 100}), "outside the vocabulary"),
        (signed(blocks=None), "exactly the fields"),
        (signed(WITH_BLOCKS, version=1), "exactly the fields"),
        (signed(WITH_BLOCKS, version=True), "format version True"),
        (signed(WITH_BLOCKS, blocks=None), "two lists"),
        (signed(WITH_BLOCKS, tokens=64), "1 digests of groups for a .bin of 128 bytes, not 2"),
        (blocks_with(bin_groups=[]), "0 digests of groups for a .bin"),
        (blocks_with(idx_groups=["e" * 64]), "1 digests of groups for a .idx of 90 bytes, not 2"),
        (blocks_with(idx_groups=["e" * 64, 5]), "two lists"),
        (blocks_with(idx_groups=["e" * 64, "g" * 64]), "64 hexadecimal"),
        (blocks_with(block_bytes=0), "not usable"),
        (blocks_with(block_bytes=65), "not usable"),
        (blocks_with(block_bytes=1 << 40), "not usable"),
        (blocks_with(group_blocks=0), "not usable"),
        (blocks_with(group_blocks="1"), "not of the right type"),
        (blocks_with(more=1), "exactly the fields"),
    ],
)
def test_a_wrong_manifest_is_refused_with_its_name_and_the_mend(tmp_path, stored, words):
    (tmp_path / "set.json").write_text(json.dumps(stored))
    with pytest.raises(InputError, match=rf"set\.json: .*{words}.*; run tools/preprocess_data\.py again"):
        read_manifest(tmp_path / "set")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000, b'{"format": NaN}', b" " * (1 << 24) + b"{}"])
def test_what_is_not_a_manifest_is_refused(tmp_path, content):
    (tmp_path / "set.json").write_bytes(content)
    with pytest.raises(InputError, match=r"set\.json"):
        read_manifest(tmp_path / "set")


def test_a_missing_manifest_is_named(tmp_path):
    with pytest.raises(InputError, match=r"set\.json: no such manifest"):
        read_manifest(tmp_path / "set")
    (tmp_path / "set.json").mkdir()
    with pytest.raises(InputError, match=r"set\.json: cannot be read"):
        read_manifest(tmp_path / "set")


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), flipped=st.integers(1, 255))
def test_no_changed_byte_changes_what_is_read(tmp_path, place, flipped):
    content = bytearray(write_manifest(tmp_path / "set", WITH_BLOCKS).read_bytes())
    content[int(place * len(content))] ^= flipped
    (tmp_path / "set.json").write_bytes(content)
    with contextlib.suppress(InputError):
        assert read_manifest(tmp_path / "set") == WITH_BLOCKS  # white space for white space


@pytest.mark.parametrize("name", ["", "a b", "a/b", "..", "-a", "a\n", "é", "x" * 129])
def test_names_that_could_not_be_file_names_are_refused(name):
    with pytest.raises(InputError, match="--name"):
        check_increment_name(name)


def test_usual_names_are_accepted():
    for name in ("1", "2024-05", "v1.2_x", "x" * 128):
        check_increment_name(name)
