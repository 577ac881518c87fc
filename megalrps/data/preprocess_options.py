"""The options of ``tools/preprocess_data.py``."""

from dataclasses import dataclass, field
from pathlib import Path

from megalrps.data.manifest import check_increment_name
from megalrps.data.text import OnBadLine
from megalrps.data.tokenizer import TokenizerBackend, TokenizerKind
from megalrps.errors import InputError


@dataclass(frozen=True)
class InputOptions:
    """The text: JSON lines (plain, .gz, .zst), parquet, or the folder of a saved Hugging Face dataset."""

    input: tuple[str, ...]
    """Files, folders of them, or quoted globs, read in this order."""

    json_keys: tuple[str, ...] = ("text",)
    """Keys (or columns) of the texts; each becomes a dataset of its own."""

    date_key: str | None = None
    """Key (or column) of the documents' dates, whose first and last are told; nothing else depends on it."""

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

    tokenizer_backend: TokenizerBackend = "auto"
    """The fastest implementation that is proved to give the same tokens as the reference library, or that library."""


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
    """Processes that tokenize; with 1 it happens in the tool's own. Memory: about 100 MB each."""

    log_interval: int = 100_000
    """Documents between two lines of progress, where there is no terminal for a live display."""


@dataclass(frozen=True)
class PreprocessOptions:
    """Turn text into an increment: token ids in Megatron's indexed format, and a manifest of them.

    Run again with the same inputs and options, it finds its output and ends at once. Killed and run again, it goes on
    with what was finished, which lies in PREFIX_KEY_document.work until all is.
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
