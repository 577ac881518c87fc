"""Causal attention with grouped key-value heads, within documents where there are several in a window.

Vaswani et al. 2017, arXiv 1706.03762, equation 1; grouped heads: Ainslie et al. 2023, arXiv 2305.13245. Query head n
reads key-value head n // (N/K), where N query heads share K key-value heads.

The queries are those of the last S of T positions, the keys and values those of all T, in order: query s attends to
keys 0 to T - S + s. S = T is a whole sequence; S < T a run of it whose past others have computed. With documents
S = T, and a query attends to no key before its document.
"""

import importlib
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from megalrps.kernels import attention_operation
from megalrps.kernels.attention_backward import backward_cases
from megalrps.kernels.attention_forward import forward_cases
from megalrps.kernels.compile_case import CompileCase
from megalrps.kernels.documents import Documents, documents_from_starts, documents_of
from megalrps.kernels.language import HAS_TRITON
from megalrps.kernels.options import AttentionBackend

__all__ = [
    "Documents",
    "attention",
    "attention_reference",
    "causal_lower_right",
    "check_attention_backend",
    "chosen_backend",
    "compile_cases",
    "documents_from_starts",
    "documents_of",
]


def attention(
    query_BSND: Tensor,
    key_BTKD: Tensor,
    value_BTKD: Tensor,
    *,
    documents: Documents | None = None,
    backend: AttentionBackend = "auto",
) -> Tensor:
    """``softmax(q k^T / sqrt(D) + causal mask) v`` as [B, S, N, D], by the implementation that ``backend`` names.

    ``auto`` is what :func:`chosen_backend` says. But for ``reference`` the scores are never stored; softmax statistics
    are kept in fp32 (fp64 for fp64 input). Where S < T, or with documents, and the device has no flash or
    memory-efficient kernel for the input, as on a CPU, a mask of S x T is made.

    ValueError where the documents are not those of the tokens, or the backend cannot compute it here.
    """
    batch, queries = query_BSND.shape[:2]
    keys = key_BTKD.shape[1]
    assert queries <= keys, "a query without a key attends to nothing"
    if documents is not None and not (queries == keys and documents.starts_BS.shape == (batch, queries)):
        raise ValueError(
            f"documents of {list(documents.starts_BS.shape)} tokens with queries of {[batch, queries]} and keys of "
            f"{[batch, keys]}: attention within documents is that of whole windows, each token a query and a key"
        )
    device = query_BSND.device.type
    name, _ = chosen_backend(device, documents=documents is not None, requested=backend)
    return _BACKENDS[name](query_BSND, key_BTKD, value_BTKD, documents)


def chosen_backend(
    device_type: str, *, documents: bool, requested: AttentionBackend = "auto"
) -> tuple[AttentionBackend, str]:
    """Who computes attention on ``device_type`` ("cpu", "cuda"), with or without documents, and why, in words.

    ``auto`` goes by published figures, unmeasured by us: on Hopper cuDNN's dense causal attention is at the level of
    FlashAttention-3 (Shah et al. 2024, arXiv 2407.08608, figure 5; NVIDIA/cudnn-frontend, benchmark results of the
    H200), and SDPA has it; SDPA has no documents but by a mask, with which cuDNN's gradients of queries can be NaN
    (pytorch/pytorch#196678). ValueError, with the mend, for what ``requested`` cannot do.
    """
    on_gpu = device_type == "cuda"
    if requested == "auto":
        if not on_gpu:
            return "sdpa", "auto: torch's own attention is the fast one without a GPU"
        if not documents:
            return (
                "sdpa",
                "auto: of dense causal attention cuDNN's and FlashAttention's kernels are published as fastest",
            )
        requested, why = "triton", "auto: work for the tokens' own documents alone, and no mask"
    else:
        why = "--attention-backend"
    if requested == "triton":
        _check_triton(on_gpu)
    elif requested == "flash":
        _check_flash(on_gpu)
    elif requested == "sdpa" and on_gpu and documents:
        raise ValueError(
            "--attention-backend sdpa attends within documents by a mask, with which cuDNN's gradients can be NaN "
            "(pytorch/pytorch#196678): use --attention-backend auto, triton or flash"
        )
    return requested, why


def check_attention_backend(requested: AttentionBackend, device_type: str, *, documents: bool = False) -> None:
    """Raise ValueError, with the mend, before anything is trained, if ``requested`` cannot attend on this device."""
    chosen_backend(device_type, documents=documents, requested=requested)


