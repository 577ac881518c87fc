"""Which implementation computes what: the options of this room, free of torch so that ``--help`` stays instant."""

from dataclasses import dataclass
from typing import Literal

AttentionBackend = Literal["auto", "triton", "sdpa", "flash", "reference"]
OptimizerBackend = Literal["auto", "triton", "cuda", "apex", "torch"]


@dataclass(frozen=True)
class KernelOptions:
    """Who computes the two operations that have several implementations; all others have one for each device."""

    attention_backend: AttentionBackend = "auto"
    """Attention: triton (our kernels), sdpa (torch's: cuDNN, FlashAttention-2, memory-efficient), flash (the package
    flash-attn) or reference (the formula, scores and all); auto: sdpa, and triton for packed documents on a GPU."""
    optimizer_backend: OptimizerBackend = "auto"
    """AdamW's step: triton or cuda (our kernels), apex (its multi-tensor kernel) or torch; auto: the fastest of ours
    that is there."""
