"""python -m megalrps.kernels: the table, the check of every kernel, and both where Triton or a fault is missing."""

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import compiled_share
import pytest
import torch
from compiled_share import share
from oracle import needs_triton
from triton_interpreter import ON_CPU

import megalrps.kernels
from megalrps.errors import InputError
from megalrps.kernels import __main__ as command
from megalrps.kernels.__main__ import Arguments, run
from megalrps.kernels.ahead_of_time import Verdict
from megalrps.kernels.check_cases import must_be_flagged
from megalrps.kernels.compile_case import TARGETS
from megalrps.kernels.table import COMPILED_MODULES, OPERATIONS, description, has_cuda_code, jobs

ROOM = Path(megalrps.kernels.__file__).parent
CASES = re.compile(r"^def compile_cases\(", re.MULTILINE)
REGISTERED = re.compile(r'^@torch\.library\.custom_op\(\s*"megalrps::(\w+)"', re.MULTILINE)


def launched(*arguments: str, seconds: int = 120) -> subprocess.CompletedProcess[str]:
    """The command in a process where kernels are compiled, not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        encoding="utf-8",
        env={**environment, "OMP_NUM_THREADS": "1"},
        timeout=seconds,
        check=False,
    )


def test_the_table_says_what_computes_each_operation_and_why():
    found = description()
    assert [each["name"] for each in found["operations"]] == [operation.name for operation in OPERATIONS]
    for each in found["operations"]:
        assert each["implementation"] and each["why"], f"{each['name']} is not explained"
        assert not (ON_CPU and each["implementation"] == "triton"), f"{each['name']}: a kernel of a GPU on a CPU"
    assert found["versions"]["torch"] == torch.__version__
    assert found["device"] == ("cpu" if ON_CPU else "cuda")


def test_the_table_is_printed_as_text_and_as_json(capsys):
    assert run(Arguments()) == 0
    text = capsys.readouterr().out
    assert all(operation.name in text and operation.computes in text for operation in OPERATIONS)
    assert max(map(len, text.splitlines())) <= 160
    assert run(Arguments(json=True)) == 0
    assert json.loads(capsys.readouterr().out) == description()


def test_nothing_is_missing_from_the_table_or_the_check():
    sources = {path.stem: path.read_text(encoding="utf-8") for path in ROOM.glob("*.py")}
    assert sorted(COMPILED_MODULES) == sorted(name for name, text in sources.items() if CASES.search(text))
    registered = {name for text in sources.values() for name in REGISTERED.findall(text)}
    assert {"swiglu", "swiglu_backward", "rms_norm"} <= registered
    names = tuple(operation.name for operation in OPERATIONS)
    assert [name for name in registered if not name.startswith(names)] == []


@needs_triton
def test_every_case_has_a_name_of_its_own():
    names = [f"{job.operation}: {job.case.name} at {job.target}" for job in jobs(TARGETS)]
    assert len(names) == len(set(names)) > 0
    assert {job.operation for job in jobs(TARGETS)} == set(COMPILED_MODULES)
    assert {job.operation for job in jobs(("sm_90",), "swiglu ")} == {"swiglu"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (Arguments(check=("sm_70",)), "--check sm_70 is no target: choose from sm_80, sm_90"),
        (Arguments(check=(), filter="nothing has this"), "--filter nothing has this is in no case's name"),
        (Arguments(filter="swiglu"), "--filter chooses cases of --check"),
        (Arguments(jobs=0), "--jobs 0"),
    ],
)
@needs_triton
def test_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        run(arguments)


@pytest.mark.skipif(not ON_CPU, reason="kernels are interpreted on a CPU alone")
@needs_triton
def test_the_check_of_interpreted_kernels_is_refused():
    with pytest.raises(InputError, match="TRITON_INTERPRET"):
        run(Arguments(check=("sm_90",), filter="swiglu"))


@pytest.mark.parametrize("missed", range(3))
def test_a_self_test_that_misses_a_fault_fails(missed, monkeypatch, capsys):
    faults = {case.name: (fault,) for case, fault in must_be_flagged()}
    name = must_be_flagged()[missed].case.name

    def verdicts(jobs, workers, cache):
        for job in jobs:
            yield Verdict(
                job.operation, job.case.name, job.target, () if job.case.name == name else faults[job.case.name]
            )

    monkeypatch.setattr(command, "verdicts", verdicts)
    assert run(Arguments(self_test=True)) == 1
    assert capsys.readouterr().out.count(f"self-test: {name} at") == len(TARGETS)
    name = ""
    assert run(Arguments(self_test=True)) == 0
    # A fault too many is no better: then the check would find it in sound kernels too.
    monkeypatch.setitem(faults, "spilling", (*faults["spilling"], "lacks HMMA"))
    assert run(Arguments(self_test=True)) == 1


def test_native_code_is_that_of_its_target():
    assert has_cuda_code("sm_80", ["sm_80", "sm_90a"]) and has_cuda_code("sm_90", ["sm_80", "sm_90a"])
    assert not has_cuda_code("sm_90", ["sm_80", "compute_80"]) and not has_cuda_code("sm_80", [])


WITHOUT_TRITON = """
import importlib, pkgutil, sys

