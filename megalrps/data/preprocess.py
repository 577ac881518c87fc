"""From JSON lines to an indexed dataset: what ``tools/preprocess_data.py`` does.

Files and flags are those of Megatron-LM's ``tools/preprocess_data.py``: ``PREFIX_KEY_document.bin`` and ``.idx``, one
sequence for each document, and a document whose text has no tokens is a document without a sequence and without an
end-of-document token. Beside them lie the increment manifest (``.json``) and the record of how they were made.
"""

import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megalrps.data.encode import EncodedBatch, EncoderSpec, encode_all
from megalrps.data.indexed import IndexedDataset, IndexedDatasetWriter, bin_path, idx_path, manifest_path, token_dtype
from megalrps.data.manifest import (
    IncrementManifest,
    TokenizerIdentity,
    check_increment_name,
    describe_dataset,
    read_manifest,
    write_manifest,
)
from megalrps.data.progress import ProgressDisplay
from megalrps.data.recipe import input_digests, is_ours, read_results, write_record
from megalrps.data.text import BadLines, OnBadLine, expand_inputs, read_batches
from megalrps.data.tokenizer import TokenizerKind, load_tokenizer, tokenizer_identity
from megalrps.errors import InputError


@dataclass(frozen=True)
class InputOptions:
    """The text: JSON lines, plain, .gz or .zst."""

    input: tuple[str, ...]
    """Files, folders of JSON lines, or quoted globs, read in this order."""

    json_keys: tuple[str, ...] = ("text",)
    """Keys of the texts in each line; each key becomes a dataset of its own."""

    on_bad_line: OnBadLine = "error"
    """What a line without usable text does: stop with its place, or be counted and skipped."""


@dataclass(frozen=True)
class TokenizerOptions:
    """The tokenizer."""

    tokenizer_model: Path
    """A SentencePiece .model file, a tokenizer.json, or the folder that holds one."""

    tokenizer_type: TokenizerKind = "SentencePieceTokenizer"
    """Kind of --tokenizer-model."""

    eod_token: str | None = None
    """End-of-document token of a Hugging Face tokenizer; unset: its own eos_token, or the one with a usual name."""

    tokenizer_hf_no_include_special_tokens: bool = False
    """Leave out the tokens that a Hugging Face tokenizer's template adds to each text (such as a first <s>)."""


@dataclass(frozen=True)
class OutputOptions:
    """The dataset: PREFIX_KEY_document.bin, .idx, .json (manifest) and .recipe.json (how it was made)."""

    output_prefix: Path
    """Where the dataset goes."""

    name: str | None = None
    """Name of the increment; unset: the last part of the prefix. With several keys, -KEY is appended."""

    append_eod: bool = False
    """End each document with the end-of-document token."""

    overwrite: bool = False
    """Replace a dataset that was made from other inputs or with other options."""


@dataclass(frozen=True)
class WorkOptions:
    """The work: no choice here changes the output."""

    workers: int = 1
    """Processes that tokenize; with 1 it happens in the tool's own."""

    log_interval: int = 100_000
    """Documents between two lines of progress, where there is no terminal for a live display."""


@dataclass(frozen=True)
class PreprocessOptions:
    """Turn JSON lines into an increment: token ids in Megatron's indexed format, and a manifest of them.

    Run again with the same inputs and options, it finds its output and ends at once.
    """

    text: InputOptions
    tokenizer: TokenizerOptions
    output: OutputOptions
    work: WorkOptions = field(default_factory=WorkOptions)

    def check(self) -> None:
        """Raise InputError for values that no run can use."""
        if self.work.workers < 1:
            raise InputError(f"--workers {self.work.workers}: must be at least 1")
        if self.work.log_interval < 1:
            raise InputError(f"--log-interval {self.work.log_interval}: must be at least 1")
        keys = self.text.json_keys
        if not keys or len(set(keys)) != len(keys):
            raise InputError(f"--json-keys {' '.join(keys)}: name at least one key, and each one once")
        for key in keys:
            check_increment_name(self.increment_name(key))

    def dataset_prefix(self, key: str) -> Path:
        """Prefix of the dataset of ``key``, named as Megatron names it."""
        return Path(f"{self.output.output_prefix}_{key}_document")

    def increment_name(self, key: str) -> str:
        """Name of the increment that the dataset of ``key`` is."""
        name = self.output.name or self.output.output_prefix.name
        return name if len(self.text.json_keys) == 1 else f"{name}-{key}"


