"""Blends: an increment made of several datasets, each with the weight of its samples.

A blend is a manifest alone, ``PREFIX.json``; its members stay the increments they are, wherever they lie.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from megalrps.data.apportionment import shares_of
from megalrps.data.increment import OpenIncrement, open_increment
from megalrps.data.indexed import bin_path, idx_path, manifest_path
from megalrps.data.manifest import (
    DIGEST,
    LARGEST_MANIFEST,
    IncrementManifest,
    TokenizerIdentity,
    check_increment_name,
    checked_body,
    typed_fields,
)
from megalrps.data.remote import is_url, remote_manifest
from megalrps.errors import InputError
from megalrps.exact import exact_share
from megalrps.files import write_json
from megalrps.fingerprint import fingerprint

FORMAT = "megalrps-blend"
VERSION = 1

_HEAD = 4096
_REMAKE = "run tools/blend_increments.py again"


@dataclass(frozen=True)
class BlendMember:
    """One dataset of a blend."""

    name: str
    """The increment's own name; its samples are counted under BLEND/NAME."""
    prefix: str
    """Of its files, relative to the folder of the blend's manifest; a URL stays as it is."""
    fingerprint: str
    """Of its content, as its manifest has it."""
    tokens: int
    weight: str
    """As it was given, e.g. ``0.7``, ``137.2`` or ``1/3``: exact."""


@dataclass(frozen=True)
class BlendManifest:
    """Everything known about a blend; what is said of an increment by the same names is true of it as a whole."""

    name: str
    tokenizer: TokenizerIdentity
    members: tuple[BlendMember, ...]

    @property
    def tokens(self) -> int:
        """Of all members."""
        return sum(member.tokens for member in self.members)

    @property
    def weights(self) -> tuple[Fraction, ...]:
        """Exact, by member."""
        return tuple(exact_share(member.weight) for member in self.members)

    @property
    def fingerprint(self) -> str:
        """Identity of what is drawn: the members' contents in their order, and their shares; no name, no place."""
        shares = zip(self.members, shares_of(self.weights), strict=True)
        parts = [[member.fingerprint, str(share)] for member, share in shares]
        return fingerprint({"blend": parts})

    def to_json(self) -> dict[str, Any]:
        """The manifest as the object stored in ``PREFIX.json``, its own digest included."""
        members = [asdict(member) for member in self.members]
        body = {"format": FORMAT, "version": VERSION, **asdict(self), "members": members}
        return {**body, "digest": fingerprint(body)}

    @classmethod
    def from_json(cls, value: Any) -> "BlendManifest":
        """The manifest of a stored object; ValueError says what is wrong with it."""
        body = checked_body(value, FORMAT, range(VERSION, VERSION + 1))
        if not isinstance(body.get("members"), list):
            raise ValueError("members is not a list")
        manifest = cls(
            name=_text(body.get("name")),
            tokenizer=TokenizerIdentity(**typed_fields(TokenizerIdentity, body.get("tokenizer"))),
            members=tuple(BlendMember(**typed_fields(BlendMember, each)) for each in body["members"]),
        )
        manifest.check()
        return manifest

    def check(self) -> None:
        """Raise ValueError (InputError for a name or weights that a user gave) for what no blend can be."""
        check_increment_name(self.name)
        if len(self.members) < 2:
            raise InputError("a blend needs two members or more")
        names = [member.name for member in self.members]
        for name in names:
            check_increment_name(name)
            if names.count(name) > 1:
                raise InputError(
                    f"two members are named {name}, under which their samples would be counted together: preprocess "
                    "one of them again with another --name"
                )
        contents = [member.fingerprint for member in self.members]
        if not all(DIGEST.fullmatch(content) for content in contents):
            raise ValueError("a fingerprint is not 64 hexadecimal digits")
        if len(set(contents)) != len(contents):
            raise InputError("two members have the same content: name each dataset once, with the sum of its weights")
        shares_of(self.weights)


@dataclass(frozen=True, eq=False)
class OpenBlend:
    """A blend whose members were found to be those it was made of; they are named BLEND/MEMBER from here on."""

    manifest: BlendManifest
    prefix: str
    members: tuple[OpenIncrement, ...]


OpenData = OpenIncrement | OpenBlend
"""What a prefix may stand for: an increment, or a blend of several."""


def open_data(prefix: Path | str, cache: Path | str | None = None) -> OpenData:
    """Open the increment or the blend at ``prefix``, each dataset as :func:`open_increment` does with ``cache``.

    Raises InputError, naming the file and the mend.
    """
    if not is_blend(prefix):
        return open_increment(prefix, cache=cache)
    manifest = _read(prefix)
    return OpenBlend(manifest, str(prefix), tuple(_member(prefix, manifest, each, cache) for each in manifest.members))


