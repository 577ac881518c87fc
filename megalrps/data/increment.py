"""An increment, opened: the data that became available since the last version, and what is known about it."""

from dataclasses import dataclass
from pathlib import Path

from megalrps.data.indexed import REMAKE, IndexedDataset, bin_path, idx_path, manifest_path
from megalrps.data.manifest import IncrementManifest, read_manifest
from megalrps.errors import InputError
from megalrps.fingerprint import file_digest


@dataclass(frozen=True, eq=False)
class OpenIncrement:
    """A manifest and the dataset that was found to fit it."""

    manifest: IncrementManifest
    dataset: IndexedDataset


def open_increment(prefix: Path | str, verify: bool = False) -> OpenIncrement:
    """Open the increment at ``prefix`` and check that its manifest describes its files.

    Always checked: the structure of the index, the size of both files, all counts, the digest of the index. With
    ``verify`` the tokens are read once for their digest too, the only check that sees every changed token.
    Raises InputError, naming the file and the mend.
    """
    manifest = read_manifest(prefix)
    dataset = IndexedDataset(prefix)
    found = {
        "tokens": dataset.tokens.size,
        "documents": dataset.document_count,
        "sequences": len(dataset),
        "dtype": dataset.dtype.name,
    }
    for field, value in found.items():
        expected = getattr(manifest, field)
        if value != expected:
            raise InputError(
                f"{manifest_path(prefix)}: says {field} {expected}, but the dataset has {value}: "
                f"they do not belong together; {REMAKE}"
            )
    _check_digest(idx_path(prefix), manifest.idx_digest)
    if verify:
        _check_digest(bin_path(prefix), manifest.bin_digest)
    return OpenIncrement(manifest, dataset)


def _check_digest(path: Path, expected: str) -> None:
    if file_digest(path) != expected:
        raise InputError(f"{path}: changed since its manifest was written (SHA-256 differs); {REMAKE}")
