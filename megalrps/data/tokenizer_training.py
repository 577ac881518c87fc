"""Training a SentencePiece model on the text of the first increment: what ``tools/train_tokenizer.py`` does.

Byte-pair encoding with byte fallback and no normalisation: every text comes back from its tokens as it was (but for one
leading space). The same text and options give the same file: one thread, no sampling, the text in its own order.
"""

import hashlib
import io
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalrps.data.recipe import input_digests, is_ours, read_results, write_record
from megalrps.data.text import BadLines, OnBadLine, expand_inputs, read_records
from megalrps.errors import InputError
from megalrps.files import replacing
from megalrps.fingerprint import file_digest

_SETTINGS: dict[str, Any] = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": True,
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,  # one token for an indentation: a quarter fewer tokens on source code
    "split_digits": True,
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "pad_id": 3,
    "num_threads": 1,
    "shuffle_input_sentence": False,
    "max_sentence_length": 1 << 30,  # documents are trained on whole
}
_QUIET = 2
"""SentencePiece's log level that leaves errors only."""
_TOO_HIGH = re.compile(r"size too high .* value <= (\d+)")
_TOO_LOW = re.compile(r"smaller than required_chars\. \d+ vs (\d+)")


@dataclass(frozen=True)
class TokenizerTrainingOptions:
    """Train a SentencePiece tokenizer on JSON lines, usually those of the first increment alone.

    Byte-pair encoding with byte fallback; ids: unknown 0, <s> 1, </s> 2 (end of document), padding 3. Run again with
    the same inputs and options, it finds its output and ends at once.
    """

    input: tuple[str, ...]
    """Files, folders of JSON lines, or quoted globs: plain, .gz or .zst."""

    output: Path
    """The model file; beside it goes a record of how it was made (.recipe.json)."""

    vocab_size: int = 32_000
    """Number of tokens."""

    json_key: str = "text"
    """Key of the text in each line."""

    max_bytes: int = 100_000_000
    """Bytes of text to train on: the first whole documents that reach them."""

    on_bad_line: OnBadLine = "error"
    """What a line without usable text does: stop with its place, or be counted and skipped."""

    overwrite: bool = False
    """Replace a model that was made from other inputs or with other options."""

    def check(self) -> None:
        """Raise InputError for values that no training can use."""
        if self.vocab_size < 1:
            raise InputError(f"--vocab-size {self.vocab_size}: must be positive")
        if self.max_bytes < 1:
            raise InputError(f"--max-bytes {self.max_bytes}: must be positive")


@dataclass(frozen=True)
class TokenizerTrainingResult:
    """What a training made, or found made."""

    up_to_date: bool
    documents: int
    text_bytes: int
    fingerprint: str
    """SHA-256 of the model file."""
    bad_lines_summary: str
    wall_seconds: float


def train_tokenizer(options: TokenizerTrainingOptions) -> TokenizerTrainingResult:
    """Train the model that ``options`` describe, unless it is there already; InputError as for every tool."""
    started = time.monotonic()
    options.check()
    paths = expand_inputs(options.input)
    recipe = {
        "tool": "train_tokenizer",
        "inputs": input_digests(paths),
        "json_key": options.json_key,
        "vocab_size": options.vocab_size,
        "max_bytes": options.max_bytes,
        "on_bad_line": options.on_bad_line,
        "settings": _SETTINGS,
    }
    record = options.output.with_name(f"{options.output.name}.recipe.json")
    up_to_date = _is_finished(options, record, recipe)
    if not up_to_date:
        _make(options, paths, record, recipe)
    return TokenizerTrainingResult(up_to_date, wall_seconds=time.monotonic() - started, **read_results(record))


def _is_finished(options: TokenizerTrainingOptions, record: Path, recipe: dict[str, Any]) -> bool:
    ours = is_ours(record, recipe, [options.output], options.overwrite)
    # A model of another digest than the record's is one that a killed run was about to replace.
    return ours and read_results(record)["fingerprint"] == file_digest(options.output)


def _make(options: TokenizerTrainingOptions, paths: tuple[Path, ...], record: Path, recipe: dict[str, Any]) -> None:
    bad_lines = BadLines(options.on_bad_line)
    texts = list(_first_texts(paths, options, bad_lines))
    model = _train(texts, options.vocab_size)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    results = {
        "documents": len(texts),
        "text_bytes": sum(len(text.encode()) for text in texts),
        "fingerprint": hashlib.sha256(model).hexdigest(),
        "bad_lines_summary": bad_lines.describe(),
    }
    write_record(record, recipe, results, seal=None)
    with replacing(options.output) as file:
        file.write(model)


def _first_texts(paths: tuple[Path, ...], options: TokenizerTrainingOptions, bad_lines: BadLines) -> Iterator[str]:
    """The first documents, as many as ``--max-bytes`` takes."""
    size = 0
    for record in read_records(paths, (options.json_key,), bad_lines):
        (text,) = record.values
        yield text
        size += len(text.encode())
        if size >= options.max_bytes:
            return


def _train(texts: list[str], vocab_size: int) -> bytes:
    """The model file; InputError where the text cannot give so many pieces."""
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            vocab_size=vocab_size,
            minloglevel=_QUIET,
            **_SETTINGS,
        )
    except RuntimeError as error:
        raise InputError(_explain(str(error), vocab_size)) from None
    return model.getvalue()


def _explain(message: str, vocab_size: int) -> str:
    """SentencePiece's error as one line with the mend."""
    if found := _TOO_HIGH.search(message):
        return f"--vocab-size {vocab_size}: this text gives only {found[1]} tokens; pass that or less, or more text"
    if found := _TOO_LOW.search(message):
        return f"--vocab-size {vocab_size}: too small for the characters of this text; pass more than {found[1]}"
    if "sentences_.empty()" in message:
        return "--input: holds no text to train on; check --input and --json-key"
    return f"--input: SentencePiece cannot train on it ({message}); check --input and --vocab-size"
