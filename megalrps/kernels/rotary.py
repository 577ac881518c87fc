"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864, equation 34) in the half-rotation layout.

Dimension d of a head is paired with d + D/2, as in Hugging Face's and Megatron's LLaMA; the paper pairs neighbours. The
two differ by a fixed permutation of the rows of the query and key projections.
"""

import torch
from torch import Tensor


def rotary_tables(positions_S: Tensor, head_size: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine, each [S, D/2] in fp32, of ``position * base^(-2d/D)`` for d in [0, D/2).

    The angles are formed in fp32 whatever the model's type: released LLaMA weights were trained on these very
    roundings, so a more accurate table would be a different model.
    """
    exponents = torch.arange(0, head_size, 2, device=positions_S.device, dtype=torch.float32) / head_size
    angles = torch.outer(positions_S.to(torch.float32), 1.0 / base**exponents)
    return angles.cos(), angles.sin()


def rotary(x_BSND: Tensor, cosine_SR: Tensor, sine_SR: Tensor) -> Tensor:
    """Rotate every pair (d, d + D/2) of every head by its position's angle; R = D/2.

    Computed in fp32 (fp64 for fp64 input) and rounded once, to the type of ``x``.
    """
    first, second = x_BSND.chunk(2, dim=-1)
    cosine, sine = cosine_SR[:, None, :], sine_SR[:, None, :]
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1).to(x_BSND.dtype)
