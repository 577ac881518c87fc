"""What can make an update of AdamW, which of these does, and the two that are others': torch's fused one and apex's.

:mod:`megalrps.kernels.adamw` holds the formula and the forms of its own.
"""

from collections.abc import Iterator
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megalrps.kernels.language import HAS_TRITON
from megalrps.kernels.native import check_cuda, cpu_missing
from megalrps.kernels.options import OptimizerBackend

_APEX = (
    "NVIDIA apex with its CUDA extensions, the module amp_C, is not installed: build it from github.com/NVIDIA/apex "
    "with --cpp_ext and --cuda_ext (apex on PyPI is another project), or leave --optimizer-backend at auto"
)
_APEX_CHUNK = 1 << 16  # elements of one thread block; apex counts them, and those of a tensor, in 32 bits
_BLOCK_ELEMENTS = 1 << 25  # bounds the scratch; launches are rare beside the work of so many elements


class Operands(NamedTuple):
    """The tensors of one update, as :func:`megalrps.kernels.adamw.adamw_` is given them."""

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    gradient_scale: Tensor | None
    found_inf: Tensor | None
    narrow: Tensor | None

    def blocks(self, elements: int) -> Iterator["Operands"]:
        """Views of at most ``elements`` each, in order; the scalars go with every one, as [] rather than [1]."""
        scale, found_inf = (
            None if each is None else each.reshape(()) for each in (self.gradient_scale, self.found_inf)
        )
        for start in range(0, self.param.numel(), elements):
            at = slice(start, start + elements)
            narrow = None if self.narrow is None else self.narrow[at]
            yield Operands(
                self.param[at], self.grad[at], self.exp_avg[at], self.exp_avg_sq[at], scale, found_inf, narrow
            )

    def fill_narrow(self) -> None:
        """Round the parameters into ``narrow``; where ``found_inf`` is set it keeps its bits."""
        if self.narrow is None:
            return
        if self.found_inf is None:
            self.narrow.copy_(self.param)
        else:
            torch.where(self.found_inf == 0, self.param.to(self.narrow.dtype), self.narrow, out=self.narrow)


class Settings(NamedTuple):
    """The numbers of one update; ``step`` counts from 1."""

    learning_rate: float
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    step: int


def chosen_optimizer_backend(
    device_type: str, requested: OptimizerBackend = "auto", dtype: torch.dtype = torch.float32
) -> tuple[str, str]:
    """(name, why) of what updates parameters of ``dtype`` on ``device_type``: for people and their logs.

    Beside the backends that can be asked for there are "native", the C++ code of a CPU, and "reference", the formula in
    torch operations. What is asked for is not checked: see :func:`check_optimizer_backend`.
    """
    if requested != "auto":
        return requested, "asked for"
    if device_type == "cpu":
        missing = cpu_missing()
        return ("native", "one pass over memory (csrc/adamw.cpp)") if missing is None else ("reference", missing)
    if device_type != "cuda":
        return "reference", f"there is no kernel for {device_type}"
    if dtype != torch.float32:
        return "reference", f"the kernels update fp32, not {dtype}"
    if not HAS_TRITON:
        return "reference", "Triton is not installed: pip install 'megalrps[gpu]'"
    return "triton", "one launch a bucket, in one pass over memory"


