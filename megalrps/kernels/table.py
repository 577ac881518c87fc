"""Every operation of this room: what it computes, what computes it on this machine and why."""

import importlib
import importlib.metadata
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

import megalrps
from megalrps.kernels.adamw_backends import chosen_optimizer_backend
from megalrps.kernels.ahead_of_time import Job
from megalrps.kernels.attention import chosen_backend
from megalrps.kernels.compile_case import CompileCase
from megalrps.kernels.language import HAS_TRITON
from megalrps.kernels.native import cpu_missing, cuda_missing, cuda_targets
from megalrps.kernels.norm import chosen_norm


class Choice(NamedTuple):
    """The implementation that a device gets, and why in words."""

    implementation: str
    why: str


@dataclass(frozen=True)
class Operation:
    """A function of the training step. ``choose``: from the device's type, as torch names it, to what computes it."""

    name: str
    computes: str
    choose: Callable[[str], Choice]


def _kernel_or_torch(device_type: str) -> Choice:
    if device_type == "cpu":
        return Choice("torch", "Triton's kernel is for GPUs")
    if not HAS_TRITON:
        return Choice("none", "Triton is not installed: pip install 'megalrps[gpu]'")
    return Choice("triton", "the operation's kernel for a GPU")


def _attention(documents: bool) -> Callable[[str], Choice]:
    def choose(device_type: str) -> Choice:
        try:
            return Choice(*chosen_backend(device_type, documents=documents, requested="auto"))
        except ValueError as error:  # what is missing for it here, with the mend
            return Choice("none", str(error))

    return choose


def _optimizer(device_type: str) -> Choice:
    return Choice(*chosen_optimizer_backend(device_type, "auto"))


def _norm(device_type: str) -> Choice:
    return Choice(*chosen_norm(device_type))


def _weight_gradient(device_type: str) -> Choice:
    if device_type == "cpu":
        return Choice("torch", "a product, rounded to its operands' type, then added")
    return Choice("torch", "cuBLAS adds the product of bf16 or fp16 to fp32 in place")


OPERATIONS = (
    Operation("rms_norm", "x / sqrt(mean(x^2) + epsilon) * weight", _kernel_or_torch),
    Operation("add_rms_norm", "x + residual, and its rms_norm", _kernel_or_torch),
    Operation("layer_norm", "(x - mean) / sqrt(variance + epsilon) * weight + bias", _kernel_or_torch),
    Operation("rotary", "pairs of a head's dimensions, rotated by the position's angle", _kernel_or_torch),
    Operation("attention", "softmax(q k^T / sqrt(D) + causal mask) v", _attention(documents=False)),
    Operation("attention, packed", "the same, within each document", _attention(documents=True)),
    Operation("swiglu", "gate * sigmoid(gate) * up", _kernel_or_torch),
    Operation("gelu", "x * Phi(x), or its approximation by tanh", _kernel_or_torch),
    Operation("cross_entropy", "log(sum(exp(z))) - z[label]", _kernel_or_torch),
    Operation("weight_gradient", "main += gradient^T input, in fp32", _weight_gradient),
    Operation("sum_of_squares", "of a gradient buffer, for its norm", _norm),
    Operation("adamw", "the AdamW update of flat shards, and their narrow copy", _optimizer),
)

COMPILED_MODULES = ("adamw", "attention", "cross_entropy", "gelu", "layer_norm", "norm", "rms_norm", "rotary", "swiglu")
"""The files that define kernels in Triton: each has ``compile_cases()``."""


def label(module: str, case: str) -> str:
    """The case's name after its file's, where it does not begin with that."""
    return case if case.startswith(module) else f"{module}: {case}"


def jobs(targets: tuple[str, ...], having: str = "") -> list[Job]:
    """Every case of every file at those of ``targets`` where it is launched; ``having``: a part of its label."""
    found: list[Job] = []
    for name in COMPILED_MODULES:
        cases: list[CompileCase] = importlib.import_module(f"megalrps.kernels.{name}").compile_cases()
        found += [
            Job(name, case, target)
            for case in cases
            for target in targets
            if target in case.targets and having in label(name, case.name)
        ]
    return found


def description() -> dict[str, Any]:
    """The object of ``--json``: versions, device, parts of the native module, and every operation with its choice."""
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "versions": {
            "megalrps": megalrps.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": importlib.metadata.version("triton") if HAS_TRITON else None,
        },
        "device": device_type,
        "devices": [_device(index) for index in range(torch.cuda.device_count())],
        "native": native(),
        "operations": [
            {"name": operation.name, "computes": operation.computes, **operation.choose(device_type)._asdict()}
            for operation in OPERATIONS
        ],
    }


def native() -> dict[str, Any]:
    """Of megalrps._native: why it or its CUDA launches are not there (None where they are), and that part's targets."""
    return {"missing": cpu_missing(), "cuda_targets": [*cuda_targets()], "cuda_missing": cuda_missing()}


def has_cuda_code(target: str, built: Sequence[str]) -> bool:
    """Whether machine code for one of ``built``, such as sm_90a, is that of ``target``; PTX (compute_80) is not."""
    return any(each.rstrip("af") == target for each in built)


def _device(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"{torch.cuda.get_device_name(index)} (sm_{major}{minor})"
