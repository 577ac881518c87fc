"""Paradigms: pure functions from increments and options to a plan. A new one is a function and a line in PARADIGMS.

Geometry, T_i being the steps of increment i: version i ends at E_i = T_1 + ... + T_i in every paradigm; its branch has
D_i = round(alpha_i * T_i) fast-decaying steps and forks at F_i = E_i - D_i. The LRPS paper (arXiv 2410.04103) states
alpha = 0.6 and a cost of 58 % for 4 versions; these forks give that cost, and every version a complete decay.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from types import MappingProxyType

from megalrps.errors import InputError
from megalrps.paths.curves import Curve, Piece
from megalrps.paths.options import (
    PlanOptions,
    branch_steps,
    check_options,
    replay_shares,
    unknown_choice,
    warmup_steps,
)
from megalrps.paths.plan import Fork, Increment, Leg, Path, Plan, Replay, Window
from megalrps.paths.schedules import decay_pieces, full_pieces, warmup_pieces

MAIN = "main"
"""Name of the path that is kept at the maximal learning rate."""


@dataclass(frozen=True)
class Paradigm:
    """A way of updating versions: what a reader calls it, and the pure function that plans it."""

    title: str
    plan: Callable[[tuple[Increment, ...], PlanOptions], Plan]


@dataclass(frozen=True)
class Version:
    """Version i in absolute steps: its increment over (start, end], and the fork from which its branch decays."""

    name: str
    fork: int
    end: int
    increment: Window

    @property
    def start(self) -> int:
        """E_(i-1): where its increment begins."""
        return self.increment.start


def versions_of(increments: tuple[Increment, ...], options: PlanOptions) -> tuple[Version, ...]:
    """The versions v1..vN with their forks F_i and ends E_i; InputError for an increment too short for its branch."""
    ends = accumulate(increment.steps for increment in increments)
    names = tuple(increment.name for increment in increments)
    shares = replay_shares(len(increments), options)
    versions = []
    for i, (end, decay) in enumerate(zip(ends, branch_steps(increments, options), strict=True)):
        replay = Replay(names[:i], str(shares[i])) if shares[i] else None
        window = Window(end - increments[i].steps, end, names[i : i + 1], replay)
        versions.append(Version(f"v{i + 1}", end - decay, end, window))
    return tuple(versions)


def ptfs(increments: tuple[Increment, ...], options: PlanOptions) -> Plan:
    """Pre-training from scratch: every version is trained anew, on all the data so far, over one full schedule."""
    if any(replay_shares(len(increments), options)):
        raise InputError(
            "--replay is not for --paradigm ptfs: every version draws from all increments up to its own already; "
            "leave it out"
        )
    warmup = warmup_steps(increments, options)
    names = tuple(increment.name for increment in increments)
    paths = [
        Path(
            name=version.name,
            parent=None,
            end=version.end,
            curve=Curve(full_pieces(options.lr_decay_style, 0, version.end, warmup, options.lr, options.min_lr)),
            windows=(Window(0, version.end, names[:i]),),
            release=version.name,
        )
        for i, version in enumerate(versions_of(increments, options), start=1)
    ]
    return Plan.of_legs("ptfs", increments, paths, [Leg(path.name, path.end, path.name) for path in paths])


def cpt(increments: tuple[Increment, ...], options: PlanOptions) -> Plan:
    """Continual pre-training: every version goes on from the last, on the new data alone, re-warmed from 0 to the
    maximal rate and over one more full schedule (arXiv 2308.04014).

    The default warm-up takes at most half of an increment; one that is asked for must fit them all.
    """
    warmup = warmup_steps(increments, options)
    chosen = options.lr_warmup_iters is not None
    paths: list[Path] = []
    curve = Curve(())
    for version in versions_of(increments, options):
        curve = curve.then(
            *full_pieces(
                options.lr_decay_style,
                version.start,
                version.end,
                warmup if chosen else min(warmup, (version.end - version.start) // 2),
                options.lr,
                options.min_lr,
            )
        )
        paths.append(
            Path(
                name=version.name,
                parent=Fork(paths[-1].name, version.start) if paths else None,
                end=version.end,
                curve=curve,
                windows=(version.increment,),
                release=version.name,
            )
        )
    return Plan.of_legs("cpt", increments, paths, [Leg(path.name, path.end, path.name) for path in paths])


def lrps(increments: tuple[Increment, ...], options: PlanOptions) -> Plan:
    """Learning rate path switching: one main path at the maximal rate; every version is a branch of it that forks at
    F_i and decays completely by E_i, after which the main path resumes at the fork (arXiv 2410.04103)."""
    versions = versions_of(increments, options)
    main_curve = _main_curve(versions[0], warmup_steps(increments, options), options.lr)
    last_fork = versions[-1].fork
    windows = tuple(version.increment for version in versions if version.start < last_fork)
    paths, legs = [Path(MAIN, None, last_fork, main_curve, windows, release=None)], []
    for version in versions:
        decay = decay_pieces(options.lr_decay_style, version.fork, version.end, options.lr, options.min_lr)
        paths.append(
            Path(
                name=version.name,
                parent=Fork(MAIN, version.fork),
                end=version.end,
                curve=main_curve.until(version.fork).then(*decay),
                windows=(version.increment,),
                release=version.name,
                carry_optimizer=options.branch_optimizer == "carry",
            )
        )
        legs += [Leg(MAIN, version.fork, version.name), Leg(version.name, version.end, version.name)]
    return Plan.of_legs("lrps", increments, paths, legs)


def _main_curve(first: Version, warmup: int, max_lr: float) -> Curve:
    """max_lr * min(1, t / warmup), for ever; the warm-up must be over when the first branch leaves."""
    if warmup > first.fork:
        raise InputError(
            f"--lr-warmup-iters {warmup} does not fit before the first fork at step {first.fork}: "
            f"use at most {first.fork}, a smaller first --alpha or a longer first increment"
        )
    return Curve((*warmup_pieces(0, warmup, max_lr), Piece(warmup, None, max_lr, max_lr, "constant")))


PARADIGMS: Mapping[str, Paradigm] = MappingProxyType(
    {
        "ptfs": Paradigm("pre-training from scratch", ptfs),
        "cpt": Paradigm("continual pre-training", cpt),
        "lrps": Paradigm("learning rate path switching", lrps),
    }
)


def build_plan(increments: tuple[Increment, ...], options: PlanOptions) -> Plan:
    """The plan of ``options.paradigm`` for ``increments``, oldest first. Pure; the plan of more increments extends
    it.

    Raises InputError, naming the flag and the mend, for increments and options that cannot be planned.
    """
    check_options(increments, options)
    if options.paradigm not in PARADIGMS:
        raise unknown_choice("--paradigm", options.paradigm, PARADIGMS)
    return PARADIGMS[options.paradigm].plan(increments, options)
