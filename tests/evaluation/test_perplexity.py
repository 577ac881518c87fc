"""Held-out loss: every token but the first once, whatever the windows, the batches and the ranks."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from megalrps.data.increment import OpenIncrement, open_increment
from megalrps.data.indexed import IndexedDatasetWriter
from megalrps.data.manifest import TokenizerIdentity, describe_dataset, write_manifest
from megalrps.errors import InputError
from megalrps.evaluation.perplexity import HeldOutLoss, LanguageModel, evaluate
from megalrps.model.config import ModelConfig
from megalrps.model.initialisation import initialise_
from megalrps.model.transformer import SummedLoss, Transformer
from megalrps.parallel.mesh import alone
from megalrps.parallel.world import World
from megalrps.training.engine import Engine

VOCABULARY = 61
ALONE = World(0, 1, torch.device("cpu"), None)
torch.set_num_threads(1)


def write_increment(
    prefix: Path, tokens: list[int], text_bytes: int, *, lengths: Sequence[int] | None = None
) -> OpenIncrement:
    """Of one document, or of documents of so many tokens."""
    tokenizer = TokenizerIdentity("SentencePieceTokenizer", VOCABULARY, 2, "0" * 64)
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for document in np.split(np.asarray(tokens), np.cumsum(lengths or [len(tokens)])[:-1]):
            writer.add_document(document)
    manifest = describe_dataset(
        prefix, name="held-out", tokenizer=tokenizer, text_bytes=text_bytes, append_eod=False, sources=("a.jsonl",)
    )
    write_manifest(prefix, manifest)
    return open_increment(prefix)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], OpenIncrement]:
    """``held_out(n)``: an increment of n tokens and 4n bytes."""
    numbers = itertools.count()

    def make(count: int) -> OpenIncrement:
        tokens = np.random.default_rng(count).integers(0, VOCABULARY, count).tolist()
        return write_increment(tmp_path_factory.mktemp("held") / f"set{next(numbers)}", tokens, 4 * count)

    return make


class Bigram(nn.Module):
    """The loss of a token is a function of its predecessor and itself; ``seen`` lists the pairs not masked."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Dropout(0.5)
        self.seen: list[tuple[int, int]] = []
        self.modes: list[bool] = []
        self.grad_enabled = False

    def loss(self, inputs: Tensor, labels_BS: Tensor, loss_mask_BS: Tensor | None = None) -> SummedLoss:
        assert loss_mask_BS is not None
        self.modes += [self.training, self.inner.training]
        self.grad_enabled |= torch.is_grad_enabled()
        pairs = list(zip(inputs[loss_mask_BS].tolist(), labels_BS[loss_mask_BS].tolist(), strict=True))
        self.seen += pairs
        return SummedLoss(torch.tensor(sum(map(pair_loss, pairs)), dtype=torch.float64), loss_mask_BS.sum())


def pair_loss(pair: tuple[int, int]) -> float:
    return math.sqrt(1 + 7 * pair[0] + pair[1])


def loss_of(
    model: LanguageModel, increment: OpenIncrement, world: World = ALONE, length: int = 8, size: int = 3
) -> HeldOutLoss:
    return evaluate(
        model,
        increment,
        sequence_length=length,
        micro_batch_size=size,
        world=world,
    )


@settings(max_examples=40, deadline=None)
@given(count=st.integers(2, 90), length=st.integers(1, 40), size=st.integers(1, 7))
def test_every_token_but_the_first_is_predicted_once(
    held_out: Callable[[int], OpenIncrement], count: int, length: int, size: int
) -> None:
    increment, model = held_out(count), Bigram()
    result = loss_of(model, increment, length=length, size=size)
    tokens = increment.dataset.tokens.tolist()
    assert model.seen == list(itertools.pairwise(tokens))
    assert result.tokens == count - 1
    assert result.nats == pytest.approx(sum(map(pair_loss, itertools.pairwise(tokens))), rel=1e-13)


def test_a_uniform_model_has_the_vocabulary_as_its_perplexity(held_out: Callable[[int], OpenIncrement]) -> None:
    class Uniform(Bigram):
        def loss(self, inputs: Tensor, labels_BS: Tensor, loss_mask_BS: Tensor | None = None) -> SummedLoss:
            assert loss_mask_BS is not None
            return SummedLoss(loss_mask_BS.sum() * math.log(VOCABULARY), loss_mask_BS.sum())

    result = loss_of(Uniform(), held_out(50))
    assert result.perplexity == pytest.approx(VOCABULARY, rel=1e-6)
    assert result.bits_per_byte == pytest.approx(49 * math.log2(VOCABULARY) / 200, rel=1e-6)


def transformer() -> Transformer:
    shape = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=2, ffn_hidden_size=48, vocab_size=64)
    model = Transformer(shape)
    initialise_(model, shape, seed=7)
    return model


def test_batching_and_padding_do_not_change_the_loss(held_out: Callable[[int], OpenIncrement]) -> None:
    increment, model = held_out(45), transformer()
    tokens = torch.from_numpy(increment.dataset.tokens.astype(np.int64))
    with torch.no_grad():
        windows = [tokens[start : start + 9][None] for start in range(0, 44, 8)]
        expected = sum(float(model.loss(window[:, :-1], window[:, 1:]).total) for window in windows)
    assert loss_of(model, increment, size=4).nats == pytest.approx(expected, rel=1e-6)


