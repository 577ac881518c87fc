"""setup.py: an install without a compiler goes on and says so; torch is never imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


def build(tmp_path, **environment):
    """Build the extension into ``tmp_path``, where an import of a module that must not be imported would fail."""
    command = [
        sys.executable,
        "setup.py",
        "build_ext",
        "--build-lib",
        f"{tmp_path}/lib",
        "--build-temp",
        f"{tmp_path}/tmp",
    ]
    forbidden = tmp_path / "forbidden"
    forbidden.mkdir()
    (forbidden / "torch.py").write_text("raise SystemExit('setup.py imported torch')")
    return subprocess.run(
        command,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(forbidden), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("compiler", ["/bin/false", "/no/such/compiler"])
def test_without_a_compiler_the_install_goes_on_and_says_what_still_works(tmp_path, compiler):
    built = build(tmp_path, CC=compiler, CXX=compiler)
    assert built.returncode == 0, built.stderr
    assert "WARNING" in built.stderr
    assert "What still works: everything." in built.stderr
    assert "C++20 compiler" in built.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_without_pybind11_the_install_goes_on_and_says_what_to_install(tmp_path):
    hidden = tmp_path / "hidden" / "pybind11"
    hidden.mkdir(parents=True)
    (hidden / "__init__.py").write_text("raise ImportError('hidden')")
    built = build(tmp_path, PYTHONPATH=str(hidden.parent))
    assert built.returncode == 0, built.stderr
    assert "pip install pybind11" in built.stderr
    assert not list(tmp_path.rglob("*.so"))
