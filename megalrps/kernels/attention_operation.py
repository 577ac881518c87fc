"""Causal attention as an operation of torch's: Triton on a CUDA device, the formulas below on a CPU.

Kept between the passes are the inputs, the output and one log-sum-exp for each row and head; no scores.
"""

from typing import Any

import torch
from torch import Tensor

from megalrps.kernels.attention_backward import attention_backward_triton
from megalrps.kernels.attention_forward import attention_forward_triton
from megalrps.kernels.documents import Documents


def attention_forward_reference(
    query_BSND: Tensor, key_BTKD: Tensor, value_BTKD: Tensor, documents: Documents | None = None
) -> tuple[Tensor, Tensor]:
    """The attention [B, S, N, D], rounded once, and its natural log-sum-exp [B, N, S] (fp32; fp64 for fp64)."""
    scores_BKGST = _scores(query_BSND, key_BTKD, documents)
    logsumexp_BKGS = scores_BKGST.logsumexp(-1)
    weights_BKGST = scores_BKGST.sub_(logsumexp_BKGS.unsqueeze(-1)).exp_()
    output_BKGSD = weights_BKGST @ _key_heads(value_BTKD)
    return _as_tokens(output_BKGSD, query_BSND.dtype), logsumexp_BKGS.flatten(1, 2)


def attention_backward_reference(
    gradient_BSND: Tensor,
    query_BSND: Tensor,
    key_BTKD: Tensor,
    value_BTKD: Tensor,
    output_BSND: Tensor,
    logsumexp_BNS: Tensor,
    documents: Documents | None = None,
    gradient_logsumexp_BNS: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of queries, keys and values: dS = P * (dP - delta), delta the row sums of gradient times output.

    Dao 2023, arXiv 2307.08691, algorithm 2, without tiles. The gradient of the log-sum-exp joins dP - delta.
    """
    groups = key_BTKD.shape[2]
    weights_BKGST = _scores(query_BSND, key_BTKD, documents)
    weights_BKGST.sub_(logsumexp_BNS.unflatten(1, (groups, -1)).unsqueeze(-1)).exp_()
    gradient_BKGSD, output_BKGSD = _query_heads(gradient_BSND, groups), _query_heads(output_BSND, groups)
    delta_BKGS = (gradient_BKGSD * output_BKGSD).sum(-1)
    if gradient_logsumexp_BNS is not None:
        delta_BKGS = delta_BKGS - gradient_logsumexp_BNS.unflatten(1, (groups, -1))
    of_value_BKTD = (weights_BKGST.transpose(-1, -2) @ gradient_BKGSD).sum(2)
    of_scores_BKGST = gradient_BKGSD @ _key_heads(value_BTKD).transpose(-1, -2)
    of_scores_BKGST.sub_(delta_BKGS.unsqueeze(-1)).mul_(weights_BKGST).mul_(query_BSND.shape[-1] ** -0.5)
    of_query_BKGSD = of_scores_BKGST @ _key_heads(key_BTKD)
    of_key_BKTD = (of_scores_BKGST.transpose(-1, -2) @ _query_heads(query_BSND, groups)).sum(2)
    return (
        _as_tokens(of_query_BKGSD, query_BSND.dtype),
        _as_tokens(of_key_BKTD.unsqueeze(2), key_BTKD.dtype),
        _as_tokens(of_value_BKTD.unsqueeze(2), value_BTKD.dtype),
    )


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _query_heads(x_BSND: Tensor, groups: int) -> Tensor:
    """[B, K, G, S, D]: the heads that share a key-value head side by side."""
    return _wide(x_BSND).unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)


def _key_heads(x_BTKD: Tensor) -> Tensor:
    """[B, K, 1, T, D]."""
    return _wide(x_BTKD).transpose(1, 2).unsqueeze(2)


def _as_tokens(x_BKGSD: Tensor, dtype: torch.dtype) -> Tensor:
    return x_BKGSD.flatten(1, 2).transpose(1, 2).to(dtype, memory_format=torch.contiguous_format, copy=True)


def _scores(query_BSND: Tensor, key_BTKD: Tensor, documents: Documents | None) -> Tensor:
    """The scaled scores [B, K, G, S, T], minus infinity where a query attends to no such key."""
    query_BKGSD = _query_heads(query_BSND, key_BTKD.shape[2])
    scores_BKGST = query_BKGSD @ _key_heads(key_BTKD).transpose(-1, -2)
    scores_BKGST *= query_BSND.shape[-1] ** -0.5
    return scores_BKGST.masked_fill_(unseen(query_BSND, key_BTKD, documents), -torch.inf)


def unseen(query_BSND: Tensor, key_BTKD: Tensor, documents: Documents | None) -> Tensor:
    """Whether a query attends *not* to a key: bool [S, T], or [B, 1, 1, S, S] with documents."""
    if documents is not None:
        return ~documents.attended.unsqueeze(1)
    queries, keys = query_BSND.shape[1], key_BTKD.shape[1]
    return torch.ones(queries, keys, dtype=torch.bool, device=query_BSND.device).triu(keys - queries + 1)


# Registration. An operation takes tensors, so the documents come as their two.


def _documents(starts_BS: Tensor | None, ends_BS: Tensor | None) -> Documents | None:
    return None if starts_BS is None or ends_BS is None else Documents(starts_BS, ends_BS)


@torch.library.custom_op("megalrps::attention", mutates_args=(), device_types="cpu")
def forward(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor | None, ends: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The operation: the attention and its log-sum-exp, both differentiable."""
    return attention_forward_reference(query, key, value, _documents(starts, ends))


@torch.library.custom_op("megalrps::attention_backward", mutates_args=(), device_types="cpu")
def backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    starts: Tensor | None,
    ends: Tensor | None,
    gradient_logsumexp: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Its gradients of queries, keys and values."""
    documents = _documents(starts, ends)
    return attention_backward_reference(gradient, query, key, value, output, logsumexp, documents, gradient_logsumexp)


@forward.register_kernel("cuda")
def _(query: Tensor, key: Tensor, value: Tensor, starts: Tensor | None, ends: Tensor | None) -> tuple[Tensor, Tensor]:
    return attention_forward_triton(query, key, value, _documents(starts, ends))


@backward.register_kernel("cuda")
def _(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    starts: Tensor | None,
    ends: Tensor | None,
    gradient_logsumexp: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    documents = _documents(starts, ends)
    return attention_backward_triton(gradient, query, key, value, output, logsumexp, documents, gradient_logsumexp)


@forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, queries, heads = query.shape[:3]
    wide = torch.promote_types(query.dtype, torch.float32)
    return (
        torch.empty_like(query, memory_format=torch.contiguous_format),
        query.new_empty((batch, heads, queries), dtype=wide),
    )


@backward.register_fake
def _(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    of_query, of_key, of_value = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)
    )
    return of_query, of_key, of_value


def _keep(ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output)


def _gradients(ctx: Any, gradient: Tensor | None, gradient_logsumexp: Tensor | None) -> tuple[Tensor | None, ...]:
    query, key, value, starts, ends, output, logsumexp = ctx.saved_tensors
    if gradient is None:
        if gradient_logsumexp is None:
            return (None,) * 5
        gradient = torch.zeros_like(output)
    of_inputs = backward(gradient, query, key, value, output, logsumexp, starts, ends, gradient_logsumexp)
    return (*of_inputs, None, None)


forward.register_autograd(_gradients, setup_context=_keep)
