"""Builds the one compiled extension, megalrps._native; all else about the package stands in pyproject.toml.

It needs pybind11 and a C++20 compiler, never torch or the network. Without them the install goes on, loudly:
everything the extension does has a twin in numpy, torch or Triton. Where CUDA's nvcc is found, the kernels of
csrc/*.cu become part of it. The environment decides:

- ``MEGALRPS_CUDA``: 0 leaves them out; 1 makes it an error if they, or the extension, cannot be built; unset, they are
  built where nvcc is (under ``CUDA_HOME`` or ``CUDA_PATH``, else on ``PATH``), and left out, loudly, where it fails.
- ``MEGALRPS_CUDA_TARGETS``: what they are compiled for, ``80;90a`` unless set: compute capabilities without the point.
  The lowest without a letter is kept as PTX too, which drivers compile for devices newer than all of them.
"""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

PARTS = (
    "module",
    "adamw",
    "norm",
    "permutation",
    "windows",
    "packing",
    "windows_binding",
    "word_memory",
    "word_pieces",
    "word_pieces_binding",
    "cuda_absent",
)
SOURCES = [f"csrc/{name}.cpp" for name in PARTS]
CUDA_SOURCES = [f"csrc/{name}.cu" for name in ("adamw", "norm", "device")]
HEADERS = sorted(str(path) for pattern in ("*.h", "*.cuh") for path in Path("csrc").glob(pattern))
# -ffp-contract=off: csrc/adamw_element.h rounds after every operation, so that an element's bits do not depend on its
# place. The other two let loops with square roots become vectors; they change errno and traps, never a value.
FLAGS = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-pthread"]
# -fmad=false: the same bits as on a processor. --expt-relaxed-constexpr: std::bit_cast on the device.
CUDA_FLAGS = ["-O3", "-std=c++20", "-fmad=false", "--expt-relaxed-constexpr", "-Xptxas", "-v"]
CUDA_FLAGS += ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
CUDA_TARGETS = "80;90a"
COMPILES_AT_A_TIME = 2

WARNING = """
******************************************************************************
WARNING: megalrps is being installed WITHOUT its compiled extension
         (megalrps._native), because {reason}

What still works: everything. Samples are ordered and gathered by numpy instead:
the same numbers, bit for bit, but slower. SentencePiece models are tokenized by
their own library: the same ids, but slower. AdamW on a CPU is computed by torch
instead: the same formula, other last bits, slower.
To mend it: install {mend},
then run: python setup.py build_ext --inplace
******************************************************************************
"""

CUDA_WARNING = """
******************************************************************************
WARNING: megalrps._native is being built WITHOUT its CUDA kernels, because
         {reason}

What still works: everything. On a GPU, Triton or torch computes instead.
MEGALRPS_CUDA=0 leaves them out without this warning, MEGALRPS_CUDA=1 makes it
an error.
******************************************************************************
"""


class CudaError(Exception):
    """Why the CUDA kernels cannot be built."""


class BuildExtension(build_ext):
    """Compiles what can be compiled, and says what it means when something cannot."""

    def run(self) -> None:
        try:
            super().run()
        except (BaseError, CCompilerError, OSError) as error:
            self._warn(error)

    def build_extension(self, ext: Any) -> None:
        kind = self._add_cuda(ext)
        # What was built before is out of date as well where another choice is made about CUDA.
        made = Path(self.build_temp, "cuda.txt")
        if not made.exists() or made.read_text() != kind:
            self.force = True
        made.unlink(missing_ok=True)
        try:
            super().build_extension(ext)
        except (BaseError, CCompilerError, OSError) as error:
            self._warn(error)
        else:
            made.parent.mkdir(parents=True, exist_ok=True)
            made.write_text(kind)

    def _add_cuda(self, ext: Any) -> str:
        """Compile the kernels and have them linked, or say why not; what was decided, in words that can be compared."""
        wish = cuda_wish()
        if wish == "0":
            sys.stderr.write("megalrps: built without CUDA kernels: MEGALRPS_CUDA=0\n")
            return "none"
        try:
            nvcc = find_nvcc()
            if nvcc is None and wish != "1":
                sys.stderr.write("megalrps: built without CUDA kernels: no nvcc under CUDA_HOME or on PATH\n")
                return "none"
            if nvcc is None:
                raise CudaError("no nvcc was found under CUDA_HOME or on PATH")
            runtime = find_runtime(nvcc)
            targets, options = cuda_targets()
            macro = ("MEGALRPS_CUDA_TARGETS", f'"{targets}"')
            command = [nvcc, *CUDA_FLAGS, *options, "-D" + "=".join(macro)]
            ext.extra_objects += compile_cuda(command, Path(self.build_temp))
        except CudaError as error:
            if wish == "1":
                raise SystemExit(f"MEGALRPS_CUDA=1, but {error}") from error
            sys.stderr.write(CUDA_WARNING.format(reason=error))
            return "none"
        ext.depends = [*ext.depends, *ext.extra_objects]
        ext.define_macros.append(macro)
        # The runtime is part of the binary, found by nobody else: no other library's version can get in its way.
        ext.extra_link_args += [str(runtime), "-ldl", "-lrt", "-lpthread", "-Wl,--exclude-libs,ALL"]
        return f"{targets} {runtime}"

    def _warn(self, error: Exception) -> None:
        if cuda_wish() == "1":
            raise SystemExit(f"MEGALRPS_CUDA=1, but megalrps._native did not compile: {error}") from error
        reason = f"it did not compile:\n         {error}"
        sys.stderr.write(WARNING.format(reason=reason, mend="a C++20 compiler (g++ 11 or clang++ 14, or newer)"))


