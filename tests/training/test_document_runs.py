"""The main command on samples of several documents: what it trains on, what it says, what it refuses to change."""

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_job import (
    ALONE,
    BATCH,
    SEQUENCE_LENGTH,
    TOKENIZER,
    TinyData,
    command,
    launch,
    metrics,
    opened,
    trained,
    world_of_harness,
)

from megalrps.config import parse_config
from megalrps.data.indexed import IndexedDatasetWriter
from megalrps.data.manifest import describe_dataset, write_manifest
from megalrps.errors import InputError
from megalrps.evaluation import report
from megalrps.kernels import attention as attention_module
from megalrps.model.initialisation import initialise_
from megalrps.model.layers import LocalLayers
from megalrps.model.transformer import Transformer
from megalrps.training.describe import describe_size
from megalrps.training.loop import train
from megalrps.training.prepare import Job, prepare

WITHIN = ("--reset-attention-mask", "--reset-position-ids", "--eod-mask-loss")
STEPS = ("--increment-steps", "3", "--alpha", "0.34")


def write_documents(prefix: Path, count: int, seed: int) -> str:
    """An increment of documents of 1 to 14 tokens and the end-of-document token, which stands nowhere else."""
    generator = np.random.default_rng(seed)
    written = 0
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for length in generator.integers(1, 15, size=count).tolist():
            tokens = generator.integers(TOKENIZER.eod + 1, TOKENIZER.vocab_size, size=length)
            writer.add_document(np.append(tokens, TOKENIZER.eod))
            written += length + 1
    manifest = describe_dataset(
        prefix, name="a", tokenizer=TOKENIZER, text_bytes=3 * written, append_eod=True, sources=("text.jsonl",)
    )
    write_manifest(prefix, manifest)
    return str(prefix)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    place = tmp_path_factory.mktemp("data")
    return TinyData((write_documents(place / "a.train", 120, 0),), (write_documents(place / "a.valid", 9, 1),))


@pytest.fixture(scope="module")
def alone(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(command(data, tmp_path_factory.mktemp("alone") / "run", *STEPS, *WITHIN))


def pieces(sample: list[int]) -> list[tuple[list[int], list[int]]]:
    """Inputs and labels of each document in a sample of S + 1 tokens; an end-of-document token is a document's last."""
    cuts = [0, *(place + 1 for place, token in enumerate(sample[:-2]) if token == TOKENIZER.eod), len(sample) - 1]
    return [(sample[a:b], sample[a + 1 : b + 1]) for a, b in pairwise(cuts)]


def first_losses(job: Job) -> np.ndarray:
    """The loss [B, S] of every label of the first update, each document run through the first weights by itself."""
    model = Transformer(job.model, layers=LocalLayers(dtype=torch.float64))
    initialise_(model, job.model, job.config.training.seed)
    drawn = job.union("a").batch(np.arange(BATCH, dtype=np.int64))
    losses = [
        F.cross_entropy(model(torch.tensor([inputs]))[0], torch.tensor(labels), reduction="none").tolist()
        for sample in drawn.tokens_BS.tolist()
        for inputs, labels in pieces(sample)
    ]
    return np.concatenate(losses).reshape(BATCH, SEQUENCE_LENGTH)


def test_the_first_loss_is_that_of_each_document_alone_but_what_follows_its_end(data: TinyData, alone: Path):
    job = prepare(parse_config(command(data, alone, *STEPS, *WITHIN)), 1)
    inputs = job.union("a").batch(np.arange(BATCH, dtype=np.int64)).tokens_BS[:, :-1]
    counted = inputs != TOKENIZER.eod
    assert counted.mean() < 0.95, "too few documents to tell anything"
    assert metrics(alone)[0]["loss"] == pytest.approx(first_losses(job)[counted].mean(), rel=1e-6)
    assert metrics(alone)[0]["tokens"] == BATCH * SEQUENCE_LENGTH, "all positions are counted"


def test_a_release_is_measured_within_documents(data: TinyData, alone: Path, tmp_path: Path):
    (file,) = (alone / "evaluations").iterdir()
    (found,) = json.loads(file.read_text()).values()
    assert found["documents"] is True
    with opened(command(data, alone, *STEPS, *WITHIN)) as run:
        run.store.load(file.stem, run.state.weights())
        run.state.filled()
        model, tokens = run.state.engine.stages[0], run.job.held_out[0].dataset.tokens.astype(np.int64).tolist()
        nats = 0.0
        for start in range(0, len(tokens) - 1, SEQUENCE_LENGTH):
            for inputs, labels in pieces(tokens[start : start + SEQUENCE_LENGTH + 1]):
                with torch.no_grad():
                    nats += model.loss(torch.tensor([inputs]), torch.tensor([labels])).total.item()
    assert found["nats"] == pytest.approx(nats, rel=1e-6)


def _rank_trains(rank: int, arguments: list[str]) -> None:
    with mock.patch.object(report, "write_report", lambda run, page: SimpleNamespace(page="")):
        trained(arguments, world_of_harness())


def test_two_ranks_with_unequal_counts_tell_what_one_process_tells(
    run_ranks: Any, data: TinyData, alone: Path, tmp_path: Path
):
    run_ranks(2, _rank_trains, command(data, tmp_path / "run", *STEPS, *WITHIN, "--micro-batch-size", "1"))
    found, wanted = metrics(tmp_path / "run"), metrics(alone)
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in wanted], rel=1e-5)
    assert [line["grad_norm"] for line in found] == pytest.approx([line["grad_norm"] for line in wanted], rel=1e-4)


