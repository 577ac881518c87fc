"""Fast tokenizers beside the libraries that they stand for: real, odd and mixed texts, and models of every sort.

A document counts as different where any id does. The models are those that the fast backends admit; a text that one of
them hands to the reference itself (megalrps/data/fast_hugging_face.py) is compared all the same.
"""

import random
import zlib
from pathlib import Path

import numpy as np
import odd_texts
import pytest
import sentencepiece
import tokenizer_models
import tokenizers
from counts import count, record, seed

from megalrps.data.fast_hugging_face import GigatokenBackend
from megalrps.data.fast_sentencepiece import WordPiecesBackend
from megalrps.data.tokenizer import Encoded, HuggingFaceTokenizer, SentencePieceTokenizer

TEXTS = count("tokenizers", small=250, full=25_000)
MODELS = count("tokenizers", small=80, full=20_000)
CODE_POINTS = count("tokenizers", small=300, full=230_000)
REAL_CHARACTERS = count("tokenizers", small=60_000, full=6_000_000)

HUGGING_FACE = {
    "GPT-2": tokenizer_models.trained_hugging_face,
    "GPT-2, space before": lambda: tokenizer_models.trained_hugging_face("GPT-2 with a space before"),
    "Llama 3": lambda: tokenizer_models.trained_hugging_face("Llama 3", ignore_merges=True),
    "Qwen 2": lambda: tokenizer_models.trained_hugging_face("Qwen 2", normalizer="NFC"),
    "o200k": lambda: tokenizer_models.trained_hugging_face("o200k"),
}
SENTENCEPIECE = {
    "identity": tokenizer_models.trained_sentencepiece,
    "identity, pieces across white space": lambda: tokenizer_models.trained_sentencepiece(split_by_whitespace=False),
    "nmt_nfkc": lambda: tokenizer_models.trained_sentencepiece("nmt_nfkc"),
}


def split(encoded: Encoded) -> list[list[int]]:
    """The ids of each document."""
    ends = np.cumsum(encoded.lengths)
    return [encoded.tokens[end - length : end].tolist() for end, length in zip(ends, encoded.lengths, strict=True)]


def documents(name: str) -> list[str]:
    """Real text, odd texts drawn from the seed, a huge one of each."""
    chances = (random.Random(f"{seed()} {name} {i}") for i in range(TEXTS))
    odd = [
        odd_texts.odd_text(chance, (*tokenizer_models.SPECIALS, "<x y>", "<x", "    ", "\u2581")) for chance in chances
    ]
    real = odd_texts.real_texts(REAL_CHARACTERS)
    return [*odd, *real, *odd_texts.MANY_TONGUES, "".join(odd), "\x00" * 3000, "a" * 30_000, " " * 30_000, "é" * 9_999]


def differing(texts: list[str], fast: list[list[int]], reference: list[list[int]]) -> list[str]:
    """The texts whose ids differ, shown so that they can be repeated."""
    assert len(texts) == len(fast) == len(reference)
    return [
        f"{text[:200]!a} ({len(text)} characters): {ours[:40]}, not {theirs[:40]}"
        for text, ours, theirs in zip(texts, fast, reference, strict=True)
        if ours != theirs
    ]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", HUGGING_FACE)
def test_gigatoken_gives_the_ids_of_tokenizers(name: str, tmp_path: Path) -> None:
    path = tokenizer_models.stored(tmp_path, HUGGING_FACE[name]())
    backend = GigatokenBackend(HuggingFaceTokenizer(path, "</s>"))
    library = tokenizers.Tokenizer.from_file(str(path))
    texts = documents(name)
    expected = [encoding.ids for encoding in library.encode_batch_fast(texts)]
    different = differing(texts, split(backend.encode_batch(texts)), expected)
    record(f"tokenizers, gigatoken, {name}", documents=len(texts), different=len(different), seed=seed())
    assert not different, f"seed {seed()}: {len(different)} differ, as {different[0]}"


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_word_pieces_give_the_ids_of_sentencepiece(name: str, tmp_path: Path) -> None:
    pytest.importorskip("megalrps._native", reason="megalrps._native is not built here")
    path = tokenizer_models.stored(tmp_path, SENTENCEPIECE[name]())
    backend = WordPiecesBackend(SentencePieceTokenizer(path))
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    texts = documents(name)
    different = differing(texts, split(backend.encode_batch(texts)), library.encode(texts, num_threads=1))
    record(f"tokenizers, word pieces, {name}", documents=len(texts), different=len(different), seed=seed())
    assert not different, f"seed {seed()}: {len(different)} differ, as {different[0]}"