def check_optimizer_backend(
    requested: OptimizerBackend,
    device_type: str,
    exp_avg: torch.dtype = torch.float32,
    exp_avg_sq: torch.dtype = torch.float32,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Raise ValueError, with the mend, where ``requested`` cannot update such parameters and moments there.

    ``device_type`` is where the masters lie: "cpu" with ``--optimizer-cpu-offload``.
    """
    if requested in ("triton", "cuda", "apex"):
        if device_type != "cuda":
            raise ValueError(
                f"--optimizer-backend {requested} updates tensors on a CUDA device, and these are on {device_type}: "
                "auto and torch update them there"
            )
        if dtype != torch.float32:
            raise ValueError(f"--optimizer-backend {requested} computes in fp32, not in {dtype}: auto does")
    if requested in ("torch", "apex") and not exp_avg == exp_avg_sq == dtype:
        raise ValueError(
            f"--optimizer-backend {requested} keeps both moments in the type of the parameters, {dtype}, not in "
            f"{exp_avg} and {exp_avg_sq}: leave --exp-avg-dtype and --exp-avg-sq-dtype at fp32, or this at auto"
        )
    if requested == "triton" and not HAS_TRITON:
        raise ValueError("--optimizer-backend triton needs Triton: pip install 'megalrps[gpu]'")
    if requested == "cuda":
        check_cuda()
    if requested == "apex":
        _amp_c()


def update_fused(operands: Operands, settings: Settings) -> None:
    """The update by ``torch._fused_adamw_``, the kernel of ``torch.optim.AdamW(fused=True)``.

    Its own ``grad_scale`` is not used: it divides, by a number in fp32, and leaves the quotient in the gradient, which
    is only read here. So a scaled gradient takes a block of scratch. ``found_inf`` stops it where it is 1.
    """
    param, gradient_scale, found_inf = operands.param, operands.gradient_scale, operands.found_inf
    step = torch.full((), settings.step, dtype=torch.float32, device=param.device)
    stop = None if found_inf is None else (found_inf != 0).float().reshape(())
    scratch = None if gradient_scale is None else torch.empty_like(param[:_BLOCK_ELEMENTS])
    for block in operands.blocks(_BLOCK_ELEMENTS):
        grad = block.grad
        if scratch is not None:
            assert block.gradient_scale is not None
            grad = torch.mul(grad, block.gradient_scale, out=scratch[: grad.numel()])
        torch._fused_adamw_(
            [block.param],
            [grad],
            [block.exp_avg],
            [block.exp_avg_sq],
            [],
            [step],
            lr=settings.learning_rate,
            beta1=settings.beta1,
            beta2=settings.beta2,
            weight_decay=settings.weight_decay,
            eps=settings.epsilon,
            amsgrad=False,
            maximize=False,
            found_inf=stop,
        )
        block.fill_narrow()


def update_apex(operands: Operands, settings: Settings) -> None:
    """The update by apex's ``multi_tensor_adam_capturable`` (csrc/multi_tensor_adam.cu), in its mode 1, AdamW.

    Not by ``multi_tensor_adam``, which goes on where its flag says not to. It multiplies the gradient by ``inv_scale``,
    on the device, and leaves the product there: it is given a copy, in a block of scratch. It makes no narrow copy.
    """
    adam, param = _amp_c().multi_tensor_adam_capturable, operands.param
    learning_rate = torch.full((1,), settings.learning_rate, dtype=torch.float32, device=param.device)
    step = torch.full((1,), settings.step, dtype=torch.int32, device=param.device)
    scale, stop = operands.gradient_scale, operands.found_inf
    scale = torch.ones_like(learning_rate) if scale is None else scale.float().reshape(1)
    stop = torch.zeros_like(step) if stop is None else (stop != 0).int().reshape(1)
    scratch = torch.empty_like(param[:_BLOCK_ELEMENTS])
    for block in operands.blocks(_BLOCK_ELEMENTS):
        grad = scratch[: block.grad.numel()].copy_(block.grad)
        adam(
            _APEX_CHUNK,
            stop,
            [[grad], [block.param], [block.exp_avg], [block.exp_avg_sq]],
            learning_rate,
            settings.beta1,
            settings.beta2,
            settings.epsilon,
            step,
            1,  # decoupled weight decay
            1,  # bias correction
            settings.weight_decay,
            scale,
        )
        block.fill_narrow()


def _amp_c() -> Any:
    """Apex's compiled module. ValueError where it is not there."""
    try:
        return import_module("amp_C")
    except ImportError:
        raise ValueError(_APEX) from None
