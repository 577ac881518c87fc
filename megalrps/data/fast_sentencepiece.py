"""SentencePiece BPE models whose texts csrc/word_pieces.cpp encodes, word by word, and why the others are not.

The C++ code finds the pieces by the scores alone, so it is the library's equal for models of characters, scores and
bytes, whatever the pieces: byte-pair encoding, byte fallback, white space as U+2581 before the word. It leaves out what
else the library can do, and models that use it stay with the library: pieces given by hand, unused pieces, the other
algorithms (unigram sums scores in float32 over the whole text, where words on their own may break ties otherwise).
Texts are normalised by the library, unless the model leaves them as they are.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megalrps.data.fast_check import OutsideError
from megalrps.data.tokenizer import CutAtSpaces, Encoded, SentencePieceTokenizer

_MEMORY_BYTES = 64 << 20
"""What the words seen may take."""
_LONGEST_PIECE = 1024
"""Characters of a piece; to prepare one takes the square of its length."""
_MARK = "\u2581"
_BPE = 2
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6

# Numbers of the fields in sentencepiece_model.proto, the published format of a model file.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_MODEL_TYPE, _SUFFIX, _BYTE_FALLBACK = 3, 24, 35
_CHARACTER_MAP, _PREFIX, _SQUEEZE, _ESCAPE = 2, 3, 4, 5
_KNOWN_OF_NORMALIZER = {1, _CHARACTER_MAP, _PREFIX, _SQUEEZE, _ESCAPE, 6}


@dataclass
class SentencePieceModel:
    """What a model file says, as far as it matters here."""

    texts: list[str] = field(default_factory=list)
    """Of the pieces that texts consist of; :attr:`ids` and :attr:`scores` go with them."""
    ids: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    byte_ids: list[int] = field(default_factory=list)
    """Of the 256 bytes."""
    trainer: dict[int, Any] = field(default_factory=dict)
    """Fields of the trainer's part, by number."""
    normalizer: dict[int, Any] = field(default_factory=dict)

    @property
    def is_identity(self) -> bool:
        """Whether texts stay as they are, but for a space before them."""
        return not self.normalizer.get(_CHARACTER_MAP) and not self.normalizer.get(_SQUEEZE, 1)

    @property
    def has_prefix(self) -> bool:
        """Whether a space is put before every text."""
        return bool(self.normalizer.get(_PREFIX, 1))


class WordPiecesBackend:
    """The C++ encoder of a model; OutsideError where it is not proved to be the library's equal."""

    name = "word pieces"
    ids_behind = 0

    def __init__(self, reference: SentencePieceTokenizer) -> None:
        try:
            from megalrps import _native
        except ImportError:
            raise OutsideError("megalrps._native is not built, which has the fast encoder") from None
        model = read_model(reference.library.serialized_model_proto())
        check_model(model)
        self._normalize = None if model.is_identity else reference.library.normalize
        self._words = _native.WordPieces(
            model.texts,
            np.array(model.scores, np.float32),
            np.array(model.ids, np.int32),
            np.array(model.byte_ids, np.int32),
            prefix=model.is_identity and model.has_prefix,
            memory_bytes=_MEMORY_BYTES,
        )
        # A normaliser may look beyond a space, and so may a piece that holds one behind a letter.
        crosses = any(_MARK in text[1:] and _MARK in text.lstrip(_MARK) for text in model.texts)
        self.can_be_cut = model.is_identity and not crosses
        # The prefix of a piece takes the place of the space that the piece before it ends at.
        how: CutAtSpaces = "drop" if model.has_prefix else "keep"
        self.cut_at_spaces = how if self.can_be_cut else None

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """As in Tokenizer."""
        normalize = self._normalize
        tokens, lengths = self._words.encode(texts if normalize is None else [normalize(text) for text in texts])
        return Encoded(tokens, lengths)


