"""What the kernels of attention share: how their tiles are chosen and fetched, and how they are launched.

A tile is a run of rows [rows, D] of one head, padded to a power of two of columns in registers alone.
"""

from contextvars import copy_context
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megalrps.kernels.compile_case import TARGETS, TENSOR_CORE, TMA_LOAD, VECTOR_LOAD, CompileCase
from megalrps.kernels.language import next_power_of_2, tl, triton

LOG2_E = 1.4426950408889634
LARGEST_HEAD = 128


class Tiles(NamedTuple):
    """How a kernel of attention is launched: rows of queries and of keys in a tile, warps, depth of the pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


TileTable = dict[str, dict[int, Tiles]]
"""By what is fetched and how, and by the padded head: ``descriptors`` on Hopper, ``pointers`` elsewhere and where
strides are odd, ``fp32`` by pointers everywhere. Chosen by ahead-of-time compilation (nothing spills, and all but
the first stay below the 99 KiB of shared memory of the smaller cards), unmeasured."""


def check_inputs(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise ValueError, with the mend, for what the kernels do not compute."""
    if query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"the Triton attention takes fp32, bf16 and fp16, not {query.dtype}: use the backend sdpa or reference"
        )
    if query.shape[-1] > LARGEST_HEAD:
        raise ValueError(
            f"the Triton attention takes heads of up to {LARGEST_HEAD}, not {query.shape[-1]}: "
            "use the backend sdpa, flash or reference"
        )
    assert query.dtype == key.dtype == value.dtype and key.shape == value.shape
    assert query.shape[1] <= key.shape[1] and query.shape[2] % key.shape[2] == 0


def padded_head(head_size: int) -> int:
    """Columns of a tile: a power of two."""
    return max(32, next_power_of_2(head_size))


def tiles_of(table: TileTable, query: Tensor, tma: bool) -> Tiles:
    """The launch of a kernel for queries of this type and head."""
    kind = "fp32" if query.dtype == torch.float32 else "descriptors" if tma else "pointers"
    return table[kind][padded_head(query.shape[-1])]


def descriptors_fit(*tensors: Tensor) -> bool:
    """Whether rows of these are fetched by the copy engine (TMA): 16-bit numbers on Hopper, which the tiles are made
    for, with addresses and strides that are multiples of 16 bytes."""
    first = tensors[0]
    return (
        first.is_cuda
        and first.element_size() == 2
        and torch.cuda.get_device_capability(first.device)[0] == 9
        and all(aligned(x) for x in tensors)
    )


def aligned(x: Tensor) -> bool:
    """Whether a descriptor can be made of the rows of one head of ``x`` [B, S, N, D], and of all heads."""
    bytes_between = [stride * x.element_size() for stride in x.stride()[:-1]]
    apart = x.stride(1) > 0 and x.stride(2) > 0
    return x.data_ptr() % 16 == 0 and apart and not any(distance % 16 for distance in bytes_between)


def with_rows(x: Tensor) -> Tensor:
    """``x`` with its last dimension contiguous: a copy only where it is not so already."""
    return x if x.stride(-1) == 1 else x.contiguous()


def tensor_arguments(**tensors: Tensor) -> dict[str, Any]:
    """The kernels' arguments ``NAME_pointer``, ``NAME_batch``, ``NAME_row`` and ``NAME_head`` of [B, S, N, D]."""
    arguments: dict[str, Any] = {}
    for name, x in tensors.items():
        arguments[f"{name}_pointer"] = x
        arguments |= {f"{name}_{of}": x.stride(index) for index, of in enumerate(("batch", "row", "head"))}
    return arguments


def size_arguments(query_BSND: Tensor, key_BTKD: Tensor) -> dict[str, Any]:
    """The kernels' arguments that are numbers, and how fp32 is multiplied: as three products of its halves in TF32,
    which keep most of fp32's digits on tensor cores."""
    heads, head_size = query_BSND.shape[2:]
    return {
        "queries": query_BSND.shape[1],
        "keys": key_BTKD.shape[1],
        "heads": heads,
        "group": heads // key_BTKD.shape[2],
        "scale": head_size**-0.5 * LOG2_E,
        "HEAD": head_size,
        "WIDTH": padded_head(head_size),
        "PRECISION": "tf32x3" if query_BSND.dtype == torch.float32 else "tf32",
    }


def launch(kernel: Any, programs: int, tiles: Tiles, **arguments: Any) -> None:
    """Launch ``kernel``. The descriptors that it makes lie in memory that Triton asks for: of this launch alone."""
    context, device = copy_context(), arguments["query_pointer"].device
    if arguments["TMA"]:
        context.run(
            triton.set_allocator,
            lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device),
        )
    context.run(
        kernel[(programs,)],
        **arguments,
        BLOCK_M=tiles.queries,
        BLOCK_N=tiles.keys,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )


@triton.jit
def rows_at(pointer, rows, stride, HEAD: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, TMA: tl.constexpr):
    """Rows [rows, HEAD] from ``pointer`` on, for load_rows: a descriptor of its tiles, or the pointer itself."""
    if TMA:
        return tl.make_tensor_descriptor(pointer, [rows, HEAD], [stride, 1], [BLOCK, WIDTH])
    else:  # noqa: RET505 - in a kernel only what a constant chooses is compiled
        return pointer