@dataclass(frozen=True)
class PreprocessResult:
    """What a run made, or found made."""

    up_to_date: bool
    datasets: dict[Path, IncrementManifest]
    """Manifest of each dataset, by its prefix."""
    empty_documents: dict[str, int]
    """Documents whose text had no tokens, by key."""
    bad_lines: int
    bad_lines_summary: str
    wall_seconds: float


@dataclass
class _Tally:
    text_bytes: Counter[str] = field(default_factory=Counter)
    empty_documents: Counter[str] = field(default_factory=Counter)


def preprocess(options: PreprocessOptions) -> PreprocessResult:
    """Make the datasets that ``options`` describe, unless they are there already.

    Raises InputError, before anything is replaced, for inputs that cannot be used and for a finished output that was
    made from something else.
    """
    started = time.monotonic()
    options.check()
    paths = expand_inputs(options.text.input)
    spec, identity = _resolve_tokenizer(options)
    recipe = _recipe(options, paths, identity)
    manifests = _finished(options, recipe)
    up_to_date = manifests is not None
    if manifests is None:
        manifests = _make(options, paths, spec, identity, recipe)
    results = read_results(_record_path(options, options.text.json_keys[0]))
    return PreprocessResult(
        up_to_date=up_to_date,
        datasets={options.dataset_prefix(key): manifest for key, manifest in manifests.items()},
        empty_documents=results["empty_documents"],
        bad_lines=results["bad_lines"],
        bad_lines_summary=results["bad_lines_summary"],
        wall_seconds=time.monotonic() - started,
    )


def _resolve_tokenizer(options: PreprocessOptions) -> tuple[EncoderSpec, TokenizerIdentity]:
    chosen = options.tokenizer
    tokenizer = load_tokenizer(
        chosen.tokenizer_type,
        chosen.tokenizer_model,
        eod_token=chosen.eod_token,
        special_tokens=not chosen.tokenizer_hf_no_include_special_tokens,
    )
    spec = EncoderSpec(
        tokenizer_type=chosen.tokenizer_type,
        tokenizer_model=str(chosen.tokenizer_model),
        eod_token=chosen.eod_token,
        special_tokens=not chosen.tokenizer_hf_no_include_special_tokens,
        json_keys=options.text.json_keys,
        append_eod=options.output.append_eod,
        dtype=token_dtype(tokenizer.vocab_size).name,
    )
    return spec, tokenizer_identity(tokenizer)


def _recipe(options: PreprocessOptions, paths: Sequence[Path], identity: TokenizerIdentity) -> dict[str, Any]:
    """All that the datasets depend on, and nothing else."""
    return {
        "tool": "preprocess_data",
        "inputs": input_digests(paths),
        "json_keys": list(options.text.json_keys),
        "on_bad_line": options.text.on_bad_line,
        "tokenizer": asdict(identity),
        "special_tokens": not options.tokenizer.tokenizer_hf_no_include_special_tokens,
        "append_eod": options.output.append_eod,
        "names": [options.increment_name(key) for key in options.text.json_keys],
    }


def _record_path(options: PreprocessOptions, key: str) -> Path:
    return Path(f"{options.dataset_prefix(key)}.recipe.json")


def _finished(options: PreprocessOptions, recipe: dict[str, Any]) -> dict[str, IncrementManifest] | None:
    """Manifests by key if all datasets are there, whole, and made by ``recipe``; None if they are to be made."""
    prefixes = {key: options.dataset_prefix(key) for key in options.text.json_keys}
    ours = [
        is_ours(_record_path(options, key), recipe, [bin_path(prefix), idx_path(prefix)], options.output.overwrite)
        for key, prefix in prefixes.items()
    ]
    if not all(ours):
        return None
    try:
        for prefix in prefixes.values():
            IndexedDataset(prefix)
        return {key: read_manifest(prefix) for key, prefix in prefixes.items()}
    except InputError:
        return None  # ours, but unfinished or damaged since: the very same is made again


