"""Which data a run is handed, in the order in which it arrived."""

from dataclasses import dataclass
from typing import Literal

from megalrps.errors import InputError


@dataclass(frozen=True)
class DataOptions:
    """Increments: one indexed dataset each, in the order in which they arrived."""

    increments: tuple[str, ...] = ()
    """Training data, oldest first: a prefix (of PREFIX.bin, .idx, .json) per increment; append a new one to go on."""

    valid_data_path: tuple[str, ...] = ()
    """Held-out parts: one prefix per increment, in the same order; every release is evaluated on each of them."""

    tokenizer_type: Literal["SentencePieceTokenizer", "HuggingFaceTokenizer"] = "SentencePieceTokenizer"
    """Kind of --tokenizer-model."""

    tokenizer_model: str | None = None
    """Tokenizer the increments must have been made with; unset: all must agree with one another."""

    eod_token: str | None = None
    """End-of-document token of a Hugging Face --tokenizer-model, as given to tools/preprocess_data.py."""

    seq_length: int = 2048
    """Tokens of one sample (S)."""

    def check(self) -> None:
        """Raise InputError for what no run can use."""
        if not self.increments:
            raise InputError(
                "--increments is empty: name one PREFIX per increment (tools/preprocess_data.py makes them)"
            )
        if len(set(self.increments)) != len(self.increments):
            raise InputError("--increments names the same prefix twice: each increment is listed once, oldest first")
        if self.valid_data_path and len(self.valid_data_path) != len(self.increments):
            raise InputError(
                f"--valid-data-path holds {len(self.valid_data_path)} prefixes for {len(self.increments)} increments: "
                "name one held-out part per increment, in the same order, or none"
            )
        if self.seq_length < 1:
            raise InputError(f"--seq-length {self.seq_length}: must be at least 1")