def test_bf16_is_used_when_asked_for(held_out: Callable[[int], OpenIncrement]) -> None:
    increment, model = held_out(45), transformer()
    exact = loss_of(model, increment).nats
    mesh = alone(torch.device("cpu"))
    engine = Engine({0: model}, mesh, micro_batch_size=3, sequence_length=8, autocast=torch.bfloat16)
    rounded = loss_of(engine, increment).nats
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=2e-2)


DOCUMENTS = (3, 1, 20, 8, 6, 7)
"""Lengths: some end where a window of 8 does, one spans whole windows; of the 45 tokens the last window has 4."""


@pytest.mark.parametrize("told", ["attention", "positions", "both"])
def test_documents_are_evaluated_as_they_are_trained_on(tmp_path: Path, told: str) -> None:
    """In every window each document is told by itself, and the first token of the next is still predicted."""
    tokens = np.random.default_rng(3).integers(0, VOCABULARY, sum(DOCUMENTS))
    increment = write_increment(tmp_path / "set", tokens.tolist(), 180, lengths=DOCUMENTS)
    model, text = transformer().double(), torch.from_numpy(tokens)
    begins, expected = np.cumsum((0, *DOCUMENTS)).tolist(), 0.0
    for start in range(0, len(tokens) - 1, 8):
        end = min(start + 8, len(tokens) - 1)
        bounds = [start, *(place for place in begins if start < place < end), end]
        positions = torch.cat([torch.arange(b - a) for a, b in itertools.pairwise(bounds)])
        if told == "positions":
            output = model(text[None, start:end], positions)
            expected += model.loss_of_logits(output, text[None, start + 1 : end + 1]).total.item()
            continue
        for a, b in itertools.pairwise(bounds):
            output = model(text[None, a:b], None if told == "both" else torch.arange(a - start, b - start))
            expected += model.loss_of_logits(output, text[None, a + 1 : b + 1]).total.item()
    engine = Engine(
        {0: model},
        alone(torch.device("cpu")),
        micro_batch_size=3,
        sequence_length=8,
        reset_attention_mask=told != "positions",
        reset_position_ids=told != "attention",
    )
    for size in (1, 4):
        result = evaluate(engine, increment, sequence_length=8, micro_batch_size=size, world=ALONE, documents=True)
        assert result.nats == pytest.approx(expected, rel=1e-12)
        assert result.to_json()["documents"] is True
    with pytest.raises(AssertionError, match="without their documents"):
        loss_of(engine, increment)
    assert "documents" not in loss_of(model, increment).to_json()


def loss_on_rank(rank: int, prefix: Path, ranks: int) -> float:
    world = World(rank, ranks, torch.device("cpu"), dist.group.WORLD)
    return loss_of(transformer(), open_increment(prefix), world, size=2).nats


@pytest.mark.parametrize(("ranks", "tokens"), [(2, 90), (3, 20)])
def test_the_result_does_not_depend_on_the_number_of_ranks(
    run_ranks: Callable[..., list[float]], tmp_path: Path, ranks: int, tokens: int
) -> None:
    """With 20 tokens there are two batches for three ranks: the last rank has nothing to do, and still agrees."""
    increment = write_increment(tmp_path / "set", [i % VOCABULARY for i in range(tokens)], 4 * tokens)
    results = run_ranks(ranks, loss_on_rank, tmp_path / "set", ranks)
    assert len(set(results)) == 1
    assert results[0] == pytest.approx(loss_of(transformer(), increment, size=2).nats, rel=1e-12)


def test_the_training_mode_of_every_module_is_put_back(held_out: Callable[[int], OpenIncrement]) -> None:
    model = Bigram()
    model.inner.eval()  # a frozen part of a training model
    loss_of(model, held_out(20))
    assert not any(model.modes)
    assert not model.grad_enabled
    assert (model.training, model.inner.training) == (True, False)
    assert torch.is_grad_enabled()


def test_the_training_mode_is_put_back_after_a_failure(held_out: Callable[[int], OpenIncrement]) -> None:
    class Broken(Bigram):
        def loss(self, inputs: Tensor, labels_BS: Tensor, loss_mask_BS: Tensor | None = None) -> SummedLoss:
            raise RuntimeError("out of memory")

    model = Broken()
    with pytest.raises(RuntimeError, match="out of memory"):
        loss_of(model, held_out(20))
    assert model.training


def test_a_loss_too_large_for_a_float_is_an_infinite_perplexity() -> None:
    assert HeldOutLoss("held-out", 1e6, 1000, 4000).perplexity == math.inf


def test_what_cannot_be_evaluated_is_refused(held_out: Callable[[int], OpenIncrement]) -> None:
    increment = held_out(20)
    with pytest.raises(InputError, match="--seq-length 0"):
        loss_of(Bigram(), increment, length=0)
    with pytest.raises(InputError, match="too short"):
        loss_of(Bigram(), held_out(1))
    silent = OpenIncrement(replace(increment.manifest, text_bytes=0), increment.dataset)
    with pytest.raises(InputError, match="preprocess it again"):
        loss_of(Bigram(), silent)