def _make(
    options: PreprocessOptions,
    paths: Sequence[Path],
    spec: EncoderSpec,
    identity: TokenizerIdentity,
    recipe: dict[str, Any],
) -> dict[str, IncrementManifest]:
    bad_lines = BadLines(options.text.on_bad_line)
    tally = _Tally()
    total_bytes = sum(path.stat().st_size for path in paths)
    with ExitStack() as stack:
        writers = {
            key: stack.enter_context(IndexedDatasetWriter(options.dataset_prefix(key), spec.dtype, overwrite=True))
            for key in spec.json_keys
        }
        display = stack.enter_context(ProgressDisplay(sys.stderr, total_bytes, options.work.log_interval))
        for batch in encode_all(read_batches(paths), spec, options.work.workers):
            _write_batch(batch, writers, bad_lines, tally)
            display.advance(batch.documents, batch.text_bytes[spec.json_keys[0]], batch.bytes_read)
        _check_not_empty(writers, bad_lines)
        # The last moment before the writers put their files in place: from here on the files there are ours.
        for key in spec.json_keys:
            seal = manifest_path(options.dataset_prefix(key))
            write_record(_record_path(options, key), recipe, _results(bad_lines, tally, spec.json_keys), seal=seal)
    return {key: _describe(options, key, paths, identity, tally) for key in spec.json_keys}


def _write_batch(
    batch: EncodedBatch, writers: dict[str, IndexedDatasetWriter], bad_lines: BadLines, tally: _Tally
) -> None:
    for line in batch.bad_lines:
        bad_lines.add(line)
    for key, writer in writers.items():
        for tokens in batch.split(key):
            writer.add_document(tokens)
            tally.empty_documents[key] += not tokens.size
    tally.text_bytes.update(batch.text_bytes)


def _check_not_empty(writers: dict[str, IndexedDatasetWriter], bad_lines: BadLines) -> None:
    for key, writer in writers.items():
        if writer.token_count == 0:
            raise InputError(
                f"--input: its {writer.document_count} documents hold no token under {key!r} ({bad_lines.describe()}); "
                "check --input and --json-keys"
            )


def _results(bad_lines: BadLines, tally: _Tally, keys: Sequence[str]) -> dict[str, Any]:
    return {
        "bad_lines": bad_lines.counts.total(),
        "bad_lines_summary": bad_lines.describe(),
        "empty_documents": {key: tally.empty_documents[key] for key in keys},
    }


def _describe(
    options: PreprocessOptions, key: str, paths: Sequence[Path], identity: TokenizerIdentity, tally: _Tally
) -> IncrementManifest:
    prefix = options.dataset_prefix(key)
    manifest = describe_dataset(
        prefix,
        name=options.increment_name(key),
        tokenizer=identity,
        text_bytes=tally.text_bytes[key],
        append_eod=options.output.append_eod,
        sources=tuple(str(path) for path in paths),
    )
    write_manifest(prefix, manifest)
    return manifest


def describe_result(result: PreprocessResult) -> Iterator[str]:
    """The lines that tell a person what ``result`` is."""
    for (prefix, manifest), empty in zip(result.datasets.items(), result.empty_documents.values(), strict=True):
        per_byte = manifest.tokens / max(manifest.text_bytes, 1)
        yield f"{prefix}: {'up to date' if result.up_to_date else 'made'}, increment {manifest.name}"
        yield (
            f"  {manifest.documents:,} documents ({empty:,} empty), {manifest.text_bytes:,} bytes of text, "
            f"{manifest.tokens:,} tokens as {manifest.dtype}, {per_byte:.4f} tokens per byte"
        )
    yield f"  {result.bad_lines_summary}; {result.wall_seconds:.1f} s"
