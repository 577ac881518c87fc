"""benchmarks/gpu/kernels.py: every case runs, on a CPU too, and what a peer computes is what we compute."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from one_process import launched_in_turn

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu" / "kernels.py"
NEED_A_GPU = {"cuda backend", "apex backend", "flex_attention", "varlen_attn"}
NOT_INSTALLED = {"liger", "cut_cross_entropy"}  # nor are they here; where one is, it is a peer


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, subprocess.CompletedProcess[str] | None]:
    """What the smoke run writes; and where there is no CUDA device, how a run without --smoke ends."""
    output = tmp_path_factory.mktemp("smoke") / "kernels.json"
    whole = () if torch.cuda.is_available() else ((),)
    done, *refused = launched_in_turn(SCRIPT, ("--smoke", "--output", output), *whole)
    assert done.returncode == 0, done.stderr
    return json.loads(output.read_text()), *(refused or [None])


@pytest.fixture(scope="module")
def report(launches: tuple[dict, subprocess.CompletedProcess[str] | None]) -> dict:
    return launches[0]


def test_a_peer_computes_what_we_compute(report: dict):
    compared = 0
    for case in report["results"]:
        for name, difference in case["difference"].items():
            assert difference is None or difference < 1e-5, (case["name"], name)
            compared += difference is not None
    assert compared >= 25


def test_every_operation_is_timed_in_both_passes(report: dict):
    names = {case["name"] for case in report["results"]}
    both = {"rms_norm", "add_rms_norm, fp32 residual", "layer_norm", "rotary", "swiglu", "gelu", "cross_entropy"}
    both |= {"attention, causal", "attention, documents"}
    assert names == both | {f"{name} backward" for name in both} | {
        "linear_cross_entropy, both passes", "adamw with bf16 copy", "adamw", "sum of squares",
        "weight gradient into fp32",
    }  # fmt: skip


def test_a_peer_is_absent_for_a_stated_reason_alone(report: dict):
    absent = {(name, reason) for case in report["results"] for name, reason in case["absent"].items()}
    assert {name for name, _ in absent} <= NEED_A_GPU | NOT_INSTALLED
    assert all(reason for _, reason in absent)


def test_a_floor_is_what_must_be_moved_or_multiplied(report: dict):
    sizes = {case["name"]: (case["bytes"], case["operations"]) for case in report["results"]}
    tokens, hidden, vocabulary, parameters = 24, 64, 160, 1000
    assert sizes["rms_norm backward"] == (3 * 4 * tokens * hidden, 0)
    assert sizes["adamw with bf16 copy"] == (30 * parameters, 0)
    assert sizes["linear_cross_entropy, both passes"] == (0, 6 * tokens * hidden * vocabulary)
    pairs = tokens * (tokens + 1) / 2
    assert sizes["attention, causal"] == (0, 4 * pairs * 8 * 8)  # the last of three shapes: eight heads of eight
    assert sizes["attention, causal backward"][1] == 2.5 * sizes["attention, causal"][1]


def test_without_a_gpu_it_says_so(launches: tuple[dict, subprocess.CompletedProcess[str] | None]):
    _, done = launches
    if done is None:
        pytest.skip("there is a CUDA device")
    assert done.returncode == 2 and "there is no CUDA device here; --smoke" in done.stderr
