"""setup.py: an install without a compiler, or without nvcc, goes on and says so; torch is never imported.

What nvcc makes of the kernels is read without a GPU: registers that spill, the width of accesses, contracted products.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
TARGETS = ("sm_80", "sm_90a", "compute_80")
ADAMW_KERNELS, NORM_KERNELS = 12, 3  # two types for each moment, three for the narrow copy; two types and the last sum


def build(tmp_path, **environment):
    """Build the extension into ``tmp_path``, where an import of a module that must not be imported would fail.

    Without CUDA unless ``environment`` says otherwise.
    """
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
    forbidden.mkdir(exist_ok=True)
    (forbidden / "torch.py").write_text("raise SystemExit('setup.py imported torch')")
    return subprocess.run(
        command,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(forbidden), "MEGALRPS_CUDA": "0", **environment},
        capture_output=True,
        text=True,
        timeout=280,
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


# ---- The CUDA part ----


def fake_nvcc(tmp_path):
    """The folder of an nvcc whose toolkit is complete, and which compiles nothing."""
    folder = tmp_path / "toolkit" / "bin"
    folder.mkdir(parents=True)
    library = folder.parent / "lib64" / "libcudart_static.a"
    library.parent.mkdir()
    library.touch()
    script = '[ "$1" = --dryrun ] && { echo "#$ TOP=%s" >&2; exit 0; }; echo "no such architecture" >&2; exit 1'
    (folder / "nvcc").write_text(f"#!/bin/sh\n{script % folder.parent}\n")
    (folder / "nvcc").chmod(0o755)
    return folder


NOWHERE = {"PATH": "/no/such/folder", "CUDA_HOME": "", "CUDA_PATH": "", "CC": "/bin/false", "CXX": "/bin/false"}


def test_without_nvcc_one_line_says_that_the_cuda_part_is_left_out(tmp_path):
    built = build(tmp_path, **NOWHERE, MEGALRPS_CUDA="")
    assert built.returncode == 0, built.stderr
    assert "built without CUDA kernels: no nvcc" in built.stderr
    assert "WITHOUT its CUDA kernels" not in built.stderr


def test_cuda_that_is_asked_for_and_has_no_nvcc_is_an_error_that_names_it(tmp_path):
    built = build(tmp_path, **NOWHERE, MEGALRPS_CUDA="1")
    assert built.returncode != 0
    assert "MEGALRPS_CUDA=1, but no nvcc was found" in built.stderr


def test_an_nvcc_that_fails_is_a_warning_and_an_error_where_cuda_was_asked_for(tmp_path):
    nvcc = {**NOWHERE, "CUDA_HOME": str(fake_nvcc(tmp_path).parent), "PATH": os.environ["PATH"]}
    built = build(tmp_path, **nvcc, MEGALRPS_CUDA="")
    assert built.returncode == 0, built.stderr
    assert "WITHOUT its CUDA kernels" in built.stderr
    assert "no such architecture" in built.stderr
    assert "C++20 compiler" in built.stderr, "the C++ part must be tried all the same"
    built = build(tmp_path, **nvcc, MEGALRPS_CUDA="1")
    assert built.returncode != 0
    assert "MEGALRPS_CUDA=1, but nvcc could not compile" in built.stderr


@pytest.mark.parametrize(
    ("name", "value"), [("MEGALRPS_CUDA", "yes"), ("MEGALRPS_CUDA_TARGETS", "sm_90"), ("MEGALRPS_CUDA_TARGETS", ";")]
)
def test_what_the_environment_cannot_mean_is_an_error(tmp_path, name, value):
    nvcc = {"CUDA_HOME": str(fake_nvcc(tmp_path).parent), "MEGALRPS_CUDA": "", "CXX": "/bin/false"}
    built = build(tmp_path, **{**nvcc, name: value})
    assert built.returncode != 0
    assert name in built.stderr


@pytest.fixture(scope="module")
def with_cuda(tmp_path_factory):
    """The folder of a build with the CUDA part, the only one there is: it takes half a minute.

    What is not nvcc's is compiled without optimization, at half the cost: nothing here depends on it.
    """
    if shutil.which("nvcc") is None:
        pytest.skip("there is no nvcc: the CUDA part is not built")
    folder = tmp_path_factory.mktemp("cuda")
    compiler = folder / "compiler"
    found = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
    compiler.write_text(f'#!/bin/sh\nexec {found} "$@" -O0\n')
    compiler.chmod(0o755)
    built = build(folder, MEGALRPS_CUDA="1", MEGALRPS_CUDA_TARGETS="80;90a", CXX=str(compiler))
    assert built.returncode == 0, built.stderr
    return folder


def test_the_module_with_cuda_needs_neither_torch_nor_a_driver_nor_a_library_of_cuda(with_cuda):
    (module,) = with_cuda.rglob("_native*.so")
    # Imported as itself, with no package around it and no torch to be found.
    code = (
        "import importlib.machinery, importlib.util, sys; "
        f"loader = importlib.machinery.ExtensionFileLoader('megalrps._native', {str(module)!r}); "
        "module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader)); "
        "loader.exec_module(module); assert 'torch' not in sys.modules; "
        "available, why = module.cuda_available(); assert available == (why == ''); "
        "print(*module.cuda_targets())"
    )
    environment = {**os.environ, "PYTHONPATH": str(with_cuda / "forbidden")}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert tuple(said.stdout.split()) == TARGETS
    needed = subprocess.run(["ldd", module], capture_output=True, text=True, check=True).stdout
    assert "libc.so" in needed
    assert not re.search("cuda|torch", needed), needed


def test_no_kernel_spills(with_cuda):
    for name, kernels in (("adamw", ADAMW_KERNELS), ("norm", NORM_KERNELS)):
        report = (with_cuda / "tmp" / "csrc" / f"{name}.cu.txt").read_text()
        compiled = re.findall(r"Compiling entry function '\S+' for '(sm_\w+)'", report)
        assert sorted(compiled) == sorted(["sm_80", "sm_90a"] * kernels)
        frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
        assert frames == [("0", "0", "0")] * len(compiled)
        assert max(map(int, re.findall(r"Used (\d+) registers", report))) <= 64, "four blocks of 256 threads at least"


def test_a_second_build_does_nothing_and_another_choice_builds_anew(with_cuda):
    again = build(with_cuda, MEGALRPS_CUDA="1", MEGALRPS_CUDA_TARGETS="80;90a")
    assert again.returncode == 0, again.stderr
    assert "-c csrc/" not in again.stdout
    without = build(with_cuda, MEGALRPS_CUDA="0", CC="/bin/false", CXX="/bin/false")
    assert "it did not compile" in without.stderr, "the binary with CUDA must not pass for one without"


def tool(name):
    """A tool of CUDA's, of the toolkit or of Triton's wheel."""
    found = shutil.which(name)
    if found is None and (triton := importlib.util.find_spec("triton")) is not None:
        found = shutil.which(name, path=f"{Path(triton.origin).parent}/backends/nvidia/bin")
    if found is None:
        pytest.skip(f"there is no {name}, neither of CUDA's toolkit nor of Triton's wheel")
    return found


def disassembled(with_cuda, name, *options):
    command = tool("cuobjdump")
    path = f"{Path(command).parent}:{Path(tool('nvdisasm')).parent}:{os.environ['PATH']}"
    target = with_cuda / "tmp" / "csrc" / f"{name}.cu.o"
    return subprocess.run(
        [command, *options, target], env={**os.environ, "PATH": path}, capture_output=True, text=True, check=True
    ).stdout


def test_memory_is_read_and_written_128_bits_at_a_time(with_cuda):
    for name, kernels in (("adamw", ADAMW_KERNELS), ("norm", NORM_KERNELS)):
        _, *functions = disassembled(with_cuda, name, "-sass", "-arch", "sm_90a").split("Function : ")
        assert len(functions) == kernels
        for function in functions:
            title = function.partition("\n")[0]
            if "sum_partials" not in title:  # a few thousand numbers
                assert re.search(r"LDG\.E(\.\w+)*\.128", function), title
            if name == "adamw":
                assert re.search(r"STG\.E(\.\w+)*\.128", function), title
            assert not re.search(r"\b(LDL|STL)\b", function), title


def test_every_operation_is_rounded_once_as_on_a_processor(with_cuda):
    """The bits of csrc/adamw.cpp and csrc/norm.cpp: no fused multiply-add, no approximation, no flush to zero."""
    expected = {"adamw": {"add", "sub", "mul", "div", "sqrt"}, "norm": {"add", "mul"}}
    for name, operations in expected.items():
        lines = disassembled(with_cuda, name, "-ptx").splitlines()
        arithmetic = [
            line.split()[0] for line in lines if re.match(r"\s*(fma|mad|add|sub|mul|div|sqrt)\S*\.f\d+\s", line)
        ]
        assert {each.partition(".")[0] for each in arithmetic} == operations
        assert {each.split(".", 1)[1] for each in arithmetic} <= {"rn.f32", "rn.f64"}
