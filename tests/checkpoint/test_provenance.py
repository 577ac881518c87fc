"""A manifest says what wrote the checkpoint, down to the bytes of the installation."""

from importlib.metadata import version
from pathlib import Path

import torch

from megalrps.checkpoint.provenance import _digest, versions
from megalrps.checkpoint.store import Store


def test_a_manifest_names_the_packages_that_decide_its_bits(tmp_path: Path):
    store = Store(tmp_path / "checkpoints")
    store.prepare()
    store.save("a", {"x": torch.ones(1)}, {})
    assert store.manifest("a").versions == versions()
    assert versions()["torch"] == torch.__version__ and versions()["numpy"] == version("numpy")


def test_an_edited_installation_is_another_one_whatever_its_version(tmp_path: Path):
    seen = set()
    for name, content in {"a.py": "x = 1", "b.py": "x = 1", "a.so": "x", "notes.txt": "x"}.items():
        (tmp_path / name).write_text(content)
        seen.add(_digest(tmp_path))
    (tmp_path / "a.py").write_text("x = 2")
    seen.add(_digest(tmp_path))
    assert len(seen) == 4, "only what is not installed code leaves the digest as it was"
