"""A small run of tools/preprocess_data.py: its text, its options, what it leaves."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from megalrps.data.preprocess_options import InputOptions, OutputOptions, PreprocessOptions, TokenizerOptions
from megalrps.data.tokenizer_training import TokenizerTrainingOptions, train_tokenizer

TEXTS = ["The quick brown fox", "", "jumps over the lazy dog", "naïve 日本 🦊", "", *(f"line {n}" for n in range(3000))]


def train_small_tokenizer(folder: Path) -> Path:
    """A SentencePiece model of the texts."""
    write_lines(folder / "text.jsonl", [{"text": text} for text in TEXTS])
    options = TokenizerTrainingOptions((str(folder / "text.jsonl"),), folder / "tok.model", vocab_size=320)
    train_tokenizer(options)
    return options.output


def small_options(folder: Path, tokenizer_model: Path) -> PreprocessOptions:
    """Options that make ``out/v1`` of the texts."""
    write_lines(folder / "in.jsonl", [{"text": text, "title": text[:4]} for text in TEXTS])
    return PreprocessOptions(
        InputOptions((str(folder / "in.jsonl"),)),
        TokenizerOptions(tokenizer_model),
        OutputOptions(folder / "out" / "v1", append_eod=True),
    )


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def changed(options: PreprocessOptions, section: str, **values: Any) -> PreprocessOptions:
    return replace(options, **{section: replace(getattr(options, section), **values)})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}
