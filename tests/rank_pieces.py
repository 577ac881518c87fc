"""What the ranks of a layout hold of tensors, put together to the tensors: how tests compare layouts."""

from collections.abc import Iterable

import numpy as np
from torch import Tensor

Found = dict[str, np.ndarray]
Pieces = list[tuple[str, tuple[int, ...], tuple[int, ...], np.ndarray]]
"""What a rank holds: name of the tensor, its global shape, where this piece begins in it, and the piece."""


def pieces(named: Iterable[tuple[str, Tensor]]) -> Pieces:
    """What this rank holds of each tensor, as a checkpoint would be told."""
    found: Pieces = []
    for name, tensor in named:
        if not hasattr(tensor, "__create_chunk_list__"):
            found.append((name, tuple(tensor.shape), (0,) * tensor.dim(), tensor.detach().cpu().numpy().copy()))
            continue
        for offset, part in tensor.chunks():
            found.append((name, tuple(tensor.shape), tuple(offset), part.detach().cpu().numpy().copy()))
    return found


def together(by_rank: Iterable[Pieces]) -> Found:
    """The global tensors from what all ranks hold; ranks that hold the same must agree to the last bit."""
    whole: Found = {}
    filled: dict[str, np.ndarray] = {}
    for name, shape, offset, part in (piece for held in by_rank for piece in held):
        tensor = whole.setdefault(name, np.zeros(shape, dtype=part.dtype))
        known = filled.setdefault(name, np.zeros(shape, dtype=bool))
        box = tuple(slice(start, start + size) for start, size in zip(offset, part.shape, strict=True))
        assert np.array_equal(tensor[box][known[box]], part[known[box]]), f"{name}: the ranks have drifted apart"
        tensor[box], known[box] = part, True
    empty = [name for name, known in filled.items() if not known.all()]
    assert not empty, f"held by no rank: {empty}"
    return whole
