"""Tokenizer models for tests: SentencePiece models of any pieces, written by hand, and trained ones of every kind."""

import functools
import io
import json
import random
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import odd_texts
import sentencepiece
import tokenizers
from tokenizers import Regex, models, normalizers, pre_tokenizers, processors, trainers

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
BPE = 2
SPECIALS = ("<|endoftext|>", "<s>", "</s>")

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
QWEN2 = LLAMA3.replace("{1,3}", "")
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    + _CONTRACTIONS
    + r"?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    + _CONTRACTIONS
    + r"?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|"
    + _SPACES
)


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first."""
    content = bytearray()
    while value > 0x7F:
        content.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*content, value])


def _message(*fields: tuple[int, Any]) -> bytes:
    """Fields in protocol buffers' wire format, of their number and an int, a float or bytes."""
    content = b""
    for number, value in fields:
        if isinstance(value, float):
            content += _varint(number << 3 | 5) + struct.pack("<f", value)
        elif isinstance(value, int):
            content += _varint(number << 3) + _varint(value)
        else:
            content += _varint(number << 3 | 2) + _varint(len(value)) + value
    return content


def written_model(
    pieces: Sequence[tuple[str, float]],
    *,
    others: Sequence[tuple[str, float, int]] = (),
    trainer: Sequence[tuple[int, int]] = ((3, BPE), (35, 1)),
    normalizer: Sequence[tuple[int, int]] = ((3, 1), (4, 0), (5, 1)),
) -> bytes:
    """A SentencePiece model of these pieces and scores, all bytes, and ``others``, whose kind comes last.

    The fields of the trainer (3: algorithm, 35: byte fallback) and of the normalizer (3: a space before the text,
    4: white space removed, 5: white space escaped) are given by number.
    """
    all_pieces: list[tuple[str, float, int]] = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    all_pieces += [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    all_pieces += [(text, score, NORMAL) for text, score in pieces]
    all_pieces += others
    return _message(
        *((1, _message((1, text.encode()), (2, score), (3, kind))) for text, score, kind in all_pieces),
        (2, _message(*trainer)),
        (3, _message((1, b"identity"), *normalizer)),
    )


def random_pieces(chance: random.Random) -> list[tuple[str, float]]:
    """Pieces of a small alphabet, many of equal scores, that overlap, leave characters out and cross white space."""
    alphabet = chance.choice(("ab\u2581", "abc\u2581", "aé\u2581日", "ab1.\u2581\U0001f642", "a"))
    texts = {character for character in alphabet if chance.random() < 0.8}
    for _ in range(chance.choice((2, 8, 30))):
        texts.add("".join(chance.choice(alphabet) for _ in range(chance.randint(1, chance.choice((2, 4, 9))))))
        if len(texts) > 1 and chance.random() < 0.7:  # what two others make: it can come about
            texts.add("".join(chance.sample(sorted(texts), 2)))
    scores = chance.choice(([0.0], [-1.0, -2.0], [-float(i) for i in range(40)], [0.5, -0.0, -1e30]))
    return [(text, chance.choice(scores)) for text in sorted(texts)]


@functools.cache
def training_texts() -> tuple[str, ...]:
    """Some real text and all tongues."""
    return (*odd_texts.real_texts(120_000), *odd_texts.MANY_TONGUES * 3)


@functools.cache
def trained_sentencepiece(rule: str = "identity", vocab_size: int = 900, **settings: Any) -> bytes:
    """A BPE model with byte fallback; with the rule ``identity`` as tools/train_tokenizer.py makes it."""
    ours = {"remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True, "split_digits": True}
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(training_texts()),
        model_writer=model,
        vocab_size=vocab_size,
        normalization_rule_name=rule,
        max_sentence_length=1 << 30,
        character_coverage=0.99,
        minloglevel=2,
        num_threads=1,
        **({"model_type": "bpe", "byte_fallback": True} | (ours if rule == "identity" else {}) | settings),
    )
    return model.getvalue()


def splitting(rule: str) -> Any:
    """A pre-tokenizer by its name."""
    if rule in ("GPT-2", "GPT-2 with a space before"):
        return pre_tokenizers.ByteLevel(add_prefix_space=rule != "GPT-2")
    pattern = {"Llama 3": LLAMA3, "Qwen 2": QWEN2, "o200k": O200K}.get(rule, rule)
    parts = [
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    return pre_tokenizers.Sequence(parts)


@functools.cache
def trained_hugging_face(
    rule: str = "GPT-2", normalizer: str = "", ignore_merges: bool = False, spaced: bool = True
) -> str:
    """tokenizer.json of a byte-level BPE of 1,200 tokens, with a template and added tokens of several sorts.

    ``spaced``: one of them has a space behind a letter.
    """
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = splitting(rule)
    if normalizer:
        made.normalizer = getattr(normalizers, normalizer)()
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(training_texts(), trainer)
    if spaced:
        made.add_tokens([tokenizers.AddedToken("<x y>", normalized=False)])
    made.add_tokens([tokenizers.AddedToken("<x", normalized=True)])
    made.add_tokens([tokenizers.AddedToken("    ", normalized=False)])
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    content = json.loads(made.to_str())
    content["model"]["ignore_merges"] = ignore_merges
    return json.dumps(content)


def stored(folder: Path, model: bytes | str) -> Path:
    """The file of a model."""
    path = folder / ("tokenizer.json" if isinstance(model, str) else "tok.model")
    path.write_bytes(model.encode() if isinstance(model, str) else model)
    return path
