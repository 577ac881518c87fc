"""Training a tokenizer: the same file each time, every text back from its tokens, errors with the mend."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from megalrps.data.tokenizer import load_tokenizer
from megalrps.data.tokenizer_training import TokenizerTrainingOptions, train_tokenizer
from megalrps.errors import InputError

WORDS = ["def", "class", "return", "import", "yield", "lambda", "while", "assert", "raise", "except", "finally", "pass"]
TEXTS = [f"{one} {two}:\n    {two}{index} = {index * 7919}\n\n" for index, one in enumerate(WORDS) for two in WORDS]


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> TokenizerTrainingOptions:
    folder = tmp_path_factory.mktemp("training")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return TokenizerTrainingOptions(input=(str(folder / "text.jsonl"),), output=folder / "tok.model", vocab_size=400)


@pytest.fixture(scope="module")
def processor(options: TokenizerTrainingOptions) -> sentencepiece.SentencePieceProcessor:
    train_tokenizer(options)
    return sentencepiece.SentencePieceProcessor(model_file=str(options.output))


def test_the_same_text_gives_the_same_file(options: TokenizerTrainingOptions, tmp_path: Path) -> None:
    train_tokenizer(options)
    again = train_tokenizer(replace(options, output=tmp_path / "deeper" / "again.model"))
    assert not again.up_to_date
    assert (tmp_path / "deeper" / "again.model").read_bytes() == options.output.read_bytes()
    assert (again.documents, again.text_bytes) == (len(TEXTS), sum(map(len, TEXTS)))
    assert again.fingerprint == load_tokenizer("SentencePieceTokenizer", options.output).fingerprint


def test_the_vocabulary_is_laid_out_as_documented(processor: sentencepiece.SentencePieceProcessor) -> None:
    assert processor.vocab_size() == 400
    ids = (processor.unk_id(), processor.bos_id(), processor.eos_id(), processor.pad_id())
    assert ids == (0, 1, 2, 3)
    assert not any(
        len(processor.id_to_piece(token).strip("▁")) > 1 and processor.id_to_piece(token)[-1].isdigit()
        for token in range(260, 400)
    ), "a number is one token a digit"


@settings(deadline=None, max_examples=100)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=40))
def test_every_text_comes_back_from_its_tokens(processor: sentencepiece.SentencePieceProcessor, text: str) -> None:
    # U+2581 is the library's own sign for a space, the one character that it cannot give back.
    assert processor.decode(processor.encode(text)) == text
    assert processor.unk_id() not in processor.encode(text)


def test_indentation_is_one_token(processor: sentencepiece.SentencePieceProcessor) -> None:
    assert "▁▁▁▁" in processor.encode("def f:\n    pass", out_type=str)


def test_run_again_it_is_up_to_date_until_something_changes(options: TokenizerTrainingOptions, tmp_path: Path) -> None:
    mine = replace(options, output=tmp_path / "tok.model")
    assert not train_tokenizer(mine).up_to_date
    before = mine.output.stat().st_mtime_ns
    assert train_tokenizer(mine).up_to_date
    assert mine.output.stat().st_mtime_ns == before
    with pytest.raises(InputError, match=r"tok\.model.*different vocab_size.*--overwrite"):
        train_tokenizer(replace(mine, vocab_size=390))
    assert load_tokenizer("SentencePieceTokenizer", mine.output).vocab_size == 400
    assert not train_tokenizer(replace(mine, vocab_size=390, overwrite=True)).up_to_date
    assert load_tokenizer("SentencePieceTokenizer", mine.output).vocab_size == 390


def test_a_damaged_model_of_ours_is_made_again(options: TokenizerTrainingOptions, tmp_path: Path) -> None:
    mine = replace(options, output=tmp_path / "tok.model")
    train_tokenizer(mine)
    content = mine.output.read_bytes()
    mine.output.write_bytes(content[:100])
    assert not train_tokenizer(mine).up_to_date
    assert mine.output.read_bytes() == content


def test_a_model_of_somebody_else_is_not_replaced(options: TokenizerTrainingOptions, tmp_path: Path) -> None:
    (tmp_path / "tok.model").write_bytes(b"precious")
    with pytest.raises(InputError, match=r"no record .* tells how it was made"):
        train_tokenizer(replace(options, output=tmp_path / "tok.model"))
    assert (tmp_path / "tok.model").read_bytes() == b"precious"


def test_only_the_first_bytes_are_trained_on(options: TokenizerTrainingOptions, tmp_path: Path) -> None:
    result = train_tokenizer(replace(options, output=tmp_path / "tok.model", max_bytes=1000, vocab_size=300))
    assert 1000 <= result.text_bytes < 1100


def test_text_that_does_not_fit_the_vocabulary_says_what_does(
    options: TokenizerTrainingOptions, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    mine = replace(options, output=tmp_path / "tok.model")
    with pytest.raises(InputError, match=r"--vocab-size 90000: this text gives only \d+ tokens"):
        train_tokenizer(replace(mine, vocab_size=90_000))
    with pytest.raises(InputError, match=r"--vocab-size 200: too small .* more than \d+"):
        train_tokenizer(replace(mine, vocab_size=200))
    empty = tmp_path / "empty.jsonl"
    empty.write_bytes(b"")
    with pytest.raises(InputError, match="holds no text"):
        train_tokenizer(replace(mine, input=(str(empty),)))
    with pytest.raises(InputError, match="--max-bytes"):
        train_tokenizer(replace(mine, max_bytes=0))
    assert not list(tmp_path.glob("tok*"))
    assert capfd.readouterr().err == "", "the library's log is silent"
