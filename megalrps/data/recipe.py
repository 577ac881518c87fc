"""Made files remember how they were made, so that making them again costs nothing and never replaces something else.

A tool that makes files removes the *seal* of those that it replaces, if there are any, and then writes, in this order:
a *record* (the recipe and some results), the files, and last the seal, which shows that they are whole. Killed at any
point and run again, it finds its own record and simply goes on.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megalrps.errors import InputError
from megalrps.files import sync_directory, write_json
from megalrps.fingerprint import file_digest

VERSION = 1


def input_digests(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Size and SHA-256 of each file, in order: inputs are the same when these are, whatever the files are called."""
    return [{"bytes": path.stat().st_size, "sha256": file_digest(path)} for path in paths]


def recorded_inputs(record: Path, paths: Sequence[Path], states: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """What :func:`input_digests` would say of ``paths``, by the record ``record`` of what was made of files like them.

    Nothing is read where the record knows files in these very ``states``, or files of other sizes: these are then
    without a digest, which no record is.
    """
    content = _read_record(record)
    inputs: list[dict[str, Any]] = content["recipe"].get("inputs", [])
    if content["results"].get("input_states") == [list(state) for state in states]:
        return inputs
    sizes = [{"bytes": path.stat().st_size} for path in paths]
    if [{"bytes": each.get("bytes")} for each in inputs] != sizes:
        return sizes
    return input_digests(paths)


def write_record(path: Path, recipe: Mapping[str, Any], results: Mapping[str, Any], *, seal: Path | None) -> None:
    """Record at ``path`` that the files beside it are made by ``recipe``.

    ``seal`` is removed before, durably: under the new record it would vouch for the files of the old one. None where
    the results tell one from the other.
    """
    if seal is not None:
        seal.unlink(missing_ok=True)
        sync_directory(seal.parent)
    write_json(path, {"version": VERSION, "recipe": dict(recipe), "results": dict(results)})


def read_results(path: Path) -> dict[str, Any]:
    """The results part of an existing record."""
    return _read_record(path)["results"]


def is_ours(record: Path, recipe: Mapping[str, Any], outputs: Sequence[Path], overwrite: bool) -> bool:
    """Whether the existing ``outputs`` were made by this very recipe (they may still be unfinished).

    False means that they are to be made; InputError, unless ``overwrite``, that they would replace something else.
    """
    existing = [path for path in outputs if path.exists()]
    if not existing:
        return False
    if not record.exists():
        if overwrite:
            return False
        raise InputError(
            f"{existing[0]}: is already there, and no record {record.name} tells how it was made; "
            "choose another output or pass --overwrite"
        )
    recorded = _read_record(record)["recipe"]
    wanted = json.loads(json.dumps(dict(recipe)))  # as JSON gives it back: tuples become lists
    if recorded == wanted:
        return True
    if overwrite:
        return False
    different = sorted(key for key in {*recorded, *wanted} if recorded.get(key) != wanted.get(key))
    raise InputError(
        f"{existing[0]}: is already there, made with different {', '.join(different)}; "
        "choose another output or pass --overwrite"
    )


def _read_record(path: Path) -> dict[str, dict[str, Any]]:
    try:
        record = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path}: not a record of ours ({error}); remove it to make its files again") from None
    sound = isinstance(record, dict) and record.get("version") == VERSION
    if not sound or not all(isinstance(record.get(part), dict) for part in ("recipe", "results")):
        raise InputError(f"{path}: not a record of version {VERSION}; remove it to make its files again")
    return {part: record[part] for part in ("recipe", "results")}
