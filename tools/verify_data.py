#!/usr/bin/env python3
"""Read increments from end to end and compare them with the digests in their manifests.

tools/verify_data.py --data data/2023 data/2024      status 2, and every bad file named, unless all are whole
"""

from dataclasses import dataclass

import tyro

from megalrps.commandline import run_tool
from megalrps.data.verify import verify_increment
from megalrps.errors import InputError

PROGRAM = "verify_data.py"


@dataclass(frozen=True)
class VerifyOptions:
    """Check that increments are, byte for byte, what their manifests describe; nothing is changed.

    Opening an increment, as training does, checks all of it but the tokens in PREFIX.bin; this reads these too. Every
    bad file is named, and the status is 2 unless there is none.
    """

    data: tuple[str, ...]
    """Increments: a prefix (of PREFIX.bin, .idx, .json) each, training and held-out parts alike."""


def verify(options: VerifyOptions) -> None:
    """Print what was found, an increment a line; InputError, naming every bad file, at the end."""
    if not options.data:
        raise InputError("--data is empty: name the PREFIX of at least one increment")
    bad_paths: list[str] = []
    for prefix in options.data:
        found = verify_increment(prefix)
        if found.bad_files or found.manifest is None:
            print(f"{prefix}: BAD", *(f"  {bad.complaint}" for bad in found.bad_files), sep="\n", flush=True)
            bad_paths += [str(bad.path) for bad in found.bad_files]
        else:
            counts = f"{found.manifest.documents:,} documents, {found.manifest.tokens:,} tokens"
            print(f"{prefix}: whole, {counts}", flush=True)
    if bad_paths:
        raise InputError(
            f"--data: bad files: {', '.join(bad_paths)}; make these increments again (tools/preprocess_data.py)"
        )


if __name__ == "__main__":
    run_tool(lambda: verify(tyro.cli(VerifyOptions, prog=PROGRAM, config=(tyro.conf.FlagCreatePairsOff,))), PROGRAM)
