"""Builds the one compiled extension, megalrps._native; all else about the package stands in pyproject.toml.

It needs pybind11 and a C++20 compiler, never torch or the network. Without them the install goes on, loudly: everything
the extension does has a twin in numpy or torch.
"""

import sys
from typing import Any

from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

SOURCES = ["csrc/module.cpp", "csrc/adamw.cpp", "csrc/permutation.cpp"]
HEADERS = ["csrc/adamw.h", "csrc/permutation.h"]
# -ffp-contract=off: csrc/adamw.cpp rounds after every operation, so that an element's bits do not depend on its place.
# The other two let loops with square roots become vectors; they change errno and floating-point traps, never a value.
FLAGS = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-pthread"]

WARNING = """
******************************************************************************
WARNING: megalrps is being installed WITHOUT its compiled extension
         (megalrps._native), because {reason}

What still works: everything. The sample order is computed by numpy instead:
the same numbers, bit for bit, but slower. AdamW on a CPU is computed by torch
instead: the same formula, other last bits, slower.
To mend it: install {mend},
then run: python setup.py build_ext --inplace
******************************************************************************
"""


class BuildExtension(build_ext):
    """Compiles what can be compiled, and says what it means when something cannot."""

    def run(self) -> None:
        try:
            super().run()
        except (BaseError, CCompilerError, OSError) as error:
            self._warn(error)

    def build_extension(self, ext: Any) -> None:
        try:
            super().build_extension(ext)
        except (BaseError, CCompilerError, OSError) as error:
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        reason = f"it did not compile:\n         {error}"
        sys.stderr.write(WARNING.format(reason=reason, mend="a C++20 compiler (g++ 11 or clang++ 14, or newer)"))


def extensions() -> list[Any]:
    """The extension, or none, with the warning, where pybind11 is not installed."""
    try:
        from pybind11.setup_helpers import Pybind11Extension
    except ImportError:
        sys.stderr.write(WARNING.format(reason="pybind11 is missing.", mend="pybind11 (pip install pybind11)"))
        return []
    # optional: a file that did not compile is not asked for again when an in-place build copies its results.
    return [
        Pybind11Extension(
            "megalrps._native",
            SOURCES,
            depends=HEADERS,
            cxx_std=20,
            extra_compile_args=FLAGS,
            extra_link_args=["-pthread"],
            optional=True,
        )
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtension})
