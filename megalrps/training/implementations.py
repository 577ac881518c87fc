"""What computes the operations of a job on its device: refused before anything is spent, named in every log."""

from collections.abc import Callable, Iterator

import torch

from megalrps.data import permutation
from megalrps.errors import InputError
from megalrps.kernels.adamw_backends import check_optimizer_backend, chosen_optimizer_backend
from megalrps.kernels.attention import check_attention_backend, chosen_backend
from megalrps.kernels.language import HAS_TRITON
from megalrps.training.prepare import Job

_UNBUILT = "megalrps._native is not built: python setup.py build_ext --inplace, with a C++20 compiler"
_ORDERS = {"native": "native code", "numpy": f"numpy ({_UNBUILT})"}
_MOMENTS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def check_implementations(job: Job, device_type: str) -> None:
    """Raise InputError, with the mend, where ``device_type`` lacks an operation, or what was asked to compute it."""
    kernels, optimizer = job.config.kernels, job.config.optimizer
    if device_type == "cuda" and not HAS_TRITON:
        raise InputError("--device cuda needs Triton, which is not installed: pip install 'megalrps[gpu]'")
    moments = (_MOMENTS[optimizer.exp_avg_dtype], _MOMENTS[optimizer.exp_avg_sq_dtype])
    within = job.config.data.reset_attention_mask
    _as_input_error(lambda: check_attention_backend(kernels.attention_backend, device_type, documents=within))
    _as_input_error(lambda: check_optimizer_backend(kernels.optimizer_backend, _of_masters(job, device_type), *moments))


def describe_implementations(job: Job, device_type: str) -> Iterator[str]:
    """Lines of the log: what computes the order of samples, attention, the other kernels and the optimizer's step."""
    kernels = job.config.kernels
    within = job.config.data.reset_attention_mask
    attention, of_attention = chosen_backend(device_type, documents=within, requested=kernels.attention_backend)
    adamw, of_adamw = chosen_optimizer_backend(_of_masters(job, device_type), kernels.optimizer_backend)
    others = "triton" if device_type == "cuda" else "torch"
    yield f"samples     in the order computed by {_ORDERS[permutation.IMPLEMENTATION]}"
    yield f"attention   {attention} ({of_attention}); other kernels: {others}"
    yield f"optimizer   AdamW by {adamw} ({of_adamw})"


def _of_masters(job: Job, device_type: str) -> str:
    """Where the optimizer's state lies."""
    return "cpu" if job.config.parallel.optimizer_cpu_offload else device_type


def _as_input_error(check: Callable[[], None]) -> None:
    try:
        check()
    except ValueError as error:
        raise InputError(str(error)) from error
