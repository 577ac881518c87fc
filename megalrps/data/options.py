"""Which data a run is handed, in the order in which it arrived."""

from dataclasses import dataclass
from typing import Literal

from megalrps.errors import InputError


@dataclass(frozen=True)
class DataOptions:
    """Increments: one indexed dataset each, in the order in which they arrived."""

    increments: tuple[str, ...] = ()
    """Training data, oldest first: a prefix (of PREFIX.bin, .idx, .json) per increment; append a new one to go on.
    A prefix may be a URL, such as s3://bucket/2024, or that of a blend (tools/blend_increments.py)."""

    valid_data_path: tuple[str, ...] = ()
    """Held-out parts: one prefix per increment, in the same order; every release is evaluated on each of them."""

    tokenizer_type: Literal["SentencePieceTokenizer", "HuggingFaceTokenizer"] = "SentencePieceTokenizer"
    """Kind of --tokenizer-model."""

    tokenizer_model: str | None = None
    """Tokenizer the increments must have been made with; unset: all must agree with one another."""

    eod_token: str | None = None
    """End-of-document token of a Hugging Face --tokenizer-model, as given to tools/preprocess_data.py."""

    data_cache_path: str | None = None
    """Folder of a local disk for data that lies under a URL: what was read once is kept there, checked."""

    seq_length: int = 2048
    """Tokens of one sample (S)."""

    num_workers: int = 2
    """Threads of each rank that make the samples of the next updates ready; 0: each update reads its own first."""

    reset_attention_mask: bool = False
    """Attend within documents alone, in training and in evaluation; unset: across all that a sample holds."""

    reset_position_ids: bool = False
    """Count rotary positions from the first token of each document in a sample; unset: from the sample's first."""

    eod_mask_loss: bool = False
    """Leave out of the loss what follows an end-of-document token: the first token of the next document."""

    pack_documents: bool = False
    """Fill samples with whole documents; padding does not count in the loss. Best with --reset-attention-mask."""

    @property
    def knows_documents(self) -> bool:
        """Whether the model is told which documents a sample holds."""
        return self.reset_attention_mask or self.reset_position_ids

    @property
    def masks_labels(self) -> bool:
        """Whether some labels may not count in the loss."""
        return self.eod_mask_loss or self.pack_documents

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
        far = next((prefix for prefix in (*self.increments, *self.valid_data_path) if "://" in prefix), None)
        if far is not None and self.data_cache_path is None:
            raise InputError(
                f"{far}: data under a URL is kept in a folder of a local disk as it is read; add --data-cache-path"
            )
        if self.seq_length < 1:
            raise InputError(f"--seq-length {self.seq_length}: must be at least 1")
        if self.num_workers < 0:
            raise InputError(f"--num-workers {self.num_workers}: must not be negative; 0 reads in the loop itself")
