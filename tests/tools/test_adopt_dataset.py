"""A dataset without a manifest becomes an increment; what cannot be one, or is one, is refused and left alone."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megalrps.data.increment import open_increment
from megalrps.data.indexed import IndexedDatasetWriter
from megalrps.data.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face tokenizer of 300 entries whose end-of-document token has no usual name."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<END>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(["a dataset that exists already"], trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return path


def dataset(prefix: Path, tokens: list[list[int]]) -> Path:
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for document in tokens:
            writer.add_document(np.array(document))
    return prefix


def adopt(prefix: Path, tokenizer: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, str(ROOT / "tools/adopt_dataset.py"), "--prefix", str(prefix),
        "--tokenizer-model", str(tokenizer),
        "--tokenizer-type", "HuggingFaceTokenizer", "--eod-token", "<END>", *more,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_an_adopted_dataset_opens_as_an_increment(tmp_path: Path, tokenizer: Path):
    eod = load_tokenizer("HuggingFaceTokenizer", tokenizer, eod_token="<END>").eod
    prefix = dataset(tmp_path / "2023", [[5, 6, 7, eod], [8, eod]])
    before = {name: (tmp_path / name).read_bytes() for name in ("2023.bin", "2023.idx")}
    done = adopt(prefix, tokenizer, "--text-bytes", "21", "--source", "a.jsonl")
    assert (done.returncode, done.stderr) == (0, "")
    manifest = open_increment(prefix, verify=True).manifest
    assert (manifest.name, manifest.tokens, manifest.documents, manifest.text_bytes) == ("2023", 6, 2, 21)
    assert manifest.append_eod and manifest.sources == ("a.jsonl",)
    assert manifest.blocks is not None and sorted(path.suffix for path in tmp_path.iterdir()) == [
        ".bin", ".blocks", ".idx", ".json",
    ]  # fmt: skip
    assert before == {name: (tmp_path / name).read_bytes() for name in before}


def test_documents_without_an_end_token_are_noticed(tmp_path: Path, tokenizer: Path):
    prefix = dataset(tmp_path / "plain", [[5, 6, 7]])
    adopt(prefix, tokenizer)
    assert not open_increment(prefix).manifest.append_eod


@pytest.mark.parametrize(
    ("tokens", "more", "complaint"),
    [
        ([[5, 9000]], (), "outside the tokenizer's vocabulary"),
        ([[5, 6]], ("--text-bytes", "-1"), "--text-bytes -1"),
        ([[5, 6]], ("--name", "no/path"), "--name"),
        ([[5, 6]], ("--eod-token", "<none>"), "--eod-token"),
    ],
)
def test_what_cannot_be_an_increment_is_refused_in_one_line(tmp_path: Path, tokenizer: Path, tokens, more, complaint):
    prefix = dataset(tmp_path / "bad", tokens)
    done = adopt(prefix, tokenizer, *more)
    assert done.returncode == 2
    assert complaint in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "bad.json").exists()


def test_an_increment_is_not_adopted_twice(tmp_path: Path, tokenizer: Path):
    prefix = dataset(tmp_path / "once", [[5, 6]])
    adopt(prefix, tokenizer)
    manifest = (tmp_path / "once.json").read_bytes()
    done = adopt(prefix, tokenizer, "--text-bytes", "7")
    assert done.returncode == 2 and "is an increment already" in done.stderr
    assert (tmp_path / "once.json").read_bytes() == manifest
