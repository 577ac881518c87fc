"""Whether increments still are the bytes that their manifests describe: what ``tools/verify_data.py`` does."""

import tempfile
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from megalrps.data.block_reading import LocalFile, RangeReader
from megalrps.data.increment import open_increment
from megalrps.data.indexed import IndexedDataset
from megalrps.data.manifest import IncrementManifest, read_manifest
from megalrps.data.remote import is_url, remote_file, remote_manifest
from megalrps.data.whole_check import Advance, BadFile, changed_files
from megalrps.errors import InputError


@dataclass(frozen=True)
class VerifiedIncrement:
    """What was found at a prefix; ``manifest`` is None where it cannot be read."""

    prefix: str
    manifest: IncrementManifest | None
    bad_files: tuple[BadFile, ...]


def manifest_at(prefix: Path | str) -> IncrementManifest:
    """The manifest of an increment, here or elsewhere; InputError where it cannot be read."""
    return remote_manifest(str(prefix)) if is_url(prefix) else read_manifest(prefix)


def bytes_to_read(prefix: Path | str) -> int:
    """How much :func:`verify_increment` has to read; 0 where the manifest does not say."""
    try:
        manifest = manifest_at(prefix)
    except InputError:
        return 0
    return manifest.bin_bytes + manifest.idx_bytes


def verify_increment(prefix: Path | str, advance: Advance = lambda size: None) -> VerifiedIncrement:
    """Read all files of the increment ``prefix`` (a path or URL) once and name every one that is bad; raises for none.

    All digests are compared; where they fit, structure and counts too, as on every opening. ``advance`` is told the
    bytes as they are read.
    """
    name = str(prefix)
    try:
        manifest = manifest_at(prefix)
    except InputError as error:
        return VerifiedIncrement(name, None, (BadFile(f"{name}.json", str(error)),))

    def open_file(suffix: str) -> AbstractContextManager[RangeReader]:
        return remote_file(name + suffix) if is_url(name) else LocalFile(Path(name + suffix))

    bad_files = tuple(changed_files(manifest, name, open_file, advance))
    if not bad_files:
        bad_files = _unopenable(name)
    return VerifiedIncrement(name, manifest, bad_files)


def _unopenable(prefix: str) -> tuple[BadFile, ...]:
    """The file that keeps ``prefix``, all of whose digests fit, from being opened, if any."""
    suffixes = (".idx", ".bin", ".json", ".blocks")
    with tempfile.TemporaryDirectory() as folder:
        try:
            opened = open_increment(prefix, cache=Path(folder))
            IndexedDataset(opened.dataset.prefix)  # every entry, of an index of any size
        except InputError as error:
            named = [prefix + suffix for suffix in suffixes if str(error).startswith(f"{prefix}{suffix}: ")]
            return (BadFile(named[0] if named else prefix, str(error)),)
    return ()
