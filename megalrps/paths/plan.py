"""The plan: a small tree of paths, and the order in which its segments are trained.

A plan is data. It is built by a paradigm (``paradigms.py``), stored in ``plan.json``, and executed by ``training/``,
which knows nothing of paradigms. Steps are absolute: updates done since step 0 of the trajectory, what is inherited
included.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from typing import Any, Self

from megalrps.errors import EXIT_UNKNOWN_FORMAT, InputError
from megalrps.fingerprint import fingerprint
from megalrps.paths.curves import Curve

FORMAT_VERSION = 1
"""Of the JSON form; a plan of another format version is refused."""


class LaterPlanError(InputError):
    """A plan that a later version of ours has written."""

    exit_status = EXIT_UNKNOWN_FORMAT


@dataclass(frozen=True)
class Increment:
    """The data that arrived for one version, measured in optimizer steps."""

    name: str
    steps: int


@dataclass(frozen=True)
class Fork:
    """The state of ``path`` at ``step``, from which another path sets out. Step 0 of a path without a parent is its
    random initialisation."""

    path: str
    step: int


@dataclass(frozen=True)
class Replay:
    """The part of a window's samples that is drawn from the union of older increments, beside the window's own."""

    increments: tuple[str, ...]
    fraction: str
    """Of every prefix of the samples, to less than one: exact, in lowest terms, as ``1/20``."""

    @property
    def share(self) -> Fraction:
        """``fraction`` as a number."""
        return Fraction(self.fraction)


@dataclass(frozen=True)
class Window:
    """Steps start < t <= end draw their samples from the union of these increments, and from older ones by ``replay``.

    Sample k of update t has the index (t - 1 - start) * global_batch_size + k in that stream, whichever path asks: two
    paths that hold the same window see the same samples at the same steps. A window may begin before its path does.
    """

    start: int
    end: int
    increments: tuple[str, ...]
    replay: Replay | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields by name, as JSON values; ``replay`` only where there is one, as windows had none at first."""
        fields: dict[str, Any] = {"start": self.start, "end": self.end, "increments": list(self.increments)}
        if self.replay is not None:
            fields["replay"] = {"increments": list(self.replay.increments), "fraction": self.replay.fraction}
        return fields

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_json`; KeyError, TypeError or ValueError for what is no window."""
        replay = fields.get("replay")
        return cls(
            fields["start"],
            fields["end"],
            tuple(fields["increments"]),
            Replay(tuple(replay["increments"]), replay["fraction"]) if replay is not None else None,
        )


@dataclass(frozen=True)
class Path:
    """One training trajectory: where it starts, its learning rates, its data, where it ends, what it releases.

    ``parent`` None means random initialisation at step 0. ``curve`` and the steps cover the whole trajectory from
    step 0. ``carry_optimizer`` says whether the optimizer state of the parent is kept at the fork.
    """

    name: str
    parent: Fork | None
    end: int
    curve: Curve
    windows: tuple[Window, ...]
    release: str | None
    carry_optimizer: bool = True

    @property
    def start(self) -> int:
        """The step this path sets out from; its first update is the one after it."""
        return self.parent.step if self.parent else 0


@dataclass(frozen=True)
class Segment:
    """The updates start < t <= end of one path, trained in one go on the way to ``version``.

    ``kind`` says what its last state is for: "fork" (a path leaves from it), "release" (it is a version), or "end".
    """

    path: str
    start: int
    end: int
    kind: str
    version: str

    @property
    def steps(self) -> int:
        """Number of updates."""
        return self.end - self.start


@dataclass(frozen=True)
class Leg:
    """An order to a plan under construction: train ``path`` up to step ``end``, on the way to ``version``."""

    path: str
    end: int
    version: str


@dataclass(frozen=True)
class Plan:
    """A paradigm's answer to a list of increments. Pure: the same increments and options give the same plan."""

    paradigm: str
    increments: tuple[Increment, ...]
    paths: tuple[Path, ...]
    segments: tuple[Segment, ...]

    @classmethod
    def of_legs(
        cls, paradigm: str, increments: Iterable[Increment], paths: Iterable[Path], legs: Iterable[Leg]
    ) -> Self:
        """The checked plan that trains ``paths`` in the order of ``legs``; a leg that adds no step is left out."""
        paths = tuple(paths)
        by_name = {path.name: path for path in paths}
        reached = {path.name: path.start for path in paths}
        segments = []
        for leg in legs:
            if leg.end > reached[leg.path]:
                kind = _kind(by_name[leg.path], leg.end, paths)
                segments.append(Segment(leg.path, reached[leg.path], leg.end, kind, leg.version))
                reached[leg.path] = leg.end
        plan = cls(paradigm, tuple(increments), paths, tuple(segments))
        plan.check()
        return plan

    @cached_property
    def _by_name(self) -> Mapping[str, Path]:
        return {path.name: path for path in self.paths}

    def path(self, name: str) -> Path:
        """The path called ``name``; KeyError where there is none."""
        return self._by_name[name]

    @property
    def releases(self) -> tuple[Path, ...]:
        """The paths that release a version, in the order of their releases."""
        return tuple(path for path in self.paths if path.release)

    @property
    def branches(self) -> tuple[Path, ...]:
        """The paths that leave a main path, one that releases nothing itself, at a fork; none in PTFS and CPT."""
        return tuple(path for path in self.paths if path.parent and self.path(path.parent.path).release is None)

    def window_at(self, path: str, step: int) -> Window:
        """The window that update ``step`` of the trajectory of ``path`` draws from; an inherited step asks the
        parent.

        Raises ValueError for a step the trajectory does not have.
        """
        asked = self.path(path)
        if asked.parent and step <= asked.start:
            return self.window_at(asked.parent.path, step)
        for window in asked.windows:
            if window.start < step <= window.end and step <= asked.end:
                return window
        raise ValueError(f"path {path} has no update {step}: it trains steps ({asked.start}, {asked.end}]")

    def source(self, segment: Segment) -> Fork | None:
        """The trained state that ``segment`` starts from; None: the random initialisation."""
        path = self.path(segment.path)
        state = path.parent if segment.start == path.start else Fork(path.name, segment.start)
        return state if state and state.step > 0 else None

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything the plan says."""
        return fingerprint(self._body())

    def segment_fingerprint(self, segment: Segment) -> str:
        """SHA-256 of all that the plan knows to decide the segment's result, and of nothing else.

        That is its path's name, start, end, learning rates up to its end, data windows and treatment of the optimizer
        state, and the same of the segment it starts from. It therefore does not change when later increments arrive,
        and does change when anything before it does.
        """
        return self._segment_fingerprints[segment]

    @cached_property
    def _segment_fingerprints(self) -> Mapping[Segment, str]:
        made_by: dict[Fork, str] = {}
        fingerprints: dict[Segment, str] = {}
        for segment in self.segments:
            path, source = self.path(segment.path), self.source(segment)
            made_by[Fork(segment.path, segment.end)] = fingerprints[segment] = fingerprint(
                {
                    "path": path.name,
                    "parent": asdict(path.parent) if path.parent else None,
                    "start": segment.start,
                    "end": segment.end,
                    "curve": path.curve.until(segment.end).to_json(),
                    "windows": [w.to_json() for w in path.windows if w.start < segment.end and w.end > segment.start],
                    "carry_optimizer": path.carry_optimizer,
                    "source": made_by[source] if source else None,
                }
            )
        return fingerprints

    def _body(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "paradigm": self.paradigm,
            "increments": [asdict(increment) for increment in self.increments],
            "paths": [_path_to_json(path) for path in self.paths],
            "segments": [asdict(segment) for segment in self.segments],
        }

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values, its fingerprint among them; floats survive exactly."""
        return {**self._body(), "fingerprint": self.fingerprint}

    @classmethod
    def from_json(cls, value: Any, source: str = "plan.json") -> Self:
        """The inverse of :meth:`to_json`, for a plan read from the file ``source``.

        Raises InputError where the value is of another format version (LaterPlanError: of a later one), was changed
        since it was written, or is no plan.
        """
        if not isinstance(value, dict) or value.get("format_version") != FORMAT_VERSION:
            found = value.get("format_version") if isinstance(value, dict) else None
            later = type(found) is int and found > FORMAT_VERSION
            raise (LaterPlanError if later else InputError)(
                f"{source} is not a plan of format version {FORMAT_VERSION} (it says {found}): "
                "read it with the megalrps that wrote it, or plan again"
            )
        body = {key: field for key, field in value.items() if key != "fingerprint"}
        if fingerprint(body) != value.get("fingerprint"):
            raise InputError(f"{source} was changed since it was written (fingerprint differs): plan again instead")
        try:
            plan = cls(
                value["paradigm"],
                tuple(Increment(**fields) for fields in value["increments"]),
                tuple(_path_from_json(fields) for fields in value["paths"]),
                tuple(Segment(**fields) for fields in value["segments"]),
            )
            plan.check()
            _require(plan.fingerprint == value["fingerprint"], "it has fields that no plan has")
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise InputError(f"{source} holds no valid plan ({error}): plan again") from error
        return plan

    def check(self) -> None:
        """Raise ValueError for a plan that cannot be trained as it stands."""
        _check_names(self)
        earlier: dict[str, Path] = {}
        for path in self.paths:
            _check_start(path, earlier)
            _check_course(self, path)
            earlier[path.name] = path
        _check_order(self)


def _path_to_json(path: Path) -> dict[str, Any]:
    return {
        "name": path.name,
        "parent": asdict(path.parent) if path.parent else None,
        "end": path.end,
        "curve": path.curve.to_json(),
        "windows": [window.to_json() for window in path.windows],
        "release": path.release,
        "carry_optimizer": path.carry_optimizer,
    }


def _path_from_json(fields: dict[str, Any]) -> Path:
    parent = fields["parent"]
    read = {
        "parent": Fork(**parent) if parent else None,
        "curve": Curve.from_json(fields["curve"]),
        "windows": tuple(Window.from_json(window) for window in fields["windows"]),
    }
    return Path(**{**fields, **read})


def _kind(path: Path, end: int, paths: tuple[Path, ...]) -> str:
    """What the state of ``path`` at step ``end`` is for."""
    if path.release and end == path.end:
        return "release"
    return "fork" if any(other.parent == Fork(path.name, end) for other in paths) else "end"


def _require(condition: bool, complaint: str) -> None:
    if not condition:
        raise ValueError(complaint)


def _check_names(plan: Plan) -> None:
    for what, names in (
        ("increment", [increment.name for increment in plan.increments]),
        ("path", [path.name for path in plan.paths]),
        ("release", [path.release for path in plan.releases]),
    ):
        _require(len(set(names)) == len(names), f"two of a kind among the {what} names {names}")
    _require(all(increment.steps > 0 for increment in plan.increments), "an increment without a step")


def _check_start(path: Path, earlier: Mapping[str, Path]) -> None:
    """The path leaves a path planned before it, at a step that one has, with its learning rates so far."""
    _require(path.end >= path.start >= 0, f"path {path.name} ends before it starts")
    if path.parent:
        parent = earlier.get(path.parent.path)
        if parent is None:
            raise ValueError(f"path {path.name} leaves {path.parent.path}, which is not planned before it")
        _require(path.start <= parent.end, f"path {path.name} leaves {parent.name} after its end")
        inherited = path.curve.until(path.start) == parent.curve.until(path.start)
        _require(inherited, f"path {path.name} does not keep its parent's learning rates up to step {path.start}")


def _check_course(plan: Plan, path: Path) -> None:
    """The path has a learning rate and a window of known increments for every step."""
    _require(path.curve.start == 0, f"the curve of path {path.name} does not begin at step 0")
    _require(path.curve.end in (None, path.end), f"the curve of path {path.name} does not end with it")
    windows = path.windows
    covered = windows[0].start <= path.start and windows[-1].end >= path.end if windows else path.end == path.start
    contiguous = all(before.end == after.start for before, after in pairwise(windows))
    _require(covered and contiguous, f"the windows of path {path.name} do not cover its steps")
    known = {increment.name for increment in plan.increments}
    drawn = all(window.increments and known.issuperset(window.increments) for window in windows)
    _require(drawn, f"path {path.name} draws from increments that the plan does not have")
    for window in windows:
        if window.replay is not None:
            older, share = window.replay.increments, window.replay.share
            replayed = older and known.issuperset(older) and not set(older) & set(window.increments)
            _require(bool(replayed), f"path {path.name} replays increments that are not other ones of the plan")
            exact = 0 < share < 1 and window.replay.fraction == str(share)
            _require(exact, f"path {path.name} replays {window.replay.fraction!r}, no fraction in lowest terms")


def _check_order(plan: Plan) -> None:
    """Every path is trained whole, without a gap, and no segment starts from a state that does not exist yet."""
    reached = {path.name: path.start for path in plan.paths}
    states: set[Fork] = set()
    for segment in plan.segments:
        _require(segment.path in reached, f"a segment of the unknown path {segment.path}")
        path, source = plan.path(segment.path), plan.source(segment)
        where = f"segment {path.name} ({segment.start}, {segment.end}]"
        _require(segment.start == reached[path.name] < segment.end <= path.end, f"{where} leaves a gap or an overlap")
        _require(source is None or source in states, f"{where} starts from a state that was not trained before it")
        _require(segment.kind == _kind(path, segment.end, plan.paths), f"{where} cannot be of kind {segment.kind}")
        released = segment.kind != "release" or segment.version == path.release
        _require(released, f"{where} releases {path.release}, not {segment.version}")
        reached[path.name] = segment.end
        states.add(Fork(path.name, segment.end))
    _require(all(reached[path.name] == path.end for path in plan.paths), "a path is not trained to its end")
