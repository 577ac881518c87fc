"""Perplexity and bits per byte of a model on held-out text: every token but the first is predicted exactly once."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from megalrps.data.increment import OpenIncrement
from megalrps.data.stream import sequential_windows
from megalrps.errors import InputError
from megalrps.model.transformer import SummedLoss
from megalrps.parallel.group import Group


@dataclass(frozen=True)
class HeldOutLoss:
    """The summed loss of a model over an increment's tokens.

    ``nats`` is the sum over the ``tokens`` predicted ones, end-of-document tokens included, and ``text_bytes`` the
    UTF-8 bytes of the text they were made from; bits per byte may therefore be compared between tokenizers, perplexity
    may not. ``documents``: the model was told which documents each window holds, as when it was trained.
    """

    increment: str
    nats: float
    tokens: int
    text_bytes: int
    documents: bool = False

    def to_json(self) -> dict[str, Any]:
        """The fields by name; ``documents`` only where it holds, as there was no such field at first."""
        fields = asdict(self)
        return fields if self.documents else {name: value for name, value in fields.items() if name != "documents"}

    @property
    def perplexity(self) -> float:
        """exp(nats / tokens); infinite where a float cannot hold it."""
        try:
            return math.exp(self.nats / self.tokens)
        except OverflowError:
            return math.inf

    @property
    def bits_per_byte(self) -> float:
        """nats / (ln 2 * text_bytes)."""
        return self.nats / (math.log(2) * self.text_bytes)


class LanguageModel(Protocol):
    """What is asked of a model: the summed token loss, and a module's switch between training and evaluation.

    The loss is that of whole sequences, however many ranks compute it; each of them is given the same ones, and for a
    model that is to know, the place in its sequence where each input's document begins (int32).
    """

    def loss(
        self, inputs_BS: Tensor, labels_BS: Tensor, mask_BS: Tensor, starts_BS: Tensor | None = None, /
    ) -> SummedLoss: ...

    def modules(self) -> Iterator[nn.Module]: ...


def evaluate(
    model: LanguageModel,
    increment: OpenIncrement,
    *,
    sequence_length: int,
    micro_batch_size: int,
    world: Group,
    documents: bool = False,
) -> HeldOutLoss:
    """The loss of ``model`` on all of ``increment``, in windows of ``sequence_length`` predictions without overlap.

    A window sees nothing of the one before it, so figures are comparable only at equal sequence lengths. Rank r of
    ``world``, the data-parallel ranks, takes every world-th batch of ``micro_batch_size`` windows and the sums are
    added in fp64: batches do not depend on the number of ranks, hence the result neither, up to the rounding of that
    sum. All ranks return the same. Every module's training mode is as before afterwards. ``documents``: tell the model
    of those in each window; labels are predicted across their ends all the same.

    Raises InputError for an increment without a token to predict or a count of text bytes, and for sizes below 1.
    """
    if min(sequence_length, micro_batch_size) < 1:
        raise InputError(
            f"--seq-length {sequence_length} and --micro-batch-size {micro_batch_size} must both be at least 1"
        )
    manifest = increment.manifest
    if manifest.text_bytes < 1:
        raise InputError(f"held-out part {manifest.name} says it has no text; preprocess it again with its text")
    sums = torch.zeros(2, dtype=torch.float64, device=world.device)  # nats, tokens; a float64 counts tokens to 2^53
    with _evaluating(model):
        for batch in _batches(increment, sequence_length, micro_batch_size, world, documents):
            loss = model.loss(*(torch.from_numpy(part).to(world.device) for part in batch))
            sums += torch.stack((loss.total.double(), loss.tokens.double()))
    nats, tokens = world.sum_(sums).tolist()
    assert tokens == manifest.tokens - 1, "every token but the first is predicted exactly once"
    return HeldOutLoss(manifest.name, nats, int(tokens), manifest.text_bytes, documents)


@contextmanager
def _evaluating(model: LanguageModel) -> Iterator[None]:
    """No gradients, evaluation mode; every module's own mode is put back at the end, also after an error."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


_Part = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.bool_]]


def _batches(
    increment: OpenIncrement, sequence_length: int, size: int, world: Group, documents: bool
) -> Iterator[tuple[npt.NDArray[Any], ...]]:
    """This rank's batches of inputs, labels, mask and, where asked for, starts of documents, each [B, S].

    B is ``size`` or, once, less.
    """
    windows = sequential_windows(increment, sequence_length)
    number = 0
    while batch := list(islice(windows, size)):
        if number % world.size == world.rank:
            parts = _padded(batch, sequence_length)
            yield (*parts, _starts(increment, number * size, parts[2])) if documents else parts
        number += 1


def _starts(increment: OpenIncrement, first: int, mask_BS: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
    """Where the documents of the windows from number ``first`` on begin in them; what is missing is one of its own."""
    starts_BS = np.empty(mask_BS.shape, np.int32)
    length = mask_BS.shape[1]
    for row, seen in enumerate(mask_BS.sum(axis=1).tolist()):
        place = np.array([(first + row) * length], np.int64)
        starts_BS[row, :seen] = increment.dataset.document_starts(place, seen)[0]
        starts_BS[row, seen:] = seen
    return starts_BS


def _padded(windows: list[npt.NDArray[np.int64]], sequence_length: int) -> _Part:
    """Windows of up to S + 1 tokens as one batch; what is missing of the last is token 0, masked."""
    tokens = np.zeros((len(windows), sequence_length + 1), dtype=np.int64)
    mask_BS = np.zeros((len(windows), sequence_length), dtype=np.bool_)
    for row, window in enumerate(windows):
        tokens[row, : len(window)] = window
        mask_BS[row, : len(window) - 1] = True
    return tokens[:, :-1], tokens[:, 1:], mask_BS