def cuda_wish() -> str:
    wish = os.environ.get("MEGALRPS_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"MEGALRPS_CUDA is 0, 1 or unset, not {wish!r}")
    return wish


def find_nvcc() -> str | None:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            found = shutil.which("nvcc", path=str(Path(os.environ[variable], "bin")))
            if found:
                return found
    return shutil.which("nvcc")


def find_runtime(nvcc: str) -> Path:
    """CUDA's runtime library. ``nvcc`` may be a script that lies elsewhere, so it is asked for its toolkit."""
    # nvcc says what it would do with a source, which it does not read.
    dry_run = run([nvcc, "--dryrun", "-c", "none.cu"])
    root = re.search(r"^#\$ TOP=(.+)$", dry_run.stderr, re.MULTILINE)
    if root is None:
        raise CudaError(f"{nvcc} --dryrun does not name its toolkit:\n{dry_run.stderr}")
    for folder in ("lib64", "lib", "targets/x86_64-linux/lib"):
        library = Path(root[1].strip(), folder, "libcudart_static.a").resolve()
        if library.exists():
            return library
    raise CudaError(f"the toolkit of {nvcc}, {root[1]}, has no libcudart_static.a")


def cuda_targets() -> tuple[str, list[str]]:
    """What the binary will hold, for people, and nvcc's options for it."""
    wanted = [target for target in os.environ.get("MEGALRPS_CUDA_TARGETS", CUDA_TARGETS).split(";") if target]
    if not wanted or not all(re.fullmatch(r"\d{2,3}[af]?", target) for target in wanted):
        raise SystemExit(f"MEGALRPS_CUDA_TARGETS is a list such as {CUDA_TARGETS!r}")
    names = [f"sm_{target}" for target in wanted]
    options = [f"-gencode=arch=compute_{target},code=sm_{target}" for target in wanted]
    portable = [int(target) for target in wanted if target.isdigit()]
    if portable:
        names.append(f"compute_{min(portable)}")
        options.append(f"-gencode=arch={names[-1]},code={names[-1]}")
    return " ".join(names), options


def compile_cuda(command: list[str], folder: Path) -> list[str]:
    """Objects of the CUDA sources in ``folder``; beside each what ptxas says of its kernels and the command."""

    def compiled(source: str) -> str:
        target = folder / f"{source}.o"  # not adamw.o, which is that of adamw.cpp
        report = folder / f"{source}.txt"
        words = [*command, "-c", source, "-o", str(target)]
        newest = max(Path(file).stat().st_mtime for file in (source, *HEADERS))
        if not (target.exists() and report.exists() and target.stat().st_mtime > newest) or (
            report.read_text().partition("\n")[0] != " ".join(words)
        ):
            target.parent.mkdir(parents=True, exist_ok=True)
            sys.stdout.write(f"{' '.join(words)}\n")  # whole: the other thread writes too
            done = run(words)
            if done.returncode != 0:
                target.unlink(missing_ok=True)
                raise CudaError(f"nvcc could not compile {source}:\n{done.stdout}{done.stderr}")
            report.write_text(f"{' '.join(words)}\n{done.stdout}{done.stderr}")
        return str(target)

    with ThreadPoolExecutor(COMPILES_AT_A_TIME) as pool:
        return list(pool.map(compiled, CUDA_SOURCES))


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise CudaError(f"{command[0]} cannot be run: {error}") from error


def extensions() -> list[Any]:
    """The extension, or none, with the warning, where pybind11 is not installed."""
    try:
        from pybind11.setup_helpers import Pybind11Extension
    except ImportError:
        if cuda_wish() == "1":
            raise SystemExit("MEGALRPS_CUDA=1, but pybind11 is missing (pip install pybind11)") from None
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
