"""Tokenizers: identity, end of document, and what cannot be loaded."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import models, pre_tokenizers, processors, trainers

from megalrps.data.manifest import TokenizerIdentity
from megalrps.data.tokenizer import Encoded, load_tokenizer, tokenizer_identity
from megalrps.errors import InputError

TEXTS = ["The quick brown fox", "jumps over the lazy dog.", "", "naïve 日本 🦊\n\tx = 1\x00"]


def split(encoded: Encoded) -> list[list[int]]:
    """The ids of each document."""
    ends = np.cumsum(encoded.lengths)
    assert encoded.tokens.size == (ends[-1] if ends.size else 0)
    return [encoded.tokens[end - length : end].tolist() for end, length in zip(ends, encoded.lengths, strict=True)]


def make_sentencepiece(path: Path, **settings: object) -> Path:
    with open(path, "wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS[:2] * 5),
            model_writer=model,
            vocab_size=290,
            model_type="bpe",
            byte_fallback=True,
            minloglevel=2,
            **settings,
        )
    return path


def make_hugging_face(path: Path, special_tokens: list[str]) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.save(str(path))
    return tokenizer


def test_sentencepiece_gives_the_ids_of_its_library(tmp_path: Path) -> None:
    path = make_sentencepiece(tmp_path / "tok.model", eos_id=2)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer = load_tokenizer("SentencePieceTokenizer", path)
    encoded = tokenizer.encode_batch(TEXTS)
    assert split(encoded) == [reference.encode(text) for text in TEXTS]
    assert encoded.tokens.dtype in (np.int32, np.uint32)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert tokenizer_identity(tokenizer) == TokenizerIdentity("SentencePieceTokenizer", 290, 2, digest)


def test_hugging_face_gives_the_ids_of_its_library(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    reference = make_hugging_face(path, ["<pad>", "<|endoftext|>"])
    for model in (path, tmp_path):  # the file, or the folder that holds it
        tokenizer = load_tokenizer("HuggingFaceTokenizer", model)
        assert split(tokenizer.encode_batch(TEXTS)) == [reference.encode(text).ids for text in TEXTS]
        assert tokenizer.vocab_size == reference.get_vocab_size()
        assert tokenizer.eod == 1
        assert tokenizer.fingerprint == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_length_limit_stored_with_a_tokenizer_does_not_cut_documents(tmp_path: Path) -> None:
    tokenizer = make_hugging_face(tmp_path / "tokenizer.json", ["</s>"])
    whole = tokenizer.encode(TEXTS[0]).ids
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert split(load_tokenizer("HuggingFaceTokenizer", tmp_path).encode_batch([TEXTS[0]])) == [whole]


def test_the_template_of_a_hugging_face_tokenizer_is_a_choice(tmp_path: Path) -> None:
    tokenizer = make_hugging_face(tmp_path / "tokenizer.json", ["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (with_template,) = split(load_tokenizer("HuggingFaceTokenizer", tmp_path).encode_batch(["fox"]))
    (without,) = split(load_tokenizer("HuggingFaceTokenizer", tmp_path, special_tokens=False).encode_batch(["fox"]))
    assert with_template == [0, *without]


@pytest.mark.parametrize("eos_token", ["<eot>", {"content": "<eot>", "lstrip": False}])
def test_the_end_of_document_token_is_the_one_the_folder_names(tmp_path: Path, eos_token: object) -> None:
    make_hugging_face(tmp_path / "tokenizer.json", ["</s>", "<eot>"])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos_token}))
    assert load_tokenizer("HuggingFaceTokenizer", tmp_path).eod == 1
    assert load_tokenizer("HuggingFaceTokenizer", tmp_path, eod_token="</s>").eod == 0
    assert load_tokenizer("HuggingFaceTokenizer", tmp_path / "tokenizer.json").eod == 0  # the file alone says nothing


def test_an_end_of_document_token_is_never_guessed(tmp_path: Path) -> None:
    make_hugging_face(tmp_path / "none.json", ["<eot>"])
    make_hugging_face(tmp_path / "two.json", ["</s>", "<|endoftext|>"])
    with pytest.raises(InputError, match=r"has none of .*--eod-token"):
        load_tokenizer("HuggingFaceTokenizer", tmp_path / "none.json")
    with pytest.raises(InputError, match=r"has several of .*--eod-token"):
        load_tokenizer("HuggingFaceTokenizer", tmp_path / "two.json")
    with pytest.raises(InputError, match="no end-of-document token '<nope>'"):
        load_tokenizer("HuggingFaceTokenizer", tmp_path / "two.json", eod_token="<nope>")
    with pytest.raises(InputError, match="no end-of-sentence token"):
        load_tokenizer("SentencePieceTokenizer", make_sentencepiece(tmp_path / "tok.model", eos_id=-1))
    with pytest.raises(InputError, match="--eod-token"):
        load_tokenizer("SentencePieceTokenizer", tmp_path / "tok.model", eod_token="</s>")


@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "HuggingFaceTokenizer"])
@pytest.mark.parametrize("content", [b"", b"not a model", None])
def test_a_missing_or_damaged_model_is_one_clear_line(tmp_path: Path, kind: str, content: bytes | None) -> None:
    path = tmp_path / "model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"--tokenizer-model .*model.*: (no such file|not a)") as caught:
        load_tokenizer(kind, path)
    assert "\n" not in str(caught.value)


def test_an_unknown_kind_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"GPT2BPETokenizer.*SentencePieceTokenizer, HuggingFaceTokenizer"):
        load_tokenizer("GPT2BPETokenizer", tmp_path)


def test_no_library_is_imported_before_a_tokenizer_is_loaded() -> None:
    code = (
        "import sys; import megalrps.data.preprocess, megalrps.data.split, megalrps.data.corpus, "
        "megalrps.data.tokenizer_training; "
        "print([name for name in ('torch', 'sentencepiece', 'tokenizers', 'rich', 'zstandard') if name in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
