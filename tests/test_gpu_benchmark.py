"""benchmarks/gpu/kernels.py: every case runs, on a CPU too, and what a peer computes is what we compute."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu" / "kernels.py"
NEED_A_GPU = {"cuda backend", "apex backend", "flex_attention", "varlen_attn"}
NOT_INSTALLED = {"liger", "cut_cross_entropy"}  # nor are they here; where one is, it is a peer


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict:
    output = tmp_path_factory.mktemp("smoke") / "kernels.json"
    command = [sys.executable, str(SCRIPT), "--smoke", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(output.read_text())


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


def test_without_a_gpu_it_says_so():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 2 and "there is no CUDA device here; --smoke" in done.stderr
