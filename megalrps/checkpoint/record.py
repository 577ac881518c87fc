"""The record of a checkpoint: what training says of the state it saved, in the terms of the plan. Imports no torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from megalrps.checkpoint.errors import UnknownFormatError

RECORD_VERSION = 2

KINDS = ("periodic", "fork", "release", "end")
"""periodic: within a segment. The others end one: fork, a branch starts here; release, a model ships; end, neither."""


@dataclass(frozen=True)
class CheckpointRecord:
    """Where a checkpoint stands in the lineage, and all that its training depended on."""

    path: str
    """Name of the path that was being trained."""
    version: str
    """The version the segment works for."""
    kind: str
    """One of KINDS."""
    step: int
    """Updates done, counted from step 0 of the trajectory, what was inherited from the parent included."""
    parent: str | None
    """The checkpoint the *segment* began from (never a periodic one: pruning breaks no chain); None: random weights."""
    segment_fingerprint: str
    """Plan.segment_fingerprint of the segment: equal fingerprints, equal results."""
    curve_fingerprint: str
    """Of the learning-rate curve up to the end of the segment."""
    plan_fingerprint: str
    """Of the whole plan at the time."""
    samples: Mapping[str, int]
    """Samples consumed so far along the trajectory, by increment."""
    tokens: int
    """Tokens consumed so far along the trajectory."""
    train_seconds: float
    """Seconds of training along the trajectory, saving and evaluation not counted."""
    config: Mapping[str, Any]
    """The resolved configuration, as JSON."""
    data: Mapping[str, str]
    """Content fingerprints of the data, by increment."""
    layout: Mapping[str, int] = field(default_factory=dict)
    """Ranks by dimension (``tp``, ``pp``, ``cp``, ``dp``) of the launch that saved it; any layout loads it."""
    random: Mapping[str, Any] = field(default_factory=dict)
    """The random state: seeds alone, where nothing draws after the initialisation but what is keyed by them."""
    allowed: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By option: what was changed in the lineage before this was trained, and changes the result (``was``, ``is``), the
    ``reason``, and the ``earlier`` changes of the same."""
    skipped: int = 0
    """Updates along the trajectory that were left out because a loss or gradient was no number."""
    skipped_in_a_row: int = 0
    """Of these the last ones, with no update between or after them."""
    recent_losses: tuple[float, ...] = ()
    """The last losses of the trajectory, oldest first, that the detector of spikes compares the next one with."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind {self.kind!r} is none of {KINDS}")
        if self.step < 1:
            raise ValueError(f"step {self.step} is before the first update")

    @property
    def permanent(self) -> bool:
        """Whether the checkpoint ends a segment: then it is never pruned."""
        return self.kind != "periodic"

    def to_json(self) -> dict[str, Any]:
        """The JSON object a manifest carries as its ``record``."""
        return {"record_version": RECORD_VERSION} | asdict(self) | {"recent_losses": list(self.recent_losses)}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "CheckpointRecord":
        """The record back; ValueError for a missing, unknown or mistyped field, UnknownFormatError for a later version.

        Version 1 had not the fields of _SINCE_2.
        """
        version = value.get("record_version")
        if type(version) is int and version > RECORD_VERSION:
            raise UnknownFormatError(
                f"record version {version}, this version reads {RECORD_VERSION}: use the megalrps that wrote it"
            )
        if version not in (1, RECORD_VERSION):
            raise ValueError(f"record version {version!r} is not {RECORD_VERSION}")
        types = {name: kinds for name, kinds in _TYPES.items() if version == RECORD_VERSION or name not in _SINCE_2}
        members = {key: member for key, member in value.items() if key != "record_version"}
        if members.keys() != types.keys():
            raise ValueError(f"the record's fields differ in {sorted(members.keys() ^ types.keys())}")
        for name, kinds in types.items():
            if type(members[name]) not in kinds:
                raise ValueError(f"the record's {name} is a {type(members[name]).__name__}")
        if version == RECORD_VERSION:
            members["recent_losses"] = tuple(members["recent_losses"])
        return CheckpointRecord(**members)


_TEXT, _COUNT, _OBJECT = (str,), (int,), (dict,)
_TYPES: Mapping[str, tuple[type, ...]] = {
    "path": _TEXT,
    "version": _TEXT,
    "kind": _TEXT,
    "step": _COUNT,
    "parent": (str, type(None)),
    "segment_fingerprint": _TEXT,
    "curve_fingerprint": _TEXT,
    "plan_fingerprint": _TEXT,
    "samples": _OBJECT,
    "tokens": _COUNT,
    "train_seconds": (int, float),
    "config": _OBJECT,
    "data": _OBJECT,
    "layout": _OBJECT,
    "random": _OBJECT,
    "allowed": _OBJECT,
    "skipped": _COUNT,
    "skipped_in_a_row": _COUNT,
    "recent_losses": (list,),
}
_SINCE_2 = frozenset({"layout", "random", "allowed", "skipped", "skipped_in_a_row", "recent_losses"})
