"""Tokenizing many documents: batches of lines in, batches of tokens out, in order, in this process or in several."""

import functools
import multiprocessing
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megalrps.data.text import BadLine, LineBatch, parse_batch
from megalrps.data.tokenizer import Tokenizer, load_tokenizer
from megalrps.errors import InputError

_BATCHES_AHEAD = 2
"""Batches that wait for each worker: enough to keep it busy, few enough to keep memory constant."""


@dataclass(frozen=True)
class EncoderSpec:
    """How lines become tokens; small, so that it travels to workers with every batch."""

    tokenizer_type: str
    tokenizer_model: str
    eod_token: str | None
    special_tokens: bool
    json_keys: tuple[str, ...]
    append_eod: bool
    """End each document that has tokens with the end-of-document token."""
    dtype: str
    """Integer type of the tokens in an :class:`EncodedBatch`."""


@dataclass(frozen=True)
class EncodedBatch:
    """The documents of one :class:`LineBatch`, tokenized; every mapping is by JSON key."""

    documents: int
    tokens: dict[str, npt.NDArray[Any]]
    """All tokens of the batch, document after document: [T]."""
    lengths: dict[str, npt.NDArray[np.int64]]
    """Tokens of each document: [documents]."""
    text_bytes: dict[str, int]
    """UTF-8 bytes of the texts."""
    bad_lines: tuple[BadLine, ...]
    bytes_read: int
    """As in :class:`LineBatch`."""

    def split(self, key: str) -> Iterator[npt.NDArray[Any]]:
        """Tokens [T] of each document under ``key``, in order."""
        end = 0
        for length in self.lengths[key].tolist():
            start, end = end, end + length
            yield self.tokens[key][start:end]


def encode_all(batches: Iterator[LineBatch], spec: EncoderSpec, workers: int) -> Iterator[EncodedBatch]:
    """Tokenize ``batches``, in order, with ``workers`` processes (1: in this one); the output is the same for any."""
    if workers == 1:
        yield from (encode_batch(spec, batch) for batch in batches)
        return
    # Spawned, not forked: a fork copies the locks of this process's threads in whatever state they are.
    context = multiprocessing.get_context("spawn")
    waiting: deque[Future[EncodedBatch]] = deque()
    with ProcessPoolExecutor(workers, context) as pool:
        try:
            for batch in batches:
                waiting.append(pool.submit(encode_batch, spec, batch))
                if len(waiting) > _BATCHES_AHEAD * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise InputError(f"--workers {workers}: a worker was killed (out of memory?); pass fewer workers") from None
        finally:
            for future in waiting:
                future.cancel()


def encode_batch(spec: EncoderSpec, batch: LineBatch) -> EncodedBatch:
    """Parse and tokenize one batch."""
    tokenizer = _loaded_tokenizer(spec)
    records, bad_lines = parse_batch(batch, spec.json_keys)
    tokens: dict[str, npt.NDArray[Any]] = {}
    lengths: dict[str, npt.NDArray[np.int64]] = {}
    text_bytes: dict[str, int] = {}
    for position, key in enumerate(spec.json_keys):
        texts = [record.values[position] for record in records]
        documents = tokenizer.encode_batch(texts)
        if spec.append_eod:
            documents = [np.append(ids, np.int32(tokenizer.eod)) if ids.size else ids for ids in documents]
        lengths[key] = np.array([ids.size for ids in documents], np.int64)
        tokens[key] = np.concatenate([*documents, np.empty(0, np.int32)]).astype(spec.dtype)
        text_bytes[key] = sum(len(text) if text.isascii() else len(text.encode()) for text in texts)
    return EncodedBatch(len(records), tokens, lengths, text_bytes, tuple(bad_lines), batch.bytes_read)


@functools.lru_cache(maxsize=1)
def _loaded_tokenizer(spec: EncoderSpec) -> Tokenizer:
    """The tokenizer of ``spec``, loaded once for each process."""
    return load_tokenizer(
        spec.tokenizer_type, spec.tokenizer_model, eod_token=spec.eod_token, special_tokens=spec.special_tokens
    )
