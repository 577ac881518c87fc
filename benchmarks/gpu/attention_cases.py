"""The attention of benchmarks/gpu/kernels.py: dense causal and packed documents, heads grouped and not."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from kernel_cases import Case, Differentiable, Floor, Function, Sizes, drawn
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megalrps.kernels.attention import attention, documents_of

_DOCUMENTS = 11  # to a window: of uneven lengths, as text has them


def attention_cases(sizes: Sizes) -> Iterator[Case]:
    """Each head size of the presets of a billion parameters, dense and packed."""
    for head_size, groups in ((sizes.head_size, 1), (sizes.head_size, 4), (sizes.head_size // 2, 1)):
        heads = sizes.heads * sizes.head_size // head_size
        yield from _dense(sizes, heads, head_size, groups).cases()
        yield from _packed(sizes, heads, head_size, groups).cases()


def _inputs(sizes: Sizes, heads: int, head_size: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    batch = sizes.tokens // sizes.sequence
    query = drawn(sizes, batch, sizes.sequence, heads, head_size)
    key, value = (drawn(sizes, batch, sizes.sequence, heads // groups, head_size) for _ in range(2))
    return query, key, value


def _shape(query: Tensor, groups: int) -> str:
    batch, length, heads, head_size = query.shape
    return f"{batch} x {length} x {heads} x {head_size}, {heads // groups} key-value heads"


def _operations(pairs: float, heads: int, head_size: int) -> tuple[Floor, Floor]:
    """Of the products over so many pairs of query and key: two forwards, five backwards."""
    forward = 4.0 * pairs * heads * head_size
    return Floor(operations=forward), Floor(operations=2.5 * forward)


def _dense(sizes: Sizes, heads: int, head_size: int, groups: int) -> Differentiable:
    query, key, value = _inputs(sizes, heads, head_size, groups)
    batch, length = query.shape[:2]
    forward, backward = _operations(batch * length * (length + 1) / 2, heads, head_size)

    def torchs(*backends: SDPBackend) -> Function:
        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            with sdpa_kernel(list(backends)):
                return F.scaled_dot_product_attention(
                    query.transpose(1, 2),
                    key.transpose(1, 2),
                    value.transpose(1, 2),
                    is_causal=True,
                    enable_gqa=groups > 1,
                ).transpose(1, 2)

        return attend

    kinds = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    if sizes.device == "cpu":
        kinds = {"math": SDPBackend.MATH}
    peers = {f"sdpa {name}": torchs(kind) for name, kind in kinds.items()}
    usable, absent = _usable(peers, query, key, value)
    if sizes.device == "cuda":
        usable["auto"] = attention
    return Differentiable(
        "attention, causal", _shape(query, groups), (query, key, value), _ours(sizes), usable, forward, backward, absent
    )


def _ours(sizes: Sizes, **named: Any) -> Function:
    backend = "triton" if sizes.device == "cuda" else "auto"
    return lambda query, key, value: attention(query, key, value, backend=backend, **named)


def _usable(peers: dict[str, Function], *inputs: Tensor) -> tuple[dict[str, Function], dict[str, str]]:
    """The peers that take these inputs, and what the others say."""
    usable, absent = {}, {}
    for name, peer in peers.items():
        try:
            peer(*inputs)
            usable[name] = peer
        except Exception as error:  # whatever it raises is its answer
            absent[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
    return usable, absent


def document_lengths(tokens: int, window: int) -> list[int]:
    """Of packed documents whose borders include the windows': the same at every call, few long and many short ones."""
    generator = torch.Generator().manual_seed(0)
    lengths: list[int] = []
    for _ in range(tokens // window):
        weights = torch.rand(min(_DOCUMENTS, window), generator=generator).square() + 0.01
        cuts = (weights.cumsum(0) / weights.sum() * window).long().tolist()
        cuts[-1] = window
        lengths += [after - before for before, after in zip([0, *cuts[:-1]], cuts, strict=True) if after > before]
    return lengths


def _packed(sizes: Sizes, heads: int, head_size: int, groups: int) -> Differentiable:
    query, key, value = _inputs(sizes, heads, head_size, groups)
    batch, length = query.shape[:2]
    lengths = document_lengths(sizes.tokens, sizes.sequence)
    ends = torch.tensor([0, *lengths], device=sizes.device).cumsum(0).int()
    documents = documents_of(ends, batch, length)
    forward, backward = _operations(sum(each * (each + 1) / 2 for each in lengths), heads, head_size)
    peers = {
        "flex_attention": _flex(lengths, batch, length, groups),
        "varlen_attn": _varlen(ends, max(lengths), groups),
    }
    usable, absent = ({}, {"flex_attention": "needs a GPU", "varlen_attn": "needs a GPU"})
    if sizes.device == "cuda":
        usable, absent = _usable(peers, query, key, value)
    else:
        usable = {"one by one": _one_by_one(lengths)}
    shape = f"{_shape(query, groups)}, {len(lengths)} documents"
    return Differentiable(
        "attention, documents", shape, (query, key, value), _ours(sizes, documents=documents), usable,
        forward, backward, absent,
    )  # fmt: skip


def _varlen(ends: Tensor, longest: int, groups: int) -> Function:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        named = {"enable_gqa": True} if groups > 1 else {}
        flat = (each.flatten(0, 1) for each in (query, key, value))
        return varlen_attn(*flat, ends, ends, longest, longest, window_size=(-1, 0), **named).view(query.shape)

    return attend


def _flex(lengths: list[int], batch: int, length: int, groups: int) -> Function:
    compiled: dict[str, Callable[..., Any]] = {}

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        if not compiled:
            of_document = torch.repeat_interleave(
                torch.arange(len(lengths)), torch.tensor(lengths)
            ).view(batch, length).to(query.device)  # fmt: skip

            def visible(window: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
                return (row >= column) & (of_document[window, row] == of_document[window, column])

            mask = create_block_mask(visible, batch, None, length, length, device=str(query.device))
            function = torch.compile(flex_attention)
            compiled["attend"] = lambda *tensors: function(*tensors, block_mask=mask, enable_gqa=groups > 1)
        heads_first = (each.transpose(1, 2) for each in (query, key, value))
        output: Tensor = compiled["attend"](*heads_first)
        return output.transpose(1, 2)

    return attend


def _one_by_one(lengths: list[int]) -> Function:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        flat = [each.flatten(0, 1).split(lengths) for each in (query, key, value)]
        outputs = [attention(*(each[None] for each in document)) for document in zip(*flat, strict=True)]
        return torch.cat(outputs, dim=1).view(query.shape)

    return attend