def test_packed_documents_are_trained_on_whole(data: TinyData, tmp_path: Path):
    flags = (*STEPS, "--pack-documents", "--reset-attention-mask")
    arguments = command(TinyData(data.increments, ()), tmp_path / "run", *flags)
    with opened(arguments) as run:
        train(run)
        job = run.job
    drawn = job.union("a").batch(np.arange(BATCH, dtype=np.int64))
    assert drawn.counted_BS is not None and 0 < drawn.counted_BS.sum() < drawn.counted_BS.size
    assert np.all(drawn.tokens_BS[:, :-1][drawn.counted_BS] != TOKENIZER.eod), "a label of another document counts"
    wanted = first_losses(job)[drawn.counted_BS].mean()
    assert metrics(tmp_path / "run")[0]["loss"] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("flag", [*WITHIN, "--pack-documents"])
def test_a_run_goes_on_only_with_the_samples_it_began_with(data: TinyData, alone: Path, flag: str, capsys):
    kept = [each for each in WITHIN if each != flag] + (["--pack-documents"] if flag not in WITHIN else [])
    assert launch(command(data, alone, *STEPS, *kept)) == 2
    assert f"{flag} was {flag in WITHIN} and is {flag not in WITHIN}" in capsys.readouterr().err


def test_what_is_within_documents_is_said_before_anything_runs(data: TinyData, tmp_path: Path):
    arguments = command(data, tmp_path / "run", *STEPS)
    told = describe_size(prepare(parse_config([*arguments, *WITHIN]), 1))
    assert "attention is within documents; positions count from each document's first token; labels after" in told
    assert "documents   " not in describe_size(prepare(parse_config(arguments), 1))


def test_a_backend_that_has_no_documents_here_is_refused(data: TinyData, tmp_path: Path, monkeypatch):
    """On a GPU the attention that takes a mask is not to be trusted: see megalrps/kernels/attention.py."""
    from megalrps.training.implementations import check_implementations

    job = prepare(parse_config(command(data, tmp_path / "run", *STEPS, WITHIN[0], "--attention-backend", "sdpa")), 1)
    monkeypatch.setattr("megalrps.training.implementations.HAS_TRITON", True)
    assert attention_module.chosen_backend("cuda", documents=False, requested="sdpa")[0] == "sdpa"
    with pytest.raises(InputError, match="--attention-backend sdpa attends within documents by a mask"):
        check_implementations(job, "cuda")
    check_implementations(job, ALONE.device.type)