class Refusal:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refusal())
import megalrps
for module in pkgutil.walk_packages(megalrps.__path__, "megalrps."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)

import torch
from megalrps.kernels.__main__ import Arguments, run
from megalrps.kernels.swiglu import swiglu, swiglu_triton
from megalrps.kernels.table import OPERATIONS

run(Arguments())
print([operation.choose("cuda").why for operation in OPERATIONS if operation.choose("cuda").implementation == "none"])
print(swiglu(torch.ones(2), torch.ones(2)).tolist())
for failing in (lambda: swiglu_triton(torch.ones(2), torch.ones(2)), lambda: run(Arguments(check=()))):
    try:
        failing()
    except (ImportError, ValueError) as error:
        print(type(error).__name__, error)
"""


def test_without_triton_the_package_works_and_says_what_is_missing():
    result = launched("-c", WITHOUT_TRITON)
    assert result.returncode == 0, result.stderr
    assert "triton not installed" in result.stdout
    *_, chosen, computed, launch, check = result.stdout.splitlines()
    mend = "pip install 'megalrps[gpu]'"
    # All but dense attention, weight gradients, sums of squares and AdamW have nothing else on a GPU.
    assert chosen.count(mend) == 8
    assert computed == "[0.7310585975646973, 0.7310585975646973]"
    assert launch.startswith("ImportError Triton is not installed") and mend in launch
    assert check.startswith("InputError --check compiles Triton kernels") and mend in check


@needs_triton
def test_every_run_of_the_tests_compiles_every_case_of_the_newest_target_and_every_kernel_of_all():
    whole = jobs(TARGETS)
    chosen = share(whole)
    assert [job for job in chosen if job.target == TARGETS[-1]] == jobs(TARGETS[-1:])
    assert {(id(job.case.kernel), job.target) for job in chosen} == {(id(job.case.kernel), job.target) for job in whole}
    assert len(chosen) < 0.7 * len(whole)


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_kernel_compiles_for_every_target():
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    result = launched(compiled_share.__file__, seconds=600)
    seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    assert result.returncode in (0, 1), result.stderr
    found = json.loads(result.stdout)
    assert found["self_test"]["complaints"] == []
    flagged = {(each["case"], each["target"]): each["faults"][0] for each in found["self_test"]["verdicts"]}
    assert len(flagged) == 3 * len(TARGETS)
    assert "does not compile" not in " ".join(flagged.values())
    faults = [f"{each['case']} at {each['target']}: {each['faults']}" for each in found["verdicts"] if each["faults"]]
    assert faults == []
    assert [(each["operation"], each["case"], each["target"]) for each in found["verdicts"]] == [
        (job.operation, job.case.name, job.target) for job in share(jobs(TARGETS))
    ]
    assert result.returncode == 0
    assert seconds < 60, "every run of the tests pays these seconds: leave out cases that compile to the same code"
