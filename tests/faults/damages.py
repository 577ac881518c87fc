"""What happens to the bytes of a file: a flipped bit, a page of zeros, an end cut off."""

import random
from collections.abc import Callable
from pathlib import Path

PAGE = 4096

Damage = Callable[[bytes, random.Random], bytes]


def flipped_bit(content: bytes, chance: random.Random) -> bytes:
    """One bit, anywhere."""
    damaged = bytearray(content)
    damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
    return bytes(damaged)


def zeroed_page(content: bytes, chance: random.Random) -> bytes:
    """One page, of the whole file where it is smaller."""
    start = PAGE * chance.randrange(-(-len(content) // PAGE))
    return content[:start] + bytes(min(PAGE, len(content) - start)) + content[start + PAGE :]


def truncated(content: bytes, chance: random.Random) -> bytes:
    """Any number of bytes missing at the end, all of them too."""
    return content[: chance.randrange(len(content))]


DAMAGES: tuple[Damage, ...] = (flipped_bit, zeroed_page, truncated)


def rewrite(path: Path, content: bytes) -> None:
    """Put ``content`` into ``path``, read-only or not."""
    path.chmod(0o644)
    path.write_bytes(content)
