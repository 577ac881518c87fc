"""Learning-rate curves: pure functions of the absolute step, made of pieces that can be printed, compared and stored.

Update number t (t = 1, 2, ...) of a path uses ``curve(t)``; the state "at step t" is the one after update t. A piece
over (start, end] therefore gives its first rate *after* ``start`` and reaches ``end_lr`` exactly at ``end``.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from types import MappingProxyType
from typing import Any, Self

Shape = Callable[[float, float, float], float]
"""(progress x in [0, 1], rate at x = 0, rate at x = 1) -> rate."""


def _constant(x: float, start_lr: float, end_lr: float) -> float:
    return start_lr


def _linear(x: float, start_lr: float, end_lr: float) -> float:
    return start_lr + (end_lr - start_lr) * x


def _cosine(x: float, start_lr: float, end_lr: float) -> float:
    return end_lr + (start_lr - end_lr) * 0.5 * (1.0 + math.cos(math.pi * x))


def _one_minus_sqrt(x: float, start_lr: float, end_lr: float) -> float:
    """The cooldown of Haegele et al., arXiv 2405.18392."""
    return end_lr + (start_lr - end_lr) * (1.0 - math.sqrt(x))


def _exponential(x: float, start_lr: float, end_lr: float) -> float:
    """Geometric from one rate to the other, the decay of MiniCPM's WSD (arXiv 2404.06395) with the ratio given."""
    return float(start_lr * (end_lr / start_lr) ** x)


def _exponential_half(x: float, start_lr: float, end_lr: float) -> float:
    """Megatron-LM's WSD "exponential": 2 * 0.5^x - 1 falls from 1 to 0, so an end rate of zero is reached."""
    return float(end_lr + (start_lr - end_lr) * (2.0 * 0.5**x - 1.0))


def _inverse_linear(x: float, start_lr: float, end_lr: float) -> float:
    """Linear in 1/rate, the decay of WSD-S (arXiv 2410.05192)."""
    return 1.0 / (x / end_lr + (1.0 - x) / start_lr)


SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        "constant": _constant,
        "linear": _linear,
        "cosine": _cosine,
        "1-sqrt": _one_minus_sqrt,
        "exponential": _exponential,
        "exponential-half": _exponential_half,
        "inverse-linear": _inverse_linear,
    }
)
POSITIVE_SHAPES = frozenset({"exponential", "inverse-linear"})
"""Shapes that divide by their rates and so cannot start or end at zero."""


@dataclass(frozen=True)
class Piece:
    """One shape over the steps start < t <= end; ``end`` None means for ever, for a constant only.

    ``cut`` is the last step for which the piece is used when a path leaves it before its end: the shape still aims at
    ``end``, so that the steps before the cut keep their exact rates.
    """

    start: int
    end: int | None
    start_lr: float
    end_lr: float
    shape: str
    cut: int | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for a piece that is no function of the step."""
        if self.shape not in SHAPES:
            raise ValueError(f"unknown shape {self.shape!r}: one of {', '.join(SHAPES)}")
        if self.start < 0 or (self.end is not None and self.end <= self.start):
            raise ValueError(f"a piece over steps ({self.start}, {self.end}] holds no step")
        if not all(math.isfinite(lr) and lr >= 0.0 for lr in (self.start_lr, self.end_lr)):
            raise ValueError(f"learning rates {self.start_lr} -> {self.end_lr} must be finite and not negative")
        if self.shape == "constant" and self.start_lr != self.end_lr:
            raise ValueError(f"a constant piece cannot go from {self.start_lr} to {self.end_lr}")
        if self.shape != "constant" and self.end is None:
            raise ValueError(f"a {self.shape} piece needs an end")
        if self.shape in POSITIVE_SHAPES and min(self.start_lr, self.end_lr) == 0.0:
            raise ValueError(f"a {self.shape} piece cannot start or end at a learning rate of zero")
        if self.cut is not None and (self.shape == "constant" or not self.start < self.cut < (self.end or 0)):
            raise ValueError(f"a {self.shape} piece over ({self.start}, {self.end}] cannot be cut at step {self.cut}")

    @property
    def last(self) -> int | None:
        """The last step this piece gives a rate for; None: no last step."""
        return self.end if self.cut is None else self.cut

    def __call__(self, step: int) -> float:
        """The learning rate of update ``step``; exactly ``start_lr`` at ``start`` and ``end_lr`` at ``end``."""
        if step == self.start:
            return self.start_lr
        if self.end is None or step == self.end:
            return self.end_lr
        return SHAPES[self.shape]((step - self.start) / (self.end - self.start), self.start_lr, self.end_lr)

    def until(self, step: int) -> Self:
        """The same rates up to ``step`` (start < step) and none after; a constant loses its old end altogether."""
        if self.last is not None and step >= self.last:
            return self
        return replace(self, end=step) if self.shape == "constant" else replace(self, cut=step)

    def to_json(self) -> dict[str, Any]:
        """The fields by name; ``cut`` only where there is one."""
        fields: dict[str, Any] = {
            "start": self.start,
            "end": self.end,
            "start_lr": float(self.start_lr),
            "end_lr": float(self.end_lr),
            "shape": self.shape,
        }
        return fields if self.cut is None else {**fields, "cut": self.cut}


@dataclass(frozen=True)
class Curve:
    """The learning rate of a whole trajectory from step 0: pieces that follow one another without a gap.

    A branch's curve is its parent's up to the fork and its own decay after it, so the history of a released version
    is one object. Rates may jump from one piece to the next (re-warming, multi-step).
    """

    pieces: tuple[Piece, ...]

    def __post_init__(self) -> None:
        """Raise ValueError where two neighbours leave a gap or overlap."""
        for before, after in pairwise(self.pieces):
            if before.last != after.start:
                raise ValueError(
                    f"a piece that ends at step {before.last} cannot be followed by one from {after.start}"
                )

    @property
    def start(self) -> int:
        """The step before the first update; 0 for an empty curve."""
        return self.pieces[0].start if self.pieces else 0

    @property
    def end(self) -> int | None:
        """The last step with a rate; None: the curve goes on for ever."""
        return self.pieces[-1].last if self.pieces else 0

    def __call__(self, step: int) -> float:
        """The learning rate of update ``step``; at the curve's start, the rate it sets out from (used by no update).

        Raises ValueError for a step outside [start, end].
        """
        if step >= self.start:
            for piece in self.pieces:
                if piece.last is None or step <= piece.last:
                    return piece(step)
        raise ValueError(f"no learning rate at step {step}: the curve covers steps {self.start} to {self.end}")

    def until(self, step: int) -> "Curve":
        """The curve of a path that stops at ``step``: equal to this one at every step up to it, undefined after
        it."""
        if self.end is not None and step > self.end:
            raise ValueError(f"a curve that ends at step {self.end} has no part until step {step}")
        return Curve(tuple(piece.until(step) for piece in self.pieces if piece.start < step))

    def then(self, *pieces: Piece) -> "Curve":
        """This curve continued by ``pieces``; the first of them starts where this curve ends."""
        return Curve(self.pieces + pieces)

    def to_json(self) -> list[dict[str, Any]]:
        """The pieces in order, as JSON values."""
        return [piece.to_json() for piece in self.pieces]

    @classmethod
    def from_json(cls, value: list[dict[str, Any]]) -> Self:
        """The inverse of :meth:`to_json`; raises TypeError or ValueError for anything else."""
        return cls(tuple(Piece(**fields) for fields in value))
