"""The names in a store's directory: committed checkpoints, and what is on its way in or out."""

import re
import secrets
from pathlib import Path

from megalrps.checkpoint.errors import MissingCheckpointError
from megalrps.errors import InputError
from megalrps.files import sync_directory

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_HIDDEN = re.compile(r"\.[A-Za-z0-9][A-Za-z0-9._-]{0,99}\.[0-9a-f]{16}\.(partial|trash|refused)")

PARTIAL = "partial"
"""A save under way, or one that died: removed when a writer opens the store."""

TRASH = "trash"
"""A removal under way, or one that died: removed when a writer opens the store."""

REFUSED = "refused"
"""A damaged checkpoint that was set aside for a person to look at: never removed by the store."""


def checkpoint_name(path: str, step: int) -> str:
    """The name of the checkpoint of ``path`` at ``step``; of one path, names sort as steps do."""
    return check_name(f"{path}-{step:08d}")


def check_name(name: str) -> str:
    """``name`` itself; raises InputError when it could leave the directory or hide in it."""
    if not _NAME.fullmatch(name):
        raise InputError(
            f"checkpoint name {name!r} is not allowed: use 1 to 100 letters, digits, '.', '_' and '-', "
            "and begin with a letter or a digit"
        )
    return name


def path_of(name: str) -> str:
    """The path that the checkpoint ``name`` is of; see :func:`checkpoint_name`."""
    return name.rpartition("-")[0]


def name_of_hidden(hidden: str) -> str:
    """The checkpoint that the :func:`hidden_name` ``hidden`` was made for."""
    return hidden[1:].rsplit(".", 2)[0]


def hidden_name(name: str, state: str) -> str:
    """A name never used before for the checkpoint ``name`` in ``state``: PARTIAL, TRASH or REFUSED."""
    return f".{check_name(name)}.{secrets.token_hex(8)}.{state}"


def state_of_hidden(hidden: str) -> str:
    """PARTIAL, TRASH or REFUSED, as the :func:`hidden_name` ``hidden`` says."""
    return hidden.rpartition(".")[2]


def hide(directory: Path, name: str, state: str) -> Path:
    """Take the checkpoint ``name`` in ``directory`` out of sight in one durable step; returns where it is now."""
    hidden = directory / hidden_name(name, state)
    try:
        (directory / name).rename(hidden)
    except FileNotFoundError as error:
        raise MissingCheckpointError(f"no checkpoint {name} in {directory}") from error
    sync_directory(directory)
    return hidden


def checkpoint_directories(directory: Path) -> tuple[str, ...]:
    """The names of all directories in ``directory`` that stand where a committed checkpoint would, sorted.

    Whether they are whole is for :func:`megalrps.checkpoint.manifest.read_manifest` to say. Empty when there is no
    ``directory``.
    """
    if not directory.is_dir():
        return ()
    return tuple(
        sorted(entry.name for entry in directory.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    )


def leftovers(directory: Path) -> tuple[Path, ...]:
    """The directories that saves and removals which died have left in ``directory``."""
    return tuple(entry for entry in hidden_directories(directory) if state_of_hidden(entry.name) != REFUSED)


def hidden_directories(directory: Path) -> tuple[Path, ...]:
    """What :func:`leftovers` are, and what was set aside; empty when there is no ``directory``."""
    if not directory.is_dir():
        return ()
    return tuple(sorted(entry for entry in directory.iterdir() if _HIDDEN.fullmatch(entry.name)))
