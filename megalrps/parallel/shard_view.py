"""What one rank holds of a tensor of the whole model, as a checkpoint is told: a run of its elements, as boxes of it.

A rank's part of a parameter is a box of the global tensor (tensor parallelism), and what it keeps of that part's master
and moments is a run of the part's elements in row-major order (sharded optimizer): at most 2 D - 1 boxes for D
dimensions. torch.distributed.checkpoint's planners ask a tensor what it holds by the three dunder methods of torch's
torch/distributed/_checkpointable.py, and so never learn which layout there is.
"""

import math
from collections.abc import Iterator
from typing import Any, Self

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from megalrps.parallel.placement import Placement

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Where a box begins in each dimension, and how long it is there."""


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """The boxes that elements ``[start, stop)`` of a row-major tensor of ``shape`` fill, in the order of elements."""
    if start >= stop:
        return
    if len(shape) <= 1:
        yield (start,) * len(shape), (stop - start,) * len(shape)
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if start < first * row:
        yield from _in_row(shape, first - 1, start, min(stop, first * row))
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    if first <= last and last * row < stop:
        yield from _in_row(shape, last, last * row, stop)


def _in_row(shape: tuple[int, ...], index: int, start: int, stop: int) -> Iterator[Box]:
    before = index * math.prod(shape[1:])
    return (((index, *offsets), (1, *sizes)) for offsets, sizes in boxes(shape[1:], start - before, stop - before))


class ShardView(Tensor):
    """A tensor of the global shape of which this process holds a run, on live memory; no computation is done with it.

    ``run`` holds elements ``[start, start + run.numel())`` of this rank's part, of ``shape``, of a tensor that
    ``placement`` cuts.
    """

    _chunks: tuple[tuple[tuple[int, ...], Tensor], ...]

    @staticmethod
    def __new__(cls, run: Tensor, start: int, shape: tuple[int, ...], placement: Placement) -> Self:
        whole = placement.global_shape(shape)
        view: Self = Tensor._make_wrapper_subclass(cls, whole, dtype=run.dtype, device=run.device)
        return view

    def __init__(self, run: Tensor, start: int, shape: tuple[int, ...], placement: Placement) -> None:
        chunks, at = [], 0
        for offsets, sizes in boxes(tuple(shape), start, start + run.numel()):
            length = math.prod(sizes)
            chunks.append((placement.global_offsets(offsets, shape), run[at : at + length].view(sizes)))
            at += length
        self._chunks = tuple(chunks)

    def chunks(self) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """(where it begins in the global tensor, the box as a view of the live memory) of all that is held here."""
        return iter(self._chunks)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Nothing is computed: raises TypeError."""
        raise TypeError(f"{func}: a ShardView says what a rank holds; compute with its chunks")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        held = [(offsets, tuple(part.shape)) for offsets, part in self._chunks]
        return f"ShardView({tuple(self.shape)}, {self.dtype}, holds {held})"

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(offsets), part.shape) for offsets, part in self._chunks]

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        return [
            WriteItem(
                MetadataIndex(name, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, TensorProperties(dtype=self.dtype), self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return next(part for offsets, part in self._chunks if torch.Size(offsets) == index.offset)
