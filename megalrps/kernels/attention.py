"""Causal attention with grouped key-value heads.

Vaswani et al. 2017, arXiv 1706.03762, equation 1; grouped heads: Ainslie et al. 2023, arXiv 2305.13245. Query head n
reads key-value head n // (N/K), where N query heads share K key-value heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(query_BSND: Tensor, key_BSKD: Tensor, value_BSKD: Tensor) -> Tensor:
    """``softmax(q k^T / sqrt(D) + causal mask) v`` as [B, S, N, D], through PyTorch's fused attention.

    The scores are never stored; softmax statistics are kept in fp32 (fp64 for fp64 input).
    """
    output_BNSD = F.scaled_dot_product_attention(
        query_BSND.transpose(1, 2),
        key_BSKD.transpose(1, 2),
        value_BSKD.transpose(1, 2),
        is_causal=True,
        enable_gqa=key_BSKD.shape[2] != query_BSND.shape[2],
    )
    return output_BNSD.transpose(1, 2)


def attention_reference(query_BSND: Tensor, key_BSKD: Tensor, value_BSKD: Tensor) -> Tensor:
    """The formula of :func:`attention` written out, scores and all: what the tests compare with."""
    length, heads, head_size = query_BSND.shape[1:]
    group = heads // key_BSKD.shape[2]
    query, key, value = (x.transpose(1, 2) for x in (query_BSND, key_BSKD, value_BSKD))
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores_BNST = query @ key.transpose(-1, -2) / head_size**0.5
    future_ST = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
    scores_BNST = scores_BNST.to(torch.promote_types(scores_BNST.dtype, torch.float32)).masked_fill(
        future_ST, -torch.inf
    )
    return (scores_BNST.softmax(-1).to(value.dtype) @ value).transpose(1, 2)