@pytest.mark.timeout(1800)
def test_word_pieces_of_any_pieces_give_the_ids_of_sentencepiece(tmp_path: Path) -> None:
    pytest.importorskip("megalrps._native", reason="megalrps._native is not built here")
    texts_compared = 0
    for number in range(MODELS):
        chance = random.Random(f"{seed()} {number}")
        pieces = tokenizer_models.random_pieces(chance)
        prefix, squeeze = chance.random() < 0.7, chance.random() < 0.2
        model = tokenizer_models.written_model(pieces, normalizer=((3, int(prefix)), (4, int(squeeze)), (5, 1)))
        reference = SentencePieceTokenizer(tokenizer_models.stored(tmp_path, model))
        alphabet = "".join(text for text, _ in pieces).replace("\u2581", " ") + " x"
        texts = ["".join(chance.choices(alphabet, k=chance.choice((1, 3, 10, 40, 100)))) for _ in range(12)]
        different = differing(
            texts, split(WordPiecesBackend(reference).encode_batch(texts)), split(reference.encode_batch(texts))
        )
        assert not different, f"seed {seed()}, model {number} of {pieces}: {different[0]}"
        texts_compared += len(texts)
    record("tokenizers, word pieces, random models", models=MODELS, documents=texts_compared, seed=seed())


def boundary_model(rule: str) -> str:
    """A tokenizer.json whose ids show where any text is split: each part of it is merged with whatever is beside it."""
    named = {byte: character for character, byte in zip(_alphabet(), range(256), strict=True)}
    beside = [ord(character) for character in "aA1!'. \t\n\r/"]
    leads, rests = [*range(128), *range(0xC2, 0xF5)], range(0x80, 0xC0)
    pairs = [(left, right) for left in beside for right in leads]
    pairs += [(left, right) for left in rests for right in (*beside, *range(0xC2, 0xF5))]
    pairs += [(left, right) for left in range(128) for right in beside]
    merges = [(named[left], named[right]) for left, right in dict.fromkeys(pairs)]
    vocabulary = {token: number for number, token in enumerate([*named.values(), *(a + b for a, b in merges), "</s>"])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges))
    made.pre_tokenizer = tokenizer_models.splitting(rule)
    return made.to_str()


def _alphabet() -> list[str]:
    """The characters that stand for the bytes 0 to 255 in a byte-level vocabulary."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("rule", ["GPT-2", "Llama 3", "Qwen 2", "o200k"])
def test_every_code_point_is_split_as_by_tokenizers(rule: str, tmp_path: Path) -> None:
    """What is a letter, a digit, a mark, white space or nothing of these changes with the versions of Unicode."""
    path = tokenizer_models.stored(tmp_path, boundary_model(rule))
    backend = GigatokenBackend(HuggingFaceTokenizer(path, "</s>"))
    library = tokenizers.Tokenizer.from_file(str(path))
    # Most are below U+34000; CRC-32 makes of the places a choice that is the same everywhere.
    every = [*range(0xD800), *range(0xE000, 0x34000), *range(0xE0000, 0xE0200), *range(0x34000, 0x110000, 4096)]
    chosen = every if len(every) <= CODE_POINTS else sorted(every, key=lambda c: zlib.crc32(b"%d" % c))[:CODE_POINTS]
    forms = ("a{}", "A{}", "11{}", "!!{}", "  {}", "{}a", "{}1", "{}!", "{} x", "{}{}", "\n{}\n")
    texts = ["\x01".join(form.replace("{}", chr(point)) for form in forms) for point in chosen]
    different = differing(
        texts, split(backend.encode_batch(texts)), [encoding.ids for encoding in library.encode_batch_fast(texts)]
    )
    record(f"tokenizers, code points, {rule}", documents=len(texts), different=len(different), seed=seed())
    assert not different, f"{len(different)} differ: {different[:20]}"
