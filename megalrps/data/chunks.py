"""Cutting a long text at its seams: paragraphs, top-level definitions, blank lines."""

from collections.abc import Iterator


def cut_text(text: str, limit: int) -> Iterator[str]:
    """Pieces of ``text`` of at most ``limit`` UTF-8 bytes, in order, without the blank lines around them.

    A piece ends before a line that is not indented and follows a blank one (a definition, a paragraph), else at a blank
    line, else at any line; only a single line longer than ``limit`` makes a longer piece.
    """
    pending: list[str] = []
    size = 0
    for block in _blocks(text, limit):
        block_size = len(block.encode())
        if pending and size + block_size > limit:
            cut = len(pending) if _starts_section(block) else _last_section(pending, limit)
            yield from _joined(pending[:cut])
            pending = pending[cut:]
            size = sum(len(each.encode()) for each in pending)
            if size + block_size > limit:
                yield from _joined(pending)
                pending, size = [], 0
        pending.append(block)
        size += block_size
    yield from _joined(pending)


def _blocks(text: str, limit: int) -> Iterator[str]:
    """``text`` in blocks that end with blank lines; a block longer than ``limit`` bytes falls into its lines."""
    block: list[str] = []
    for line in text.splitlines(keepends=True):
        if block and line.strip() and not block[-1].strip():
            yield from _fitting(block, limit)
            block = []
        block.append(line)
    yield from _fitting(block, limit)


def _fitting(block: list[str], limit: int) -> Iterator[str]:
    joined = "".join(block)
    if len(joined.encode()) <= limit:
        yield joined
    else:
        yield from block


def _starts_section(block: str) -> bool:
    return not block[:1].isspace()


def _last_section(blocks: list[str], limit: int) -> int:
    """Where to cut ``blocks``: before the last section that starts in them, unless little stands before it."""
    for position in range(len(blocks) - 1, 0, -1):
        if _starts_section(blocks[position]) and 4 * sum(map(len, blocks[:position])) >= limit:
            return position
    return len(blocks)


def _joined(blocks: list[str]) -> Iterator[str]:
    if piece := "".join(blocks).strip("\n"):
        yield piece
