"""The manifest of a blend: what it names, what it refuses, that it is the same blend wherever it lies."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalrps.data.blend import (
    BlendManifest,
    BlendMember,
    OpenBlend,
    blend,
    dataset_prefixes,
    is_blend,
    leaves,
    open_data,
    prefix_of,
)
from megalrps.data.increment import OpenIncrement
from megalrps.data.indexed import IndexedDatasetWriter
from megalrps.data.manifest import TokenizerIdentity, describe_dataset, write_manifest
from megalrps.errors import InputError
from megalrps.fingerprint import fingerprint

TOKENIZER = TokenizerIdentity("SentencePieceTokenizer", 50_000, 2, "0" * 64)


def write(prefix: Path, name: str, first: int, tokenizer: TokenizerIdentity = TOKENIZER) -> str:
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with IndexedDatasetWriter(prefix, np.uint16, overwrite=True) as writer:
        writer.add_document(np.arange(first, first + 21))
    manifest = describe_dataset(
        prefix, name=name, tokenizer=tokenizer, text_bytes=80, append_eod=False, sources=("a.jsonl",)
    )
    write_manifest(prefix, manifest)
    return str(prefix)


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    """Increments web and code in a folder data."""
    return [write(tmp_path / "data" / name, name, 100 * at) for at, name in enumerate(("web", "code"))]


def stored(prefix: Path) -> dict[str, Any]:
    return json.loads(Path(f"{prefix}.json").read_text())


def test_a_blend_opens_as_its_members_under_its_name(data: list[str], tmp_path: Path):
    blend(tmp_path / "mixed", "2024", data, ["0.7", "3/10"])
    opened = open_data(tmp_path / "mixed")
    assert (
        isinstance(opened, OpenBlend) and is_blend(tmp_path / "mixed") and prefix_of(opened) == str(tmp_path / "mixed")
    )
    assert [each.manifest.name for each in leaves(opened)] == ["2024/web", "2024/code"]
    assert [each.dataset.read(0, 2).tolist() for each in leaves(opened)] == [[0, 1], [100, 101]]
    assert dataset_prefixes(tmp_path / "mixed") == tuple(data)
    assert [str(weight) for weight in opened.manifest.weights] == ["7/10", "3/10"]
    assert (opened.manifest.name, opened.manifest.tokens, opened.manifest.tokenizer) == ("2024", 42, TOKENIZER)
    assert stored(tmp_path / "mixed")["members"][0] == {
        "name": "web",
        "prefix": "data/web",
        "fingerprint": open_data(data[0]).manifest.fingerprint,
        "tokens": 21,
        "weight": "0.7",
    }


def test_an_increment_is_opened_as_ever(data: list[str]):
    opened = open_data(data[0])
    assert dataset_prefixes(data[0]) == (data[0],)
    assert isinstance(opened, OpenIncrement) and leaves(opened) == (opened,) and prefix_of(opened) == data[0]
    assert not is_blend(data[0]) and not is_blend(f"{data[0]}-none")
    with pytest.raises(InputError, match=r"none\.json: no such manifest"):
        open_data(f"{data[0]}-none")


def test_the_fingerprint_is_of_contents_and_shares_alone(data: list[str], tmp_path: Path):
    first = blend(tmp_path / "one", "one", data, ["0.7", "0.3"]).fingerprint
    copies = [write(tmp_path / "elsewhere" / name, f"{name}-copy", 100 * at) for at, name in enumerate("wc")]
    assert blend(tmp_path / "far" / "two", "two", copies, ["14", "6.00"]).fingerprint == first
    others = [
        (data, ["0.7", "0.31"]),
        (data[::-1], ["0.7", "0.3"]),
        ([data[0], write(tmp_path / "x", "x", 7)], ["7", "3"]),
    ]
    prints = {blend(tmp_path / f"other{at}", "one", *each).fingerprint for at, each in enumerate(others)}
    assert len(prints | {first}) == 4


def test_fingerprints_are_for_ever():
    members = tuple(BlendMember(name, "", 64 * name, 1, weight) for name, weight in (("a", "0.7"), ("b", "0.3")))
    fingerprint_of_blend = BlendManifest("x", TOKENIZER, members).fingerprint
    assert fingerprint_of_blend == "93e6741fcc6ad89b84ae41e17669ce55da20bde2734a53e751eb68f7397f5654"


def test_a_blend_moves_with_its_members_and_is_left_when_made_again(data: list[str], tmp_path: Path):
    made = blend(tmp_path / "data" / "mixed", "mixed", data, ["1", "2"])
    before = Path(f"{tmp_path}/data/mixed.json").stat().st_mtime_ns, stored(tmp_path / "data" / "mixed")
    assert blend(tmp_path / "data" / "mixed", "mixed", data, ["1", "2"]) == made
    assert before[1] == stored(tmp_path / "data" / "mixed")
    shutil.move(tmp_path / "data", tmp_path / "moved")
    assert [str(each.dataset.prefix) for each in leaves(open_data(tmp_path / "moved" / "mixed"))] == [
        str(tmp_path / "moved" / name) for name in ("web", "code")
    ]


def test_nothing_that_is_there_is_overwritten(data: list[str], tmp_path: Path):
    blend(tmp_path / "mixed", "mixed", data, ["1", "2"])
    before = stored(tmp_path / "mixed")
    for output, name, weights in (
        ("mixed", "mixed", ["1", "3"]),
        ("mixed", "x", ["1", "2"]),
        ("data/web", "m", ["1", "2"]),
    ):
        with pytest.raises(InputError, match=rf"--output: .*{output}\.\w+ exists"):
            blend(tmp_path / output, name, data, weights)
    assert stored(tmp_path / "mixed") == before and not is_blend(data[0])


@pytest.mark.parametrize(
    ("weights", "complaint"),
    [
        (["1"], "--weights holds 1 numbers for 2 prefixes of --data"),
        (["1", "0"], "--weights 0: must be above 0"),
        (["1", "-2"], "--weights: '-2' is not a number"),
        (["0.7", "0.3.1"], "--weights: '0.3.1' is not a number"),
        (["0.1234567", "1"], "round them to whole numbers"),
    ],
)
def test_weights_that_cannot_be(data: list[str], tmp_path: Path, weights: list[str], complaint: str):
    with pytest.raises(InputError, match=complaint):
        blend(tmp_path / "mixed", "mixed", data, weights)
    assert not Path(f"{tmp_path}/mixed.json").exists()


def test_members_that_cannot_be_blended(data: list[str], tmp_path: Path):
    blend(tmp_path / "inner", "inner", data, ["1", "1"])
    other = TokenizerIdentity("SentencePieceTokenizer", 50_000, 2, "1" * 64)
    cases = {
        "made by different tokenizers": [data[0], write(tmp_path / "other", "other", 0, other)],
        "two members are named web": [data[0], write(tmp_path / "second", "web", 7)],
        "two members have the same content": [data[0], write(tmp_path / "copy", "copy", 0)],
        "needs two members": data[:1],
        "is a blend itself: name its members": [data[0], str(tmp_path / "inner")],
        "no such manifest": [data[0], str(tmp_path / "none")],
        "--data is empty": [],
    }
    for complaint, members in cases.items():
        with pytest.raises(InputError, match=complaint):
            blend(tmp_path / "mixed", "mixed", members, ["1"] * len(members))
    with pytest.raises(InputError, match="--output s3://bucket/mixed: a blend lies on a local disk"):
        blend("s3://bucket/mixed", "mixed", data, ["1", "1"])
    with pytest.raises(InputError, match="--name 'a/b'"):
        blend(tmp_path / "mixed", "a/b", data, ["1", "1"])


def test_a_member_that_changed_is_noticed(data: list[str], tmp_path: Path):
    blend(tmp_path / "mixed", "mixed", data, ["1", "2"])
    write(Path(data[1]), "code", 500)
    with pytest.raises(InputError, match=r"mixed\.json: member .*code has other content than the one that was blended"):
        open_data(tmp_path / "mixed")


DAMAGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "later version": lambda body: body.update(version=2),
    "weight": lambda body: body["members"][0].update(weight="0"),
    "weight that is a number": lambda body: body["members"][0].update(weight=0.7),
    "member's field": lambda body: body["members"][0].pop("tokens"),
    "members": lambda body: body.update(members={}),
    "one member": lambda body: body["members"].pop(),
    "a name": lambda body: body["members"][0].update(name="a/b"),
    "a fingerprint": lambda body: body["members"][0].update(fingerprint="0"),
    "tokenizer": lambda body: body.update(tokenizer=None),
    "its name": lambda body: body.update(name=None),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("forged", [False, True])
def test_a_damaged_manifest_is_refused(data: list[str], tmp_path: Path, damage: str, forged: bool):
    blend(tmp_path / "mixed", "mixed", data, ["1", "2"])
    body = stored(tmp_path / "mixed")
    del body["digest"]
    whole = fingerprint(body)
    DAMAGES[damage](body)
    digest = fingerprint(body) if forged else whole
    Path(f"{tmp_path}/mixed.json").write_text(json.dumps({**body, "digest": digest}))
    with pytest.raises(InputError, match=r"mixed\.json: not a valid blend \(.*blend_increments\.py again"):
        open_data(tmp_path / "mixed")
