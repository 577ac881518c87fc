"""The gated activation of LLaMA's feed-forward layer (Shazeer 2020, arXiv 2002.05202, equation 6, beta = 1)."""

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``gate * sigmoid(gate) * up``, element by element; both [..., F] of one type."""
    return F.silu(gate) * up
