#!/usr/bin/env python3
"""Make an increment of a dataset of Megatron's: check PREFIX.bin and .idx, write manifest and digests beside them."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from megalrps.commandline import run_tool
from megalrps.data.indexed import IndexedDataset, manifest_path
from megalrps.data.manifest import check_increment_name, describe_dataset, write_manifest
from megalrps.data.tokenizer import TokenizerKind, load_tokenizer, tokenizer_identity
from megalrps.errors import InputError

PROGRAM = "adopt_dataset.py"


@dataclass(frozen=True)
class AdoptOptions:
    """Write PREFIX.json and PREFIX.blocks for a dataset that lacks them. The dataset is read once and never changed."""

    prefix: Path
    """The dataset: PREFIX.bin and PREFIX.idx."""

    tokenizer_model: Path
    """The tokenizer that made it: a SentencePiece .model file, a tokenizer.json, or the folder that holds one."""

    tokenizer_type: TokenizerKind = "SentencePieceTokenizer"
    """Kind of --tokenizer-model."""

    eod_token: str | None = None
    """End-of-document token of a Hugging Face tokenizer; unset: its own eos_token, or the one with a usual name."""

    name: str | None = None
    """Name of the increment; unset: the last part of the prefix."""

    text_bytes: int = 0
    """UTF-8 bytes of the text it was made from; 0: not known, and then no bits per byte can be counted on it."""

    source: tuple[str, ...] = ()
    """Files the text came from, for the record."""


def adopt(options: AdoptOptions) -> str:
    """Check the dataset, write its manifest, say what was found; InputError for what cannot be an increment."""
    name = options.name or options.prefix.name
    check_increment_name(name)
    if options.text_bytes < 0:
        raise InputError(f"--text-bytes {options.text_bytes}: must not be negative (0: not known)")
    if manifest_path(options.prefix).exists():
        raise InputError(
            f"{manifest_path(options.prefix)} exists: the dataset is an increment already; remove it first"
        )
    tokenizer = load_tokenizer(options.tokenizer_type, options.tokenizer_model, eod_token=options.eod_token)
    manifest = describe_dataset(
        options.prefix,
        name=name,
        tokenizer=tokenizer_identity(tokenizer),
        text_bytes=options.text_bytes,
        append_eod=_ends_with_eod(IndexedDataset(options.prefix), tokenizer.eod),
        sources=options.source,
    )
    write_manifest(options.prefix, manifest)
    return (
        f"{options.prefix}: adopted as increment {name}\n  {manifest.documents:,} documents, {manifest.tokens:,} "
        f"tokens as {manifest.dtype}, {'ending' if manifest.append_eod else 'not ending'} with end-of-document tokens"
    )


def _ends_with_eod(dataset: IndexedDataset, eod: int) -> bool:
    """Whether the first document that has tokens ends with the end-of-document token, as --append-eod leaves it."""
    return any(int(dataset[place][-1]) == eod for place in range(min(1, len(dataset))))


if __name__ == "__main__":
    run_tool(
        lambda: print(adopt(tyro.cli(AdoptOptions, prog=PROGRAM, config=(tyro.conf.FlagCreatePairsOff,)))), PROGRAM
    )
