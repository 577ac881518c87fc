"""Causal attention with grouped key-value heads.

Vaswani et al. 2017, arXiv 1706.03762, equation 1; grouped heads: Ainslie et al. 2023, arXiv 2305.13245. Query head n
reads key-value head n // (N/K), where N query heads share K key-value heads.

The queries are those of the last S of T positions, the keys and values those of all T, in order: query s attends to
keys 0 to T - S + s. S = T is a whole sequence; S < T a run of it whose past others have computed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right


def attention(query_BSND: Tensor, key_BTKD: Tensor, value_BTKD: Tensor) -> Tensor:
    """``softmax(q k^T / sqrt(D) + causal mask) v`` as [B, S, N, D], through PyTorch's fused attention.

    The scores are never stored; softmax statistics are kept in fp32 (fp64 for fp64 input). Where S < T and the device
    has no flash or memory-efficient kernel for the input, as on a CPU, a mask of S x T is made.
    """
    queries, keys = query_BSND.shape[1], key_BTKD.shape[1]
    assert queries <= keys, "a query without a key attends to nothing"
    output_BNSD = F.scaled_dot_product_attention(
        query_BSND.transpose(1, 2),
        key_BTKD.transpose(1, 2),
        value_BTKD.transpose(1, 2),
        # is_causal aligns the mask with the first key, the bias with the last.
        attn_mask=None if queries == keys else causal_lower_right(queries, keys),
        is_causal=queries == keys,
        enable_gqa=key_BTKD.shape[2] != query_BSND.shape[2],
    )
    return output_BNSD.transpose(1, 2)


def attention_reference(query_BSND: Tensor, key_BTKD: Tensor, value_BTKD: Tensor) -> Tensor:
    """The formula of :func:`attention` written out, scores and all: what the tests compare with."""
    queries, heads, head_size = query_BSND.shape[1:]
    keys = key_BTKD.shape[1]
    group = heads // key_BTKD.shape[2]
    query, key, value = (x.transpose(1, 2) for x in (query_BSND, key_BTKD, value_BTKD))
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores_BNST = query @ key.transpose(-1, -2) / head_size**0.5
    future_ST = torch.ones(queries, keys, dtype=torch.bool, device=query.device).triu(keys - queries + 1)
    scores_BNST = scores_BNST.to(torch.promote_types(scores_BNST.dtype, torch.float32)).masked_fill(
        future_ST, -torch.inf
    )
    return (scores_BNST.softmax(-1).to(value.dtype) @ value).transpose(1, 2)
