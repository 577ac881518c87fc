"""The lineage as text: a tree of checkpoints, every one under the one it began from, with what refers to it."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from megalrps.checkpoint.leases import Lease, is_over
from megalrps.checkpoint.lineage import Lineage
from megalrps.checkpoint.references import Reference


def draw_lineage(lineage: Lineage, references: Iterable[Reference] = ()) -> str:
    """The tree, a line a checkpoint; then what is refused, and why. Never empty, and no new line at its end.

    Beside a checkpoint stand the ``references`` that point to it; those that point to nothing come last.
    """
    marks: defaultdict[str, list[str]] = defaultdict(list)
    for reference in references:
        marks[reference.checkpoint].append(reference.title + (f" ({reference.note})" if reference.note else ""))
    orphans = lineage.orphans()
    lines: list[str] = []
    for root in (*lineage.children(None), *orphans):
        note = f"  (its parent {orphans[root]} is missing)" if root in orphans else ""
        lines.append(_line(lineage, root, marks) + note)
        lines.extend(_branches(lineage, root, "", marks))
    for name, reason in sorted(lineage.refused.items()):
        lines.append(f"refused: {reason}{_marked(marks.get(name, ()))}")
    gone = marks.keys() - lineage.records.keys() - lineage.refused.keys()
    lines.extend(f"lost: {name} is not there{_marked(marks[name])}" for name in sorted(gone))
    return "\n".join(lines) or "no checkpoints"


def draw_leases(leases: Iterable[Lease]) -> list[str]:
    """A line for each path that a launch holds, or may hold for all that is known here."""
    states = {False: "held by", None: "not known to be free: held by"}
    return [
        f"path {lease.path}: {states[over]} {lease.holder}" + (f", reads {', '.join(lease.reads)}" * bool(lease.reads))
        for lease in leases
        if (over := is_over(lease)) is not True
    ]


def draw_set_aside(places: Sequence[Path]) -> list[str]:
    """A line for each damaged checkpoint that was set aside."""
    return [f"set aside: {place}" for place in places]


def _branches(lineage: Lineage, name: str, indent: str, marks: Mapping[str, Sequence[str]]) -> list[str]:
    lines: list[str] = []
    children = lineage.children(name)
    for child in children:
        last = child == children[-1]
        lines.append(f"{indent}{'└─ ' if last else '├─ '}{_line(lineage, child, marks)}")
        lines.extend(_branches(lineage, child, indent + ("   " if last else "│  "), marks))
    return lines


def _line(lineage: Lineage, name: str, marks: Mapping[str, Sequence[str]]) -> str:
    record = lineage.records[name]
    what = f"release {record.version}" if record.kind == "release" else record.kind
    return f"{name}  {what}, step {record.step:,}, {record.tokens:,} tokens{_marked(marks.get(name, ()))}"


def _marked(marks: Sequence[str]) -> str:
    return f"  [{', '.join(marks)}]" if marks else ""
