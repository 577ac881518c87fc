"""The main job on a GPU: it equals the CPU's within rounding, resumes bit for bit, and knows its peak."""

from pathlib import Path

import pytest
import torch
from tiny_job import SEQUENCE_LENGTH, TinyData, command, differing, make_data, metrics, opened, tensors

from megalrps.parallel.world import World
from megalrps.training.loop import train
from megalrps.training.throughput import peak_flops

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return make_data(tmp_path_factory.mktemp("data"), (8, 8))


def train_on(device: str, data: TinyData, run: Path, *flags: str) -> Path:
    world = World(0, 1, torch.device(device), None)
    with opened(command(data, run, "--device", device, *flags), world) as opened_run:
        train(opened_run)
    return run


def test_the_losses_are_the_cpus_within_rounding(data: TinyData, tmp_path: Path):
    torch.backends.cuda.matmul.allow_tf32 = False
    losses = [
        [line["loss"] for line in metrics(train_on(device, data, tmp_path / device))] for device in ("cpu", "cuda")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=2e-4)


def test_a_run_in_two_launches_equals_one_bit_for_bit(data: TinyData, tmp_path: Path):
    whole = train_on("cuda", data, tmp_path / "whole")
    train_on("cuda", data.first(1), tmp_path / "parts")
    parts = train_on("cuda", data, tmp_path / "parts")
    assert differing(tensors(whole, "v2-00000016"), tensors(parts, "v2-00000016")) == []


def test_bf16_trains(data: TinyData, tmp_path: Path):
    lines = metrics(train_on("cuda", data, tmp_path / "run", "--bf16"))
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[0]["tokens"] == 8 * SEQUENCE_LENGTH


def test_mfu_is_logged_exactly_where_the_peak_is_known(data: TinyData, tmp_path: Path):
    known = peak_flops(torch.cuda.get_device_name(), bf16=True) is not None
    lines = metrics(train_on("cuda", data, tmp_path / "run", "--bf16"))
    assert all((line["mfu"] is not None) == known for line in lines)