@triton.jit
def load_rows(
    source,
    first,
    rows,
    stride,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    TMA: tl.constexpr,
    CHECKED: tl.constexpr,
):
    """Rows ``first`` on as [BLOCK, WIDTH], with zeros beyond ``rows`` (looked for if CHECKED) and beyond HEAD."""
    if TMA:
        return source.load([first, 0])
    else:  # noqa: RET505
        row = tl.arange(0, BLOCK)[:, None]
        column = tl.arange(0, WIDTH)[None, :]
        inside = column < HEAD
        if CHECKED:
            inside = inside & (first + row < rows)
        # The tile's first row may lie beyond 2^31 elements, its rows lie near one another.
        pointers = source + tl.cast(first, tl.int64) * stride + row * stride + column
        return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def heads_at(
    pointer,
    heads,
    rows,
    head_stride,
    row_stride,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    TMA: tl.constexpr,
):
    """Rows [heads, rows, HEAD] from ``pointer`` on, for load_head: one descriptor of the tiles of all heads, or it."""
    if TMA:
        return tl.make_tensor_descriptor(pointer, [heads, rows, HEAD], [head_stride, row_stride, 1], [1, BLOCK, WIDTH])
    else:  # noqa: RET505
        return pointer


@triton.jit
def load_head(
    source,
    head,
    first,
    rows,
    head_stride,
    row_stride,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    TMA: tl.constexpr,
):
    """Rows ``first`` on of ``head`` as [BLOCK, WIDTH], with zeros beyond ``rows`` and beyond HEAD."""
    if TMA:
        return source.load([head, first, 0]).reshape([BLOCK, WIDTH])
    else:  # noqa: RET505
        source += tl.cast(head, tl.int64) * head_stride
        return load_rows(source, first, rows, row_stride, HEAD, BLOCK, WIDTH, False, True)


@triton.jit
def store_rows(pointer, block, first, rows, stride, HEAD: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Write the rows of ``block`` below ``rows``, and its columns below HEAD."""
    row = tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    pointers = pointer + tl.cast(first, tl.int64) * stride + row * stride + column
    tl.store(pointers, block.to(pointer.dtype.element_ty), mask=(first + row < rows) & (column < HEAD))


@triton.jit
def key_bounds(
    starts_pointer, first, queries, keys, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DOCUMENTS: tl.constexpr
):
    """Of a tile of query rows: its first key, the end of the key tiles without a mask, and the end of its keys."""
    past = keys - queries
    begin = 0
    one_document = True
    if DOCUMENTS:
        begin = tl.load(starts_pointer + first)
        one_document = tl.load(starts_pointer + tl.minimum(first + BLOCK_M, queries) - 1) == begin
    whole = begin + (past + first + 1 - begin) // BLOCK_N * BLOCK_N
    return begin, tl.where(one_document, whole, begin), tl.minimum(past + first + BLOCK_M, keys)


def attention_case(
    name: str,
    kernel: Any,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    border: str,
    table: TileTable,
    kind: str,
    head: int,
    documents: bool,
    targets: tuple[str, ...],
) -> CompileCase:
    """A launch of a kernel of attention with ``inputs`` [B, S, N, D], as data; ``kind`` as in a :data:`TileTable`."""
    tiles = table[kind][padded_head(head)]
    tma, element = kind == "descriptors", "*fp32" if kind == "fp32" else "*bf16"
    strides = tuple(f"{each}_{of}" for each in inputs for of in ("batch", "row", "head"))
    sizes = ("queries", "keys", "heads", "group")
    backward = "gradient" in inputs
    rows = tiles.keys if border == "ends" else tiles.queries
    # A warp group multiplies 64 rows at least; tiles of fewer go to the older instruction.
    core = {"sm_80": TENSOR_CORE["sm_80"], "sm_90": TENSOR_CORE["sm_90" if rows >= 64 else "sm_80"]}
    fetch = TMA_LOAD if tma else VECTOR_LOAD
    return CompileCase(
        name=f"attention {name}, {kind}, head {head}" + (", documents" if documents else ""),
        kernel=kernel,
        arguments={f"{each}_pointer": element for each in (*inputs, *outputs)}
        | dict.fromkeys(strides + sizes, "i32")
        | {"scale": "fp32", "logsumexp_pointer": "*fp32"}
        | ({"delta_pointer": "*fp32", "padded": "i32"} if backward else {})
        | ({f"{border}_pointer": "*i32"} if documents else {}),
        constants={
            "HEAD": head,
            "WIDTH": padded_head(head),
            "BLOCK_M": tiles.queries,
            "BLOCK_N": tiles.keys,
            "DOCUMENTS": documents,
            "TMA": tma,
            "PRECISION": "tf32x3" if kind == "fp32" else "tf32",
        }
        | ({} if documents else {f"{border}_pointer": None}),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        divisible=(*strides, "queries", "keys", *(["padded"] if backward else [])),
        required={target: (instruction, fetch) for target, instruction in core.items()},
        targets=targets,
    )


CASES = (
    ("descriptors", 32, True, ("sm_90",)),
    ("descriptors", 64, True, ("sm_90",)),
    ("descriptors", 128, True, ("sm_90",)),
    ("descriptors", 128, False, ("sm_90",)),
    ("pointers", 32, True, ("sm_80",)),
    ("pointers", 64, True, ("sm_80",)),
    ("pointers", 128, True, TARGETS),
    ("pointers", 128, False, ("sm_80",)),
    ("fp32", 64, True, TARGETS),
    ("fp32", 128, True, ("sm_80",)),
)
"""Of what is launched (kind, head, documents, where) the heaviest: heads between two of these take the larger's tiles,
and tiles without documents are those with them, less a mask."""