def is_blend(prefix: Path | str) -> bool:
    """Whether a blend's manifest lies at ``prefix``; what is no readable file is none."""
    try:
        with open(manifest_path(prefix), "rb") as file:
            return f'"{FORMAT}"'.encode() in file.read(_HEAD)
    except OSError:
        return False


def leaves(data: OpenData) -> tuple[OpenIncrement, ...]:
    """The datasets that samples are read from: a blend's members, or the increment alone."""
    return data.members if isinstance(data, OpenBlend) else (data,)


def dataset_prefixes(prefix: Path | str) -> tuple[str, ...]:
    """The datasets that ``prefix`` stands for: those of a blend's members, or itself."""
    if not is_blend(prefix):
        return (str(prefix),)
    return tuple(_place(prefix, member) for member in _read(prefix).members)


def prefix_of(data: OpenData) -> str:
    """Where ``data`` was opened."""
    return data.prefix if isinstance(data, OpenBlend) else str(data.dataset.prefix)


def blend(prefix: Path | str, name: str, data: Sequence[str], weights: Sequence[str]) -> BlendManifest:
    """Write the blend of the increments ``data`` at ``prefix``; the same blend is left as it is.

    Raises InputError where there is something else at ``prefix``, or for members and weights that cannot be blended.
    """
    if len(data) != len(weights):
        raise InputError(f"--weights holds {len(weights)} numbers for {len(data)} prefixes of --data: give one each")
    for text in weights:
        _check_weight(text)
    if not data:
        raise InputError("--data is empty: name the PREFIX of each increment to blend, two or more")
    if is_url(prefix):
        raise InputError(
            f"--output {prefix}: a blend lies on a local disk, whose members may lie elsewhere; give a path"
        )
    manifests = [_manifest_of(each) for each in data]
    for each, given in zip(manifests, data, strict=True):
        if each.tokenizer != manifests[0].tokenizer:
            raise InputError(
                f"--data: {data[0]} and {given} were made by different tokenizers; preprocess them with the same one"
            )
    members = tuple(
        BlendMember(each.name, _relative(given, prefix), each.fingerprint, each.tokens, text)
        for each, given, text in zip(manifests, data, weights, strict=True)
    )
    manifest = BlendManifest(name, manifests[0].tokenizer, members)
    manifest.check()
    _check_place(prefix, manifest)
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    write_json(manifest_path(prefix), manifest.to_json())
    return manifest


def _check_weight(text: str) -> None:
    try:
        weight = exact_share(text)
    except ValueError as error:
        raise InputError(f"--weights: {error}") from None
    if weight <= 0:
        raise InputError(f"--weights {text}: must be above 0; leave the dataset out instead")


def _manifest_of(prefix: str) -> IncrementManifest:
    if is_blend(prefix):
        raise InputError(f"--data {prefix} is a blend itself: name its members instead, with their weights")
    return remote_manifest(prefix) if is_url(prefix) else open_increment(prefix).manifest


def _relative(member: str, prefix: Path | str) -> str:
    if is_url(member):
        return member
    return Path(os.path.relpath(member, Path(prefix).parent)).as_posix()


def _check_place(prefix: Path | str, manifest: BlendManifest) -> None:
    """Raise InputError unless the place is free, or holds this very blend."""
    for path in (bin_path(prefix), idx_path(prefix)):
        if path.exists():
            raise InputError(f"--output: {path} exists, which is a dataset; give another --output")
    path = manifest_path(prefix)
    if path.exists() and not (is_blend(prefix) and _read(prefix) == manifest):
        raise InputError(f"--output: {path} exists and is something else: give another --output, or remove it first")


def _read(prefix: Path | str) -> BlendManifest:
    path = manifest_path(prefix)
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST_MANIFEST)
        return BlendManifest.from_json(json.loads(content))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the data path") from error
    except (ValueError, RecursionError) as error:  # ValueError covers bad JSON, bad UTF-8 and InputError
        raise InputError(f"{path}: not a valid blend ({error}); {_REMAKE}") from None


def _member(
    prefix: Path | str, manifest: BlendManifest, member: BlendMember, cache: Path | str | None
) -> OpenIncrement:
    path, place = manifest_path(prefix), _place(prefix, member)
    opened = open_increment(place, cache=cache)
    if opened.manifest.fingerprint != member.fingerprint or opened.manifest.tokenizer != manifest.tokenizer:
        raise InputError(
            f"{path}: member {place} has other content than the one that was blended; put that one back, or {_REMAKE} "
            "with another --output"
        )
    # The name does not enter the content's fingerprint, and so neither the order of the samples.
    return OpenIncrement(replace(opened.manifest, name=f"{manifest.name}/{member.name}"), opened.dataset)


def _place(prefix: Path | str, member: BlendMember) -> str:
    return member.prefix if is_url(member.prefix) else str(manifest_path(prefix).parent / member.prefix)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("name is not a text")
    return value
