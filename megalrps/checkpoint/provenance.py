"""What wrote a checkpoint: versions of the packages that decide its bits, and a digest of this package's own files."""

import hashlib
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import megalrps

_PACKAGES = ("numpy", "triton")
_SOURCES = (".py", ".so")


@cache
def versions() -> dict[str, str]:
    """The ``versions`` of a manifest, by package; ``megalrps sources`` is the SHA-256 of what is installed of it.

    The same version of an installation that was edited has another digest. An extension counts by its bytes.
    """
    found = {"megalrps": megalrps.__version__, "megalrps sources": _digest(Path(megalrps.__path__[0]))}
    found |= {"torch": torch.__version__, "python": platform.python_version()}
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _digest(package: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(path for path in package.rglob("*") if path.suffix in _SOURCES):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(package)} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()
