"""Root-mean-square layer normalisation (Zhang and Sennrich 2019, arXiv 1910.07467, equation 4)."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight_H: Tensor, epsilon: float) -> Tensor:
    """``x / sqrt(mean(x^2) + epsilon) * weight`` over the last dimension.

    ``x`` is [..., H]. The statistics and the product are computed in fp32 (fp64 for fp64 input) and rounded once, to
    the type of ``x``.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    inverse_root = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return (wide * inverse_root * weight_H).to(x.dtype)
