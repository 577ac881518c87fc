"""Where a rank's tensor lies in the global one it is a part of, under tensor parallelism. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Placement:
    """One rank's part of a parameter: piece ``piece`` of ``pieces`` equal ones along ``dimension``.

    ``copies`` ranks of the tensor-parallel group hold this very piece: all of them a norm's weight (one piece), and a
    few of them a key or value head where there are fewer heads than ranks. ``sums`` says that the gradient each of them
    computes is but a part, which their sum completes; where it is False and there are copies, each computes it whole.
    """

    dimension: int = 0
    pieces: int = 1
    piece: int = 0
    copies: int = 1
    sums: bool = False

    def part(self, whole: Tensor) -> Tensor:
        """This rank's part of the global tensor ``whole``, a view."""
        length = whole.shape[self.dimension] // self.pieces
        return whole.narrow(self.dimension, self.piece * length, length)

    def local_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of this rank's part of a tensor of ``shape``."""
        return tuple(size // self.pieces if place == self.dimension else size for place, size in enumerate(shape))

    def global_shape(self, local: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the tensor that a part of shape ``local`` is cut from."""
        return tuple(size * self.pieces if place == self.dimension else size for place, size in enumerate(local))

    def global_offsets(self, offsets: tuple[int, ...], local: tuple[int, ...]) -> tuple[int, ...]:
        """Where an element at ``offsets`` of this rank's part, of shape ``local``, lies in the global tensor."""
        return tuple(
            offset + self.piece * local[place] if place == self.dimension else offset
            for place, offset in enumerate(offsets)
        )


WHOLE = Placement()
"""The whole tensor, held by this rank alone."""
