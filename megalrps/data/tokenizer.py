"""Tokenizers: text to token ids, and the identity that a dataset records of them.

The libraries are imported only when a tokenizer is loaded, so a command that has nothing to tokenize starts at once.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
import numpy.typing as npt

from megalrps.data.manifest import TokenizerIdentity
from megalrps.errors import InputError
from megalrps.fingerprint import file_digest

TokenizerKind = Literal["SentencePieceTokenizer", "HuggingFaceTokenizer"]
TOKENIZER_KINDS: tuple[str, ...] = get_args(TokenizerKind)
"""The values of ``--tokenizer-type`` (Megatron's names)."""

USUAL_EOD_TOKENS = ("</s>", "<|endoftext|>", "<|end_of_text|>")
"""What end-of-document tokens are called where nothing says which token it is."""


TokenizerBackend = Literal["auto", "reference"]
TOKENIZER_BACKENDS: tuple[str, ...] = get_args(TokenizerBackend)
"""The values of ``--tokenizer-backend``: the fast one where it is proved to be the same, or the reference library."""

CutAtSpaces = Literal["keep", "drop"] | None
"""How a long text can be tokenized in pieces that end where a space follows a letter: each next piece begins with that
space, or behind it. None: it cannot."""


@dataclass(frozen=True)
class Encoded:
    """Token ids of several documents, end to end, without end-of-document tokens."""

    tokens: npt.NDArray[np.int32] | npt.NDArray[np.uint32]
    """All documents' tokens, one after the other: [T]."""
    lengths: npt.NDArray[np.int64]
    """Tokens of each document: [documents]; their sum is T."""

    @classmethod
    def of_lists(cls, documents: Iterable[Sequence[int]]) -> "Encoded":
        """The same of one list of ids per document."""
        arrays = [np.asarray(ids, np.int32) for ids in documents]
        lengths = np.array([ids.size for ids in arrays], np.int64)
        return cls(np.concatenate(arrays) if arrays else np.empty(0, np.int32), lengths)


class Tokenizer(Protocol):
    """What the rest of the project knows of a tokenizer."""

    kind: str
    """Megatron's name of the tokenizer type."""
    vocab_size: int
    """One more than the highest token id, before any padding of the embedding."""
    eod: int
    """Id of the end-of-document token."""
    fingerprint: str
    """SHA-256 of the model file."""
    backend: str
    """What computes the ids, with its version: ``tokenizers 0.23.3``."""
    why: str
    """One line: why this backend."""
    cut_at_spaces: CutAtSpaces
    """Whether the pieces of a long text have the tokens of the whole."""

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """Token ids of the texts, in order, without end-of-document tokens."""


_ASKED_FOR = "--tokenizer-backend reference"


class SentencePieceTokenizer:
    """A ``.model`` file of SentencePiece; end of document is its ``</s>``."""

    kind = "SentencePieceTokenizer"

    why = _ASKED_FOR
    cut_at_spaces: CutAtSpaces = None

    def __init__(self, model: Path) -> None:
        import sentencepiece

        _check_file(model)
        self.backend = f"sentencepiece {sentencepiece.__version__}"
        self.library = sentencepiece.SentencePieceProcessor()
        try:
            self.library.LoadFromSerializedProto(model.read_bytes())
        except (RuntimeError, ValueError):
            raise InputError(
                f"--tokenizer-model {model}: not a SentencePiece model, or damaged; "
                "check the file, or pass --tokenizer-type HuggingFaceTokenizer for a tokenizer.json"
            ) from None
        self.vocab_size = int(self.library.vocab_size())
        self.eod = int(self.library.eos_id())
        self.fingerprint = file_digest(model)
        if self.eod < 0:
            raise InputError(f"--tokenizer-model {model}: has no end-of-sentence token; train it with an eos_id")

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """Token ids of the texts, in order; one thread (processes are what scales here)."""
        return Encoded.of_lists(self.library.encode(list(texts), num_threads=1))


class HuggingFaceTokenizer:
    """A ``tokenizer.json`` of the Hugging Face ``tokenizers`` library, or the folder that holds one.

    The end-of-document token is ``eod_token``, or the folder's own ``eos_token`` (``tokenizer_config.json``), or the
    one token of the vocabulary that has a usual name. ``special_tokens`` adds those of the tokenizer's template (such
    as a begin-of-sentence token), as Megatron's preprocessing does by default.
    """

    kind = "HuggingFaceTokenizer"

    why = _ASKED_FOR
    cut_at_spaces: CutAtSpaces = None

    def __init__(self, model: Path, eod_token: str | None = None, special_tokens: bool = True) -> None:
        import tokenizers

        self.backend = f"tokenizers {tokenizers.__version__}"
        if model.is_dir():
            eod_token = eod_token or _configured_eos_token(model / "tokenizer_config.json")
            model = model / "tokenizer.json"
        _check_file(model)
        try:
            self.library = tokenizers.Tokenizer.from_file(str(model))
        except Exception as error:  # the library raises Exception itself
            raise InputError(
                f"--tokenizer-model {model}: not a tokenizer.json, or damaged ({error}); "
                "check the file, or pass --tokenizer-type SentencePieceTokenizer for a SentencePiece model"
            ) from None
        # A tokenizer.json may carry the length limit and the padding of the model that it was made for.
        self.library.no_truncation()
        self.library.no_padding()
        self.special_tokens = special_tokens
        vocabulary = self.library.get_vocab()
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.has_distinct_ids = len(set(vocabulary.values())) == len(vocabulary)
        self.eod = _find_eod(vocabulary, eod_token, model)
        self.fingerprint = file_digest(model)

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """Token ids of the texts, in order."""
        if len(texts) == 1:  # on this thread
            return Encoded.of_lists([self.library.encode(texts[0], add_special_tokens=self.special_tokens).ids])
        encodings = self.library.encode_batch_fast(list(texts), add_special_tokens=self.special_tokens)
        return Encoded.of_lists(encoding.ids for encoding in encodings)


def load_tokenizer(
    kind: str,
    model: Path | str,
    *,
    eod_token: str | None = None,
    special_tokens: bool = True,
    backend: str = "auto",
) -> Tokenizer:
    """The tokenizer of type ``kind`` stored at ``model``; InputError, with the mend, where that cannot be loaded.

    ``eod_token`` and ``special_tokens`` are for Hugging Face tokenizers (see :class:`HuggingFaceTokenizer`); a
    SentencePiece model says itself what its end-of-document token is, so naming one is refused. ``backend`` is one of
    TOKENIZER_BACKENDS. A tokenizer belongs to one thread.
    """
    if backend not in TOKENIZER_BACKENDS:
        raise InputError(f"--tokenizer-backend {backend!r} is unknown: choose one of {', '.join(TOKENIZER_BACKENDS)}")
    if kind == SentencePieceTokenizer.kind:
        if eod_token is not None:
            raise InputError("--eod-token: a SentencePiece model defines its own (</s>); leave the flag out")
        spm = SentencePieceTokenizer(Path(model))
        return spm if backend == "reference" else _fast_or(spm, Path(model))
    if kind == HuggingFaceTokenizer.kind:
        hf = HuggingFaceTokenizer(Path(model), eod_token, special_tokens)
        return hf if backend == "reference" else _fast_or(hf, Path(model))
    raise InputError(f"--tokenizer-type {kind!r} is unknown: choose one of {', '.join(TOKENIZER_KINDS)}")


def _fast_or(reference: SentencePieceTokenizer | HuggingFaceTokenizer, model: Path) -> Tokenizer:
    """The fast backend for the model of ``reference``, or ``reference``, which then says why."""
    # They know this module's classes, and cost time that a reference backend has no use for.
    from megalrps.data.fast_check import CheckedTokenizer, FastBackend, OutsideError
    from megalrps.data.fast_hugging_face import GigatokenBackend
    from megalrps.data.fast_sentencepiece import WordPiecesBackend

    fast: FastBackend
    try:
        if isinstance(reference, SentencePieceTokenizer):
            fast = WordPiecesBackend(reference)
        else:
            fast = GigatokenBackend(reference)
    except OutsideError as reason:
        reference.why = str(reason)
        return reference
    return CheckedTokenizer(reference, fast, model)


def tokenizer_identity(tokenizer: Tokenizer) -> TokenizerIdentity:
    """What a dataset made with ``tokenizer`` records of it."""
    return TokenizerIdentity(tokenizer.kind, tokenizer.vocab_size, tokenizer.eod, tokenizer.fingerprint)


def _check_file(model: Path) -> None:
    if not model.is_file():
        raise InputError(
            f"--tokenizer-model {model}: no such file; check the path (tools/train_tokenizer.py makes one)"
        )


def _configured_eos_token(path: Path) -> str | None:
    """``eos_token`` of a ``tokenizer_config.json``: a string, or an object with its ``content``; None where unsaid."""
    if not path.is_file():
        return None
    try:
        config: Any = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); mend it, or pass --tokenizer-model tokenizer.json") from None
    token = config.get("eos_token") if isinstance(config, dict) else None
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _find_eod(vocabulary: dict[str, int], eod_token: str | None, model: Path) -> int:
    candidates = USUAL_EOD_TOKENS if eod_token is None else (eod_token,)
    found = [token for token in candidates if token in vocabulary]
    if len(found) == 1:
        return vocabulary[found[0]]
    if eod_token is not None:
        raise InputError(f"{model}: has no end-of-document token {eod_token!r}; name another with --eod-token")
    what = f"has several of {', '.join(found)}" if found else f"has none of {', '.join(candidates)}"
    raise InputError(f"{model}: {what}; name the end-of-document token with --eod-token")
