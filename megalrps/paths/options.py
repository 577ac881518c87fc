"""The options of a plan, by their flags, and what follows from them before any path is drawn."""

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from megalrps.errors import InputError
from megalrps.exact import LARGEST_PERIOD, exact_share
from megalrps.paths.plan import Increment
from megalrps.paths.schedules import DECAY_STYLES

DEFAULT_WARMUP_STEPS = 2000
"""The LRPS paper's warm-up (arXiv 2410.04103); shortened where the first version's main path is shorter."""


@dataclass(frozen=True)
class PlanOptions:
    """How versions are made: the paradigm, its geometry and its learning rates. Defaults as in arXiv 2410.04103."""

    paradigm: str = "lrps"
    """How each version is trained: ptfs (from scratch), cpt (continual pre-training) or lrps (path switching)."""

    alpha: tuple[float, ...] = (0.6,)
    """Steps of a branch as a fraction of its increment's, in (0, 1]: one for all versions, or one for each."""

    increment_steps: tuple[int, ...] = ()
    """Optimizer steps of each data increment, oldest first; one version is released for each."""

    replay: tuple[str, ...] = ()
    """Fraction of every batch drawn from all older increments, exact, in [0, 1): one for all, or one per increment."""

    lr: float = 3e-4
    """Maximal learning rate."""

    min_lr: float = 3e-5
    """Learning rate at the end of a complete decay."""

    lr_decay_style: str = "cosine"
    """cosine, knee, multi-step, linear, 1-sqrt, exponential, exponential-half, inverse-linear or constant."""

    lr_warmup_iters: int | None = None
    """Steps of linear warm-up from 0; unset: 2000, or half of the first version's main path where that is less."""

    branch_optimizer: Literal["carry", "reset"] = "carry"
    """What a branch of lrps does with the main path's optimizer state at the fork."""


def unknown_choice(flag: str, value: str, choices: Iterable[str]) -> InputError:
    """The error for a ``value`` of ``flag`` that is none of ``choices``; it names the nearest."""
    choices = list(choices)
    nearest = difflib.get_close_matches(value, choices, n=1)
    hint = f"did you mean {nearest[0]}? " if nearest else ""
    return InputError(f"{flag} {value} is unknown: {hint}It is one of {', '.join(choices)}")


def planned_increments(options: PlanOptions, names: tuple[str, ...] = ()) -> tuple[Increment, ...]:
    """The increments of ``--increment-steps``, called ``names`` or inc1, inc2, ...

    Raises InputError where there is none, or where names and steps differ in number.
    """
    steps = options.increment_steps
    if not steps:
        raise InputError("--increment-steps is required: the optimizer steps of each increment, e.g. 10000 10000 10000")
    if names and len(names) != len(steps):
        raise InputError(
            f"--increment-names has {len(names)} names for {len(steps)} --increment-steps: give one for each"
        )
    names = names or tuple(f"inc{i}" for i in range(1, len(steps) + 1))
    return tuple(Increment(name, count) for name, count in zip(names, steps, strict=True))


def check_options(increments: tuple[Increment, ...], options: PlanOptions) -> None:
    """Raise InputError, naming the flag, for increments and options that are wrong whatever the paradigm."""
    _check_increments(increments)
    _check_alpha(len(increments), options)
    replay_shares(len(increments), options)
    if options.lr_decay_style not in DECAY_STYLES:
        raise unknown_choice("--lr-decay-style", options.lr_decay_style, DECAY_STYLES)
    if options.branch_optimizer not in ("carry", "reset"):
        raise unknown_choice("--branch-optimizer", options.branch_optimizer, ("carry", "reset"))
    if not (math.isfinite(options.lr) and options.lr > 0.0):
        raise InputError(f"--lr {options.lr:g} must be a positive number")
    if not 0.0 <= options.min_lr <= options.lr:
        raise InputError(f"--min-lr {options.min_lr:g} must lie between 0 and --lr {options.lr:g}")
    if options.lr_warmup_iters is not None and options.lr_warmup_iters < 0:
        raise InputError(f"--lr-warmup-iters {options.lr_warmup_iters} must not be negative")


def _check_increments(increments: tuple[Increment, ...]) -> None:
    if not increments:
        raise InputError("--increment-steps is required: a plan needs at least one increment")
    names = [increment.name for increment in increments]
    for increment in increments:
        if increment.steps < 1:
            raise InputError(
                f"--increment-steps {increment.steps} of increment {increment.name} must be at least 1: "
                "the increment holds less than one batch of data"
            )
        if not increment.name or names.count(increment.name) > 1:
            raise InputError(f"--increment-names: {increment.name!r} must be a name of its own, one for each increment")


def _check_alpha(versions: int, options: PlanOptions) -> None:
    if len(options.alpha) != 1 and len(options.alpha) < versions:
        raise InputError(
            f"--alpha has {len(options.alpha)} values for {versions} versions: give one for all, or one for each"
        )
    for alpha in options.alpha:
        if not 0.0 < alpha <= 1.0:
            raise InputError(
                f"--alpha {alpha:g} must lie in (0, 1]: the fraction of an increment its branch decays over"
            )


def replay_shares(increments: int, options: PlanOptions) -> tuple[Fraction, ...]:
    """By increment, the fraction of its batches that is drawn from the older ones; none of the first one's.

    Raises InputError for a --replay that is no such fraction, or has not one value for all or one for each.
    """
    if not options.replay:
        return (Fraction(0),) * increments
    shares = tuple(_replay_share(text) for text in options.replay)
    if len(shares) == 1:
        return (Fraction(0), *shares * (increments - 1))
    if len(shares) < increments:
        raise InputError(
            f"--replay has {len(shares)} values for {increments} increments: give one for all, or one for each, the "
            "first of them 0"
        )
    if shares[0] != 0:
        raise InputError(
            f"--replay {options.replay[0]} of the first increment: it has no older ones to replay; give 0 for it"
        )
    return shares[:increments]  # values may be given ahead for increments to come


def _replay_share(text: str) -> Fraction:
    try:
        share = exact_share(text)
    except ValueError as error:
        raise InputError(f"--replay {error}") from None
    if not share < 1:
        raise InputError(f"--replay {text} must lie in [0, 1): the fraction of every batch that is replayed")
    if share.denominator > LARGEST_PERIOD:
        raise InputError(f"--replay {text}: a denominator beyond {LARGEST_PERIOD:,}; round it to at most 6 decimals")
    return share


def branch_steps(increments: tuple[Increment, ...], options: PlanOptions) -> tuple[int, ...]:
    """D_i = round(alpha_i * T_i), the fast-decaying steps of each version's branch.

    Raises InputError for an increment whose branch would hold no step.
    """
    alphas = options.alpha if len(options.alpha) > 1 else options.alpha * len(increments)
    lengths = []
    for increment, alpha in zip(increments, alphas, strict=False):  # alphas may be given ahead for increments to come
        length = round(alpha * increment.steps)
        if length < 1:
            raise InputError(
                f"increment {increment.name} of {increment.steps} steps is too short for its branch: "
                f"--alpha {alpha:g} leaves it no step; use a larger --alpha or a longer increment"
            )
        lengths.append(length)
    return tuple(lengths)


def warmup_steps(increments: tuple[Increment, ...], options: PlanOptions) -> int:
    """G, the steps of linear warm-up. The default depends on the first increment alone, so a plan can grow."""
    if options.lr_warmup_iters is not None:
        return options.lr_warmup_iters
    return min(DEFAULT_WARMUP_STEPS, (increments[0].steps - branch_steps(increments[:1], options)[0]) // 2)
