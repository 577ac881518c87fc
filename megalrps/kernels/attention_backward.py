"""The backward kernels of causal attention, which compute the probabilities again from the kept log-sum-exp.

Dao 2023, arXiv 2307.08691, algorithm 2, without its atomic additions: one kernel computes the gradients of keys and
values, a program for each tile of keys and key-value head that goes over the query rows of all heads of its group; one
computes the gradients of queries, a program for each tile of query rows. Two products more than in one kernel, and
every sum is taken in one order: two runs give the same bits. Before them ``delta``, the row sums of gradient times
output, is computed (section 2.2 there), so that ``dS = P * (dP - delta)``.
"""

from typing import Any

import torch
from torch import Tensor

from megalrps.kernels.attention_tiles import (
    CASES,
    Tiles,
    TileTable,
    attention_case,
    check_inputs,
    descriptors_fit,
    heads_at,
    key_bounds,
    launch,
    load_head,
    load_rows,
    padded_head,
    rows_at,
    size_arguments,
    store_rows,
    tensor_arguments,
    tiles_of,
    with_rows,
)
from megalrps.kernels.compile_case import VECTOR_LOAD, CompileCase, required_everywhere
from megalrps.kernels.documents import Documents
from megalrps.kernels.language import tl, triton

_KEY_VALUE_TILES: TileTable = {
    "descriptors": {32: Tiles(64, 128, 8, 2), 64: Tiles(64, 128, 8, 2), 128: Tiles(64, 64, 8, 2)},
    "pointers": {32: Tiles(64, 64, 4, 2), 64: Tiles(32, 128, 8, 2), 128: Tiles(32, 64, 8, 2)},
    "fp32": {32: Tiles(16, 32, 4, 2), 64: Tiles(32, 32, 8, 2), 128: Tiles(16, 16, 4, 1)},
}
_QUERY_TILES: TileTable = {
    "descriptors": {32: Tiles(128, 64, 8, 2), 64: Tiles(128, 64, 8, 2), 128: Tiles(128, 64, 8, 2)},
    "pointers": {32: Tiles(64, 64, 4, 2), 64: Tiles(128, 32, 8, 2), 128: Tiles(64, 32, 4, 2)},
    "fp32": {32: Tiles(32, 32, 4, 2), 64: Tiles(32, 32, 8, 2), 128: Tiles(16, 32, 4, 1)},
}
_STATISTICS_ROWS = 64
_PADDING = 128  # the most rows of queries in a tile