def attention_reference(
    query_BSND: Tensor, key_BTKD: Tensor, value_BTKD: Tensor, documents: Documents | None = None
) -> Tensor:
    """The formula of :func:`attention` written out, scores and all: what the tests compare with."""
    head_size = query_BSND.shape[-1]
    group = query_BSND.shape[2] // key_BTKD.shape[2]
    query, key, value = (x.transpose(1, 2) for x in (query_BSND, key_BTKD, value_BTKD))
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores_BNST = query @ key.transpose(-1, -2) / head_size**0.5
    unseen = attention_operation.unseen(query_BSND, key_BTKD, documents)
    scores_BNST = scores_BNST.to(torch.promote_types(scores_BNST.dtype, torch.float32)).masked_fill(
        unseen if documents is None else unseen.squeeze(1), -torch.inf
    )
    return (scores_BNST.softmax(-1).to(value.dtype) @ value).transpose(1, 2)


def compile_cases() -> list[CompileCase]:
    """What ``python -m megalrps.kernels --check`` compiles of attention, forwards and backwards."""
    return [*forward_cases(), *backward_cases()]


def _check_triton(on_gpu: bool) -> None:
    if not on_gpu:
        raise ValueError(
            "--attention-backend triton: Triton kernels need a CUDA device; use --attention-backend auto, "
            "which is torch's attention here"
        )
    if not HAS_TRITON:
        raise ValueError(
            "attention within documents and --attention-backend triton need Triton, which is not installed: "
            "pip install 'megalrps[gpu]'"
        )


def _check_flash(on_gpu: bool) -> None:
    if not on_gpu:
        raise ValueError(
            "--attention-backend flash: the package flash-attn needs a CUDA device; use --attention-backend auto, "
            "which is torch's attention here"
        )
    if importlib.util.find_spec("flash_attn") is None:
        raise ValueError(
            "--attention-backend flash: the package flash-attn is not installed: "
            "pip install flash-attn --no-build-isolation, or use --attention-backend auto"
        )


def _by_sdpa(query_BSND: Tensor, key_BTKD: Tensor, value_BTKD: Tensor, documents: Documents | None) -> Tensor:
    queries, keys = query_BSND.shape[1], key_BTKD.shape[1]
    mask: Any = documents.attended if documents is not None else None
    causal = documents is None and queries == keys
    if queries < keys:
        mask = causal_lower_right(queries, keys)
    with _in_order(query_BSND, causal):
        output_BNSD = F.scaled_dot_product_attention(
            query_BSND.transpose(1, 2),
            key_BTKD.transpose(1, 2),
            value_BTKD.transpose(1, 2),
            # is_causal aligns the mask with the first key, the bias with the last.
            attn_mask=mask,
            is_causal=causal,
            enable_gqa=key_BTKD.shape[2] != query_BSND.shape[2],
        )
    return output_BNSD.transpose(1, 2)


def _in_order(query: Tensor, causal: bool) -> AbstractContextManager[object]:
    """Ask SDPA's kernels for a GPU in the order cuDNN, flash, memory-efficient, for this call.

    The order is the process's, put back at the end; what the user has switched off stays so. cuDNN is for whole causal
    attention only: never with a mask (pytorch/pytorch#196678).
    """
    if query.device.type != "cuda":
        return nullcontext()
    allowed = torch.backends.cuda
    enabled = {
        SDPBackend.CUDNN_ATTENTION: allowed.cudnn_sdp_enabled(),
        SDPBackend.FLASH_ATTENTION: allowed.flash_sdp_enabled(),
        SDPBackend.EFFICIENT_ATTENTION: allowed.mem_efficient_sdp_enabled(),
        SDPBackend.MATH: allowed.math_sdp_enabled(),
    }
    asked = [kernel for kernel, is_on in enabled.items() if is_on and (causal or kernel != SDPBackend.CUDNN_ATTENTION)]
    # torch puts the order of all kernels back only if all of them were on; else it stays the process's throughout.
    return sdpa_kernel(asked, set_priority=all(enabled.values()))


def _by_flash(query_BSND: Tensor, key_BTKD: Tensor, value_BTKD: Tensor, documents: Documents | None) -> Tensor:
    flash_attn = importlib.import_module("flash_attn")  # an optional package, imported only when asked for
    if documents is None:
        output: Tensor = flash_attn.flash_attn_func(query_BSND, key_BTKD, value_BTKD, causal=True)
        return output
    lengths, longest = documents.cumulative_lengths, documents.longest
    tokens = (x.flatten(0, 1) for x in (query_BSND, key_BTKD, value_BTKD))
    output = flash_attn.flash_attn_varlen_func(*tokens, lengths, lengths, longest, longest, causal=True)
    return output.view_as(query_BSND)


def _by_triton(query_BSND: Tensor, key_BTKD: Tensor, value_BTKD: Tensor, documents: Documents | None) -> Tensor:
    starts_BS = ends_BS = None
    if documents is not None:
        starts_BS, ends_BS = documents.starts_BS, documents.ends_BS
    output: Tensor = attention_operation.forward(query_BSND, key_BTKD, value_BTKD, starts_BS, ends_BS)[0]
    return output


_BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, Documents | None], Tensor]] = {
    "sdpa": _by_sdpa,
    "flash": _by_flash,
    "triton": _by_triton,
    "reference": attention_reference,
}
