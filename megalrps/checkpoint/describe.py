"""What a person or a script asks of a lineage, as JSON values. Imports no torch."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from megalrps.checkpoint.garbage import bytes_of
from megalrps.checkpoint.leases import Leases, is_over
from megalrps.checkpoint.lineage import Lineage
from megalrps.checkpoint.manifest import read_manifest
from megalrps.checkpoint.names import REFUSED, hidden_directories, state_of_hidden
from megalrps.checkpoint.references import Reference, References


def describe_lineage(checkpoints: Path, lineage: Lineage, references: References) -> dict[str, Any]:
    """The checkpoints in the order of training, what refers to them, who trains, and what cannot be used.

    Raises as :meth:`megalrps.checkpoint.leases.Leases.all`.
    """
    found = references.readable()
    return {
        "checkpoints": [
            {
                "name": name,
                "path": record.path,
                "version": record.version,
                "kind": record.kind,
                "step": record.step,
                "tokens": record.tokens,
                "parent": record.parent,
                "references": [reference.title for reference in found if reference.checkpoint == name],
            }
            for name, record in ((name, lineage.records[name]) for name in lineage.all())
        ],
        "references": [asdict(reference) for reference in found],
        "leases": [
            {"path": lease.path, "holder": lease.holder, "is_over": is_over(lease), "fence": lease.fence}
            | {"reads": list(lease.reads)}
            for lease in Leases(references).held()
        ],
        "refused": dict(lineage.refused),
        "damaged_references": list(references.damaged()),
        "set_aside": [str(place) for place in set_aside(checkpoints)],
    }


def describe_checkpoint(
    checkpoints: Path, lineage: Lineage, references: tuple[Reference, ...], name: str
) -> dict[str, Any]:
    """All that is known of one checkpoint: its record, its manifest's head, its ancestors and what refers to it.

    Raises as :func:`megalrps.checkpoint.manifest.read_manifest`, and KeyError where that is whole and ``lineage`` has
    no such record.
    """
    manifest, record = read_manifest(checkpoints / name), lineage.records[name]
    parents = [*lineage.ancestors(name)]
    return {
        "name": name,
        "path": record.path,
        "version": record.version,
        "kind": record.kind,
        "step": record.step,
        "tokens": record.tokens,
        "samples": dict(record.samples),
        "train_seconds": record.train_seconds,
        "skipped": record.skipped,
        "created": manifest.created,
        "parents": parents,
        "missing_parent": lineage.orphans().get(parents[-1] if parents else name),
        "references": [
            {"title": reference.title, "moved": reference.moved, "note": reference.note}
            for reference in references
            if reference.checkpoint == name
        ],
        "digest": manifest.digest,
        "bytes": bytes_of(checkpoints / name),
        "files": len(manifest.shards) + 1,
        "tensors": len(manifest.tensors),
        "layout": dict(record.layout),
        "versions": dict(manifest.versions),
        "random": dict(record.random),
        "allowed": {option: dict(change) for option, change in record.allowed.items()},
        "data": dict(record.data),
        "segment_fingerprint": record.segment_fingerprint,
        "curve_fingerprint": record.curve_fingerprint,
        "plan_fingerprint": record.plan_fingerprint,
        "config": dict(record.config),
    }


def set_aside(checkpoints: Path) -> tuple[Path, ...]:
    """The damaged checkpoints that were set aside for a person."""
    return tuple(place for place in hidden_directories(checkpoints) if state_of_hidden(place.name) == REFUSED)
