"""Decay styles by name: what a branch does with the learning rate, and what a run trained in one go does with it.

Formulas: warm-up and cosine as in arXiv 2410.04103, which compares cosine, Knee and multi-step;
Knee from arXiv 2003.03977; multi-step as in the DeepSeek models. The LRPS paper's own Knee fraction and multi-step
break points are not known to us: the 50 % and the 80/90 % used here are the customary ones, and that a branch runs
the style's decay part compressed into the branch's length is our reading.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from megalrps.errors import InputError
from megalrps.paths.curves import Piece

Decay = Callable[[int, int, float, float], tuple[Piece, ...]]
"""(start, end, maximal rate, minimal rate) -> the pieces of the decay over (start, end]."""


@dataclass(frozen=True)
class DecayStyle:
    """A decay, and how much of a full schedule's length (per cent, warm-up included) is over when it begins.

    ``hold_percent`` 0: the decay begins as soon as the warm-up is over.
    """

    decay: Decay
    hold_percent: int = 0
    needs_positive_minimum: bool = False


def _single(shape: str) -> Decay:
    """The decay that is one piece of ``shape``."""
    return lambda start, end, max_lr, min_lr: (Piece(start, end, max_lr, min_lr, shape),)


def _hold(start: int, end: int, max_lr: float, min_lr: float) -> tuple[Piece, ...]:
    """No decay: the maximal rate throughout (an ablation; the minimal rate has no part in it)."""
    return _constant_pieces((start, end, max_lr))


def _multi_step(start: int, end: int, max_lr: float, min_lr: float) -> tuple[Piece, ...]:
    """Two equal drops in ratio, half of the decay's length each: 80 % and 90 % of a full schedule, mapped onto the
    decay."""
    middle = start + (end - start) // 2
    return _constant_pieces((start, middle, math.sqrt(max_lr * min_lr)), (middle, end, min_lr))


def _constant_pieces(*spans: tuple[int, int, float]) -> tuple[Piece, ...]:
    """Constant pieces over those of the spans (start, end, rate) that hold a step."""
    return tuple(Piece(start, end, lr, lr, "constant") for start, end, lr in spans if end > start)


DECAY_STYLES: Mapping[str, DecayStyle] = MappingProxyType(
    {
        "cosine": DecayStyle(_single("cosine")),
        "knee": DecayStyle(_single("linear"), hold_percent=50),
        "multi-step": DecayStyle(_multi_step, hold_percent=80, needs_positive_minimum=True),
        "linear": DecayStyle(_single("linear")),
        "1-sqrt": DecayStyle(_single("1-sqrt")),
        "exponential": DecayStyle(_single("exponential"), needs_positive_minimum=True),
        "exponential-half": DecayStyle(_single("exponential-half")),
        "inverse-linear": DecayStyle(_single("inverse-linear"), needs_positive_minimum=True),
        "constant": DecayStyle(_hold),
    }
)


def warmup_pieces(start: int, warmup_steps: int, max_lr: float) -> tuple[Piece, ...]:
    """The linear warm-up from 0 to ``max_lr`` over ``warmup_steps`` updates after ``start``; none for 0 steps."""
    return (Piece(start, start + warmup_steps, 0.0, max_lr, "linear"),) if warmup_steps else ()


def decay_pieces(style: str, start: int, end: int, max_lr: float, min_lr: float) -> tuple[Piece, ...]:
    """The decay part of ``style`` over (start, end], from ``max_lr`` at ``start`` to ``min_lr`` at ``end``: a branch.

    Raises InputError where the style cannot reach a minimal rate of zero.
    """
    if min_lr == 0.0 and DECAY_STYLES[style].needs_positive_minimum:
        raise InputError(f"--min-lr 0 cannot be reached by --lr-decay-style {style}: give a positive --min-lr")
    return DECAY_STYLES[style].decay(start, end, max_lr, min_lr)


def full_pieces(style: str, start: int, end: int, warmup_steps: int, max_lr: float, min_lr: float) -> tuple[Piece, ...]:
    """The whole schedule on (start, end]: warm-up from 0, the plateau if ``style`` has one, the complete decay.

    Raises InputError where the warm-up leaves no step for the decay or reaches into it.
    """
    length = end - start
    plateau = length * DECAY_STYLES[style].hold_percent // 100
    most = plateau if DECAY_STYLES[style].hold_percent else length - 1
    if warmup_steps > most:
        raise InputError(
            f"--lr-warmup-iters {warmup_steps} does not fit into the {length} steps ({start}, {end}] of a "
            f"{style} schedule: use at most {most}, or a longer increment"
        )
    decay_start = start + max(plateau, warmup_steps)
    return (
        *warmup_pieces(start, warmup_steps, max_lr),
        *_constant_pieces((start + warmup_steps, decay_start, max_lr)),
        *decay_pieces(style, decay_start, end, max_lr, min_lr),
    )
