"""The lineage as text: a tree of checkpoints, every one under the one it began from."""

from megalrps.checkpoint.lineage import Lineage


def draw_lineage(lineage: Lineage) -> str:
    """The tree, a line a checkpoint; then what is refused, and why. Never empty, and no new line at its end."""
    orphans = lineage.orphans()
    lines: list[str] = []
    for root in (*lineage.children(None), *orphans):
        note = f"  (its parent {orphans[root]} is missing)" if root in orphans else ""
        lines.append(_line(lineage, root) + note)
        lines.extend(_branches(lineage, root, ""))
    lines.extend(f"refused: {reason}" for _, reason in sorted(lineage.refused.items()))
    return "\n".join(lines) or "no checkpoints"


def _branches(lineage: Lineage, name: str, indent: str) -> list[str]:
    lines: list[str] = []
    children = lineage.children(name)
    for child in children:
        last = child == children[-1]
        lines.append(f"{indent}{'└─ ' if last else '├─ '}{_line(lineage, child)}")
        lines.extend(_branches(lineage, child, indent + ("   " if last else "│  ")))
    return lines


def _line(lineage: Lineage, name: str) -> str:
    record = lineage.records[name]
    what = f"release {record.version}" if record.kind == "release" else record.kind
    return f"{name}  {what}, step {record.step:,}, {record.tokens:,} tokens"