def attention_backward_triton(
    gradient_BSND: Tensor,
    query_BSND: Tensor,
    key_BTKD: Tensor,
    value_BTKD: Tensor,
    output_BSND: Tensor,
    logsumexp_BNS: Tensor,
    documents: Documents | None = None,
    gradient_logsumexp_BNS: Tensor | None = None,
    *,
    tma: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of queries, keys and values from those of the output and, if it was used, of the log-sum-exp.

    What :func:`attention_forward_triton` took and gave, with ``tma`` as there.
    """
    check_inputs(query_BSND, key_BTKD, value_BTKD)
    gradient, query, key, value = (with_rows(x) for x in (gradient_BSND, query_BSND, key_BTKD, value_BTKD))
    batch, queries, heads, _ = query.shape
    keys, groups = key.shape[1:3]
    of_query, of_key, of_value = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)
    )
    logsumexp_BNP, delta_BNP = _row_statistics(gradient, with_rows(output_BSND), logsumexp_BNS.contiguous())
    if gradient_logsumexp_BNS is not None:  # d logsumexp / d score is the probability: it joins dP - delta
        delta_BNP[..., :queries] -= gradient_logsumexp_BNS
    if tma is None:
        tma = descriptors_fit(gradient, query, key, value)
    arguments: dict[str, Any] = {
        **tensor_arguments(gradient=gradient, query=query, key=key, value=value),
        **size_arguments(query, key),
        "logsumexp_pointer": logsumexp_BNP,
        "delta_pointer": delta_BNP,
        "padded": delta_BNP.shape[-1],
        "DOCUMENTS": documents is not None,
        "TMA": tma,
    }
    tiles = tiles_of(_KEY_VALUE_TILES, query, tma)
    launch(
        _key_value_kernel,
        triton.cdiv(keys, tiles.keys) * batch * groups,
        tiles,
        of_key_pointer=of_key,
        of_value_pointer=of_value,
        ends_pointer=None if documents is None else documents.ends_BS.contiguous(),
        **arguments,
    )
    tiles = tiles_of(_QUERY_TILES, query, tma)
    launch(
        _query_kernel,
        triton.cdiv(queries, tiles.queries) * batch * heads,
        tiles,
        of_query_pointer=of_query,
        starts_pointer=None if documents is None else documents.starts_BS.contiguous(),
        **arguments,
    )
    return of_query, of_key, of_value


def _row_statistics(gradient_BSND: Tensor, output_BSND: Tensor, logsumexp_BNS: Tensor) -> Tensor:
    """Of every row the log-sum-exp in base 2 and delta, the sum over D of gradient times output: fp32 [2, B, N, P].

    P > S by a tile: the rows beyond have no probability, their log-sum-exp being beyond all scores. So tiles of rows
    are read without a mask, of which Triton 3.6 keeps one a row in registers.
    """
    batch, queries, heads, head_size = gradient_BSND.shape
    padded = (queries // _PADDING + 2) * _PADDING
    statistics_2BNP = torch.empty((2, batch, heads, padded), dtype=torch.float32, device=gradient_BSND.device)
    _statistics_kernel[(padded // _STATISTICS_ROWS * batch * heads,)](
        **tensor_arguments(gradient=gradient_BSND, output=output_BSND),
        logsumexp_pointer=logsumexp_BNS,
        of_logsumexp_pointer=statistics_2BNP[0],
        of_delta_pointer=statistics_2BNP[1],
        queries=queries,
        heads=heads,
        padded=padded,
        HEAD=head_size,
        WIDTH=padded_head(head_size),
        BLOCK_M=_STATISTICS_ROWS,
        num_warps=4,
    )
    return statistics_2BNP


@triton.jit
def _statistics_kernel(
    gradient_pointer,
    output_pointer,
    logsumexp_pointer,
    of_logsumexp_pointer,
    of_delta_pointer,
    gradient_batch,
    gradient_row,
    gradient_head,
    output_batch,
    output_row,
    output_head,
    queries,
    heads,
    padded,
    HEAD: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    tiles = padded // BLOCK_M
    first = tl.program_id(0) % tiles * BLOCK_M
    head = (tl.program_id(0) // tiles % heads).to(tl.int64)
    batch = (tl.program_id(0) // tiles // heads).to(tl.int64)
    gradient_pointer += batch * gradient_batch + head * gradient_head
    output_pointer += batch * output_batch + head * output_head
    gradient = load_rows(gradient_pointer, first, queries, gradient_row, HEAD, BLOCK_M, WIDTH, False, True)
    output = load_rows(output_pointer, first, queries, output_row, HEAD, BLOCK_M, WIDTH, False, True)
    row = first + tl.arange(0, BLOCK_M)
    at = (batch * heads + head) * queries + row
    logsumexp = tl.load(logsumexp_pointer + at, mask=row < queries, other=float("inf"))
    of_row = (batch * heads + head) * padded + row
    tl.store(of_logsumexp_pointer + of_row, logsumexp * 1.4426950408889634)
    tl.store(of_delta_pointer + of_row, tl.sum(gradient.to(tl.float32) * output.to(tl.float32), 1))


@triton.jit
def _query_bounds(
    ends_pointer, first, queries, keys, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DOCUMENTS: tl.constexpr
):
    """Of a tile of keys: its first query, that from which on no mask is needed, and the end of its queries."""
    past = keys - queries
    begin = tl.maximum(first - past, 0)
    end = queries
    one_document = True
    if DOCUMENTS:
        end = tl.load(ends_pointer + tl.minimum(first + BLOCK_N, keys) - 1)
        one_document = tl.load(ends_pointer + first) == end
    whole = begin + tl.cdiv(first + BLOCK_N - 1 - past - begin, BLOCK_M) * BLOCK_M
    return begin, tl.where(one_document, whole, end), end


@triton.jit
def _load_statistic(pointer, at, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr):
    """One number of each row of a tile. How the address is written decides what spills, under Triton 3.6 above all."""
    if PRECISION == "tf32x3":  # fp32: the other way the compiler lays the products out worse, with a third more of them
        return tl.load(pointer + (at + tl.arange(0, BLOCK_M)))
    else:  # noqa: RET505
        return tl.load(pointer + at + tl.arange(0, BLOCK_M))  # else every row keeps an address in registers


@triton.jit
def _key_value_kernel(
    gradient_pointer,
    query_pointer,
    key_pointer,
    value_pointer,
    logsumexp_pointer,
    delta_pointer,
    of_key_pointer,
    of_value_pointer,
    ends_pointer,
    gradient_batch,
    gradient_row,
    gradient_head,
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
    padded,
    scale,
    HEAD: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles = tl.cdiv(keys, BLOCK_N)
    first = tl.program_id(0) % tiles * BLOCK_N  # the first keys, which most queries attend to, come first
    of_group = tl.program_id(0) // tiles % (heads // group)
    batch = (tl.program_id(0) // tiles // (heads // group)).to(tl.int64)
    key_pointer += batch * key_batch + of_group.to(tl.int64) * key_head
    value_pointer += batch * value_batch + of_group.to(tl.int64) * value_head
    key_rows = rows_at(key_pointer, keys, key_row, HEAD, BLOCK_N, WIDTH, TMA)
    value_rows = rows_at(value_pointer, keys, value_row, HEAD, BLOCK_N, WIDTH, TMA)
    key = load_rows(key_rows, first, keys, key_row, HEAD, BLOCK_N, WIDTH, TMA, True)
    value = load_rows(value_rows, first, keys, value_row, HEAD, BLOCK_N, WIDTH, TMA, True)

    past = keys - queries
    column = first + tl.arange(0, BLOCK_N)
    limit = column  # unread without documents
    if DOCUMENTS:
        ends_pointer += batch * queries
        limit = tl.load(ends_pointer + column, mask=column < keys, other=0)
    begin, whole, end = _query_bounds(ends_pointer, first, queries, keys, BLOCK_M, BLOCK_N, DOCUMENTS)
    of_key = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    of_value = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    query_pointer += batch * query_batch
    gradient_pointer += batch * gradient_batch
    query_heads = heads_at(query_pointer, heads, queries, query_head, query_row, HEAD, BLOCK_M, WIDTH, TMA)
    gradient_heads = heads_at(gradient_pointer, heads, queries, gradient_head, gradient_row, HEAD, BLOCK_M, WIDTH, TMA)
    for head in range(of_group * group, (of_group + 1) * group):
        at_logsumexp = logsumexp_pointer + (batch * heads + head) * padded
        at_delta = delta_pointer + (batch * heads + head) * padded
        for at in tl.range(begin, end, BLOCK_M):
            query = load_head(query_heads, head, at, queries, query_head, query_row, HEAD, BLOCK_M, WIDTH, TMA)
            gradient = load_head(
                gradient_heads, head, at, queries, gradient_head, gradient_row, HEAD, BLOCK_M, WIDTH, TMA
            )
            logsumexp = _load_statistic(at_logsumexp, at, BLOCK_M, PRECISION)
            delta = _load_statistic(at_delta, at, BLOCK_M, PRECISION)
            scores = tl.dot(key, tl.trans(query), input_precision=PRECISION) * scale - logsumexp[None, :]
            # The last tile may reach into the next document; beyond all queries there is no probability.
            if (at < whole) | (DOCUMENTS and at + BLOCK_M > end):
                row = at + tl.arange(0, BLOCK_M)
                seen = column[:, None] <= past + row[None, :]
                if DOCUMENTS:
                    seen = seen & (row[None, :] < limit[:, None])
                scores = tl.where(seen, scores, -float("inf"))
            weights = tl.math.exp2(scores)
            of_value = tl.dot(weights.to(gradient.dtype), gradient, of_value, input_precision=PRECISION)
            of_weights = tl.dot(value, tl.trans(gradient), input_precision=PRECISION)
            of_scores = weights * (of_weights - delta[None, :])
            of_key = tl.dot(of_scores.to(query.dtype), query, of_key, input_precision=PRECISION)

    offset = (batch * keys * (heads // group) + of_group) * HEAD
    stride = heads // group * HEAD
    store_rows(
        of_key_pointer + offset, of_key * (scale * 0.6931471805599453), first, keys, stride, HEAD, BLOCK_N, WIDTH
    )
    store_rows(of_value_pointer + offset, of_value, first, keys, stride, HEAD, BLOCK_N, WIDTH)


@triton.jit
def _query_kernel(
    gradient_pointer,
    query_pointer,
    key_pointer,
    value_pointer,
    logsumexp_pointer,
    delta_pointer,
    of_query_pointer,
    starts_pointer,
    gradient_batch,
    gradient_row,
    gradient_head,
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
    padded,
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
    gradient_pointer += batch * gradient_batch + head.to(tl.int64) * gradient_head
    query_pointer += batch * query_batch + head.to(tl.int64) * query_head
    key_pointer += batch * key_batch + (head // group).to(tl.int64) * key_head
    value_pointer += batch * value_batch + (head // group).to(tl.int64) * value_head
    if DOCUMENTS:
        starts_pointer += batch * queries

    gradient_rows = rows_at(gradient_pointer, queries, gradient_row, HEAD, BLOCK_M, WIDTH, TMA)
    query_rows = rows_at(query_pointer, queries, query_row, HEAD, BLOCK_M, WIDTH, TMA)
    key_rows = rows_at(key_pointer, keys, key_row, HEAD, BLOCK_N, WIDTH, TMA)
    value_rows = rows_at(value_pointer, keys, value_row, HEAD, BLOCK_N, WIDTH, TMA)
    gradient = load_rows(gradient_rows, first, queries, gradient_row, HEAD, BLOCK_M, WIDTH, TMA, True)
    query = load_rows(query_rows, first, queries, query_row, HEAD, BLOCK_M, WIDTH, TMA, True)
    row = first + tl.arange(0, BLOCK_M)
    at_row = (batch * heads + head) * padded + row
    logsumexp = tl.load(logsumexp_pointer + at_row)
    delta = tl.load(delta_pointer + at_row)
    start = row  # unread without documents
    if DOCUMENTS:
        start = tl.load(starts_pointer + row, mask=row < queries, other=0)

    begin, whole, end = key_bounds(starts_pointer, first, queries, keys, BLOCK_M, BLOCK_N, DOCUMENTS)
    of_query = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    for at in tl.range(begin, end, BLOCK_N):
        key = load_rows(key_rows, at, keys, key_row, HEAD, BLOCK_N, WIDTH, TMA, True)
        value = load_rows(value_rows, at, keys, value_row, HEAD, BLOCK_N, WIDTH, TMA, True)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale - logsumexp[:, None]
        if at >= whole:
            column = at + tl.arange(0, BLOCK_N)
            seen = column[None, :] <= keys - queries + row[:, None]
            if DOCUMENTS:
                seen = seen & (column[None, :] >= start[:, None])
            scores = tl.where(seen, scores, -float("inf"))
        weights = tl.math.exp2(scores)
        of_weights = tl.dot(gradient, tl.trans(value), input_precision=PRECISION)
        of_scores = weights * (of_weights - delta[:, None])
        of_query = tl.dot(of_scores.to(key.dtype), key, of_query, input_precision=PRECISION)

    of_query_pointer += (batch * queries * heads + head) * HEAD
    of_query *= scale * 0.6931471805599453
    store_rows(of_query_pointer, of_query, first, queries, heads * HEAD, HEAD, BLOCK_M, WIDTH)


def backward_cases() -> list[CompileCase]:
    """What ``python -m megalrps.kernels --check`` compiles of this file."""
    inputs = ("gradient", "query", "key", "value")
    kernels = (
        ("keys and values", _key_value_kernel, ("of_key", "of_value"), "ends", _KEY_VALUE_TILES),
        ("queries", _query_kernel, ("of_query",), "starts", _QUERY_TILES),
    )
    strides = tuple(f"{each}_{of}" for each in ("gradient", "output") for of in ("batch", "row", "head"))
    statistics = CompileCase(
        name="attention row statistics, head 64",
        kernel=_statistics_kernel,
        arguments={f"{each}_pointer": "*bf16" for each in ("gradient", "output")}
        | {f"{each}_pointer": "*fp32" for each in ("logsumexp", "of_logsumexp", "of_delta")}
        | dict.fromkeys((*strides, "queries", "heads", "padded"), "i32"),
        constants={"HEAD": 64, "WIDTH": 64, "BLOCK_M": _STATISTICS_ROWS},
        divisible=(*strides, "queries", "padded"),
        required=required_everywhere(VECTOR_LOAD),
    )
    return [statistics] + [
        attention_case(f"gradients of {name}", kernel, inputs, outputs, border, table, *case)
        for name, kernel, outputs, border, table in kernels
        for case in CASES
    ]
