"""Whether increments still are the bytes that their manifests describe: what ``tools/verify_data.py`` does."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megalrps.data.increment import open_increment
from megalrps.data.indexed import REMAKE, bin_path, idx_path, manifest_path
from megalrps.data.manifest import IncrementManifest, read_manifest
from megalrps.errors import InputError
from megalrps.fingerprint import file_digest


@dataclass(frozen=True)
class BadFile:
    """A file that is missing, damaged, or not the one that the manifest describes."""

    path: Path
    complaint: str
    """One line that names the file and the mend."""


@dataclass(frozen=True)
class VerifiedIncrement:
    """What was found at a prefix; ``manifest`` is None where it cannot be read."""

    prefix: str
    manifest: IncrementManifest | None
    bad_files: tuple[BadFile, ...]


def verify_increment(prefix: Path | str) -> VerifiedIncrement:
    """Read all files of the increment ``prefix`` once and name every one that is bad; raises for none of them.

    Both digests are compared; where they fit, structure and counts too, as on every opening.
    """
    try:
        manifest = read_manifest(prefix)
    except InputError as error:
        return VerifiedIncrement(str(prefix), None, (BadFile(manifest_path(prefix), str(error)),))
    bad_files = tuple(_changed_files(prefix, manifest))
    if not bad_files:
        try:
            open_increment(prefix)
        except InputError as error:
            bad_files = (_named_by(error, prefix),)
    return VerifiedIncrement(str(prefix), manifest, bad_files)


def _changed_files(prefix: Path | str, manifest: IncrementManifest) -> Iterator[BadFile]:
    for path, expected in ((idx_path(prefix), manifest.idx_digest), (bin_path(prefix), manifest.bin_digest)):
        try:
            found = file_digest(path)
        except OSError as error:
            yield BadFile(path, f"{path}: cannot be read ({error.strerror}); check the data path, or {REMAKE}")
            continue
        if found != expected:
            yield BadFile(path, f"{path}: changed since its manifest was written (SHA-256 differs); {REMAKE}")


def _named_by(error: InputError, prefix: Path | str) -> BadFile:
    """The file that an error of opening ``prefix`` begins with."""
    paths = (idx_path(prefix), bin_path(prefix), manifest_path(prefix))
    return BadFile(next(path for path in paths if str(error).startswith(f"{path}: ")), str(error))
