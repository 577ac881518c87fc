"""Small increments of the storage and stream tests, and a tokenizer for small texts."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from small_preprocessing import train_small_tokenizer

from megalrps.data.increment import open_increment
from megalrps.data.indexed import IndexedDatasetWriter
from megalrps.data.manifest import TokenizerIdentity, describe_dataset, write_manifest

TOKENIZER = TokenizerIdentity("SentencePieceTokenizer", 50_000, 2, "0" * 64)


@pytest.fixture(scope="session")
def make_increment(tmp_path_factory):
    """Write and open an increment of the given tokens: token i of it is ``first_token + i`` unless ``tokens`` says.

    Its documents have ``sizes`` tokens, or there are three.
    """
    numbers = itertools.count()

    def make(count=0, first_token=0, *, tokens=None, sizes=None, name="text", tokenizer=TOKENIZER, dtype=np.uint16):
        prefix = tmp_path_factory.mktemp("increment") / f"set{next(numbers)}"
        tokens = np.arange(first_token, first_token + count) if tokens is None else np.asarray(tokens)
        with IndexedDatasetWriter(prefix, dtype) as writer:
            for document in np.array_split(tokens, 3 if sizes is None else np.cumsum(sizes)[:-1]):
                writer.add_document(document)
        manifest = describe_dataset(
            prefix, name=name, tokenizer=tokenizer, text_bytes=4 * len(tokens), append_eod=False, sources=("a.jsonl",)
        )
        write_manifest(prefix, manifest)
        return open_increment(prefix)

    return make


@pytest.fixture(scope="session")
def tokenizer_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer of :mod:`small_preprocessing`."""
    return train_small_tokenizer(tmp_path_factory.mktemp("tokenizer"))