def check_model(model: SentencePieceModel) -> None:
    """Raise OutsideError, saying why, for a model whose texts the C++ code may not encode."""
    if model.trainer.get(_MODEL_TYPE, 1) != _BPE:
        raise OutsideError("the model is not BPE")
    if not model.trainer.get(_BYTE_FALLBACK, 0) or len(model.byte_ids) != 256:
        raise OutsideError("the model has no byte fallback")
    if model.trainer.get(_SUFFIX, 0):
        raise OutsideError("the model treats white space as a suffix")
    if not model.normalizer.get(_ESCAPE, 1):
        raise OutsideError("the model does not escape white space")
    if unknown := sorted(model.normalizer.keys() - _KNOWN_OF_NORMALIZER):
        raise OutsideError(f"the model's normalizer has an unknown field {unknown[0]}")
    scores = np.array(model.scores)
    if np.isnan(scores).any():
        raise OutsideError("a piece of the model has no score")
    if len(set(np.signbit(scores[scores == 0]).tolist())) > 1:
        raise OutsideError("pieces of the model have the scores 0 and -0, which the library tells apart")
    if max(map(len, model.texts), default=0) > _LONGEST_PIECE:
        raise OutsideError(f"a piece of the model is longer than {_LONGEST_PIECE} characters")


def read_model(content: bytes) -> SentencePieceModel:
    """Read a model file; OutsideError for content or pieces that this module does not know."""
    model = SentencePieceModel()
    bytes_by_text = {f"<0x{byte:02X}>": byte for byte in range(256)}
    byte_ids: dict[int, int] = {}
    number = 0
    try:
        for key, value in _fields(content):
            if key == _PIECES:
                text, score, kind = _piece(value)
                if kind == _NORMAL:
                    model.texts.append(text)
                    model.scores.append(score)
                    model.ids.append(number)
                elif kind == _BYTE:
                    byte_ids[bytes_by_text[text]] = number
                elif kind not in (_UNKNOWN, _CONTROL):
                    raise OutsideError(f"the model has a piece of another kind: {text!r}")
                elif len(text) == 1:
                    raise OutsideError(f"the model has a control symbol of one character: {text!r}")
                number += 1
            elif key in (_TRAINER, _NORMALIZER):
                part = model.trainer if key == _TRAINER else model.normalizer
                if part:
                    raise OutsideError("the model has a part twice")
                part.update(_fields(value))
        model.byte_ids = [byte_ids[byte] for byte in sorted(byte_ids)]
    except (IndexError, KeyError, TypeError, ValueError, struct.error) as error:
        raise OutsideError(f"the model is not as expected ({error!r})") from None
    return model


def _piece(content: bytes) -> tuple[str, float, int]:
    """Text, score and kind of a piece."""
    size = content[1]
    if content[0] == 0x0A and size < 0x80 and content[size + 2] == 0x15 and len(content) == size + 7:
        return content[2 : size + 2].decode(), struct.unpack_from("<f", content, size + 3)[0], _NORMAL  # nearly all
    values = dict(_fields(content))
    (score,) = struct.unpack("<f", values[2]) if 2 in values else (0.0,)
    return values[1].decode(), score, values.get(3, _NORMAL)


def _fields(content: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a message in protocol buffers' wire format: an int, or the bytes it has."""
    at = 0
    end = len(content)
    while at < end:
        key, at = _varint(content, at)
        wire_type = key & 7
        if wire_type == 0:
            value, at = _varint(content, at)
            yield key >> 3, value
            continue
        if wire_type == 2:
            size, at = _varint(content, at)
        elif wire_type in (1, 5):
            size = 8 if wire_type == 1 else 4
        else:
            raise ValueError(f"wire type {wire_type}")
        if at + size > end:
            raise ValueError("cut off")
        yield key >> 3, content[at : at + size]
        at += size


def _varint(content: bytes, at: int) -> tuple[int, int]:
    """The number at ``at``, seven bits a byte, the lowest first, and the place behind it."""
    value = content[at]
    at += 1
    if value < 0x80:
        return value, at
    value &= 0x7F
    shift = 7
    while True:
        byte = content[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
