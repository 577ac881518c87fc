"""The forward kernel of causal attention: an online softmax over tiles of keys, no score kept.

Online softmax: Milakov and Gimelshein 2018, arXiv 1805.02867, algorithm 3; in tiles, with one division at the end and
the log-sum-exp kept for the backward pass: Dao 2023, arXiv 2307.08691, algorithm 1. Exponentials are of base 2, log2(e)
being folded into the scale. A program computes BLOCK_M query rows of one head: first the tiles of keys that all of its
rows attend to, which need no mask, then those at the diagonal.

Rows of different documents (see :mod:`megalrps.kernels.documents`) may share a tile; then all of its tiles of keys are
masked. Keys before the first row's document are never read, so the work is that of the documents one by one.
"""

import torch
from torch import Tensor

from megalrps.kernels.attention_tiles import (
    CASES,
    Tiles,
    TileTable,
    attention_case,
    check_inputs,
    descriptors_fit,
    key_bounds,
    launch,
    load_rows,
    rows_at,
    size_arguments,
    store_rows,
    tensor_arguments,
    tiles_of,
    with_rows,
)
from megalrps.kernels.compile_case import CompileCase
from megalrps.kernels.documents import Documents
from megalrps.kernels.language import tl, triton

_TILES: TileTable = {
    "descriptors": {32: Tiles(128, 64, 4, 3), 64: Tiles(128, 128, 8, 2), 128: Tiles(128, 128, 8, 2)},
    "pointers": {32: Tiles(128, 64, 4, 3), 64: Tiles(128, 64, 8, 3), 128: Tiles(128, 32, 8, 3)},
    "fp32": {32: Tiles(64, 32, 4, 2), 64: Tiles(32, 32, 8, 2), 128: Tiles(16, 32, 4, 2)},
}


def attention_forward_triton(
    query_BSND: Tensor,
    key_BTKD: Tensor,
    value_BTKD: Tensor,
    documents: Documents | None = None,
    *,
    tma: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """The attention [B, S, N, D] and its natural log-sum-exp [B, N, S] in fp32; fp32, bf16 or fp16 with D up to 128.

    ``tma``: fetch tiles by descriptors; unset: on Hopper, where addresses and strides allow it. ValueError for what
    the kernel does not compute.
    """
    check_inputs(query_BSND, key_BTKD, value_BTKD)
    query, key, value = (with_rows(x) for x in (query_BSND, key_BTKD, value_BTKD))
    batch, queries, heads, _ = query.shape
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    logsumexp_BNS = torch.empty((batch, heads, queries), dtype=torch.float32, device=query.device)
    if tma is None:
        tma = descriptors_fit(query, key, value)
    tiles = tiles_of(_TILES, query, tma)
    launch(
        _forward_kernel,
        triton.cdiv(queries, tiles.queries) * batch * heads,
        tiles,
        output_pointer=output,
        logsumexp_pointer=logsumexp_BNS,
        starts_pointer=None if documents is None else documents.starts_BS.contiguous(),
        **tensor_arguments(query=query, key=key, value=value),
        **size_arguments(query, key),
        DOCUMENTS=documents is not None,
        TMA=tma,
    )
    return output, logsumexp_BNS


@triton.jit
def _attend(scores, value, largest, total, weighted, scale, MAY_SEE_NONE: tl.constexpr, PRECISION: tl.constexpr):
    """Take a tile of keys into the rows' largest score, sum of exponentials and sum of weighted values."""
    now = tl.maximum(largest, tl.max(scores, 1) * scale)
    # A row may have seen no key yet, all being another document's: then there is nothing to scale and to sum.
    base = tl.where(now == -float("inf"), 0.0, now) if MAY_SEE_NONE else now
    weights = tl.math.exp2(scores * scale - base[:, None])
    shrink = tl.math.exp2(largest - base)
    total = total * shrink + tl.sum(weights, 1)
    weighted = tl.dot(weights.to(value.dtype), value, weighted * shrink[:, None], input_precision=PRECISION)
    return now, total, weighted


@triton.jit
def _forward_kernel(
    query_pointer,
    key_pointer,
    value_pointer,
    output_pointer,
    logsumexp_pointer,
    starts_pointer,
    query_batch,
    query_row,
    query_head,
    key_batch,
    key_row,
    key_head,
    value_batch,
    value_row,
    value_head,
    queries,
    keys,
    heads,
    group,
    scale,
    HEAD: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles = tl.cdiv(queries, BLOCK_M)
    first = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M  # the longest rows first
    head = tl.program_id(0) // tiles % heads
    batch = (tl.program_id(0) // tiles // heads).to(tl.int64)
    query_pointer += batch * query_batch + head.to(tl.int64) * query_head
    key_pointer += batch * key_batch + (head // group).to(tl.int64) * key_head
    value_pointer += batch * value_batch + (head // group).to(tl.int64) * value_head
    if DOCUMENTS:
        starts_pointer += batch * queries

    query_rows = rows_at(query_pointer, queries, query_row, HEAD, BLOCK_M, WIDTH, TMA)
    key_rows = rows_at(key_pointer, keys, key_row, HEAD, BLOCK_N, WIDTH, TMA)
    value_rows = rows_at(value_pointer, keys, value_row, HEAD, BLOCK_N, WIDTH, TMA)
    query = load_rows(query_rows, first, queries, query_row, HEAD, BLOCK_M, WIDTH, TMA, True)
    row = first + tl.arange(0, BLOCK_M)
    start = row  # unread without documents
    if DOCUMENTS:
        start = tl.load(starts_pointer + row, mask=row < queries, other=0)

    begin, whole, end = key_bounds(starts_pointer, first, queries, keys, BLOCK_M, BLOCK_N, DOCUMENTS)
    largest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    weighted = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    for at in tl.range(begin, whole, BLOCK_N):
        key = load_rows(key_rows, at, keys, key_row, HEAD, BLOCK_N, WIDTH, TMA, False)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        value = load_rows(value_rows, at, keys, value_row, HEAD, BLOCK_N, WIDTH, TMA, False)
        largest, total, weighted = _attend(scores, value, largest, total, weighted, scale, False, PRECISION)
    for at in tl.range(whole, end, BLOCK_N):
        key = load_rows(key_rows, at, keys, key_row, HEAD, BLOCK_N, WIDTH, TMA, True)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        column = at + tl.arange(0, BLOCK_N)
        seen = column[None, :] <= keys - queries + row[:, None]
        if DOCUMENTS:
            seen = seen & (column[None, :] >= start[:, None])
        scores = tl.where(seen, scores, -float("inf"))
        value = load_rows(value_rows, at, keys, value_row, HEAD, BLOCK_N, WIDTH, TMA, True)
        largest, total, weighted = _attend(scores, value, largest, total, weighted, scale, DOCUMENTS, PRECISION)

    output_pointer += (batch * queries * heads + head) * HEAD
    store_rows(output_pointer, weighted / total[:, None], first, queries, heads * HEAD, HEAD, BLOCK_M, WIDTH)
    logsumexp = (largest + tl.math.log2(total)) * 0.6931471805599453
    at_row = logsumexp_pointer + (batch * heads + head) * queries + row
    tl.store(at_row, logsumexp, mask=row < queries)


def forward_cases() -> list[CompileCase]:
    """What ``python -m megalrps.kernels --check`` compiles of this file."""
    inputs, outputs = ("query", "key", "value"), ("output",)
    return [attention_case("forward", _forward_kernel, inputs, outputs, "starts", _TILES, *case) for case in CASES]
