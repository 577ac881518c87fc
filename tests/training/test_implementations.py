"""Who computes attention and the update: by flag, refused where it cannot, named in the log, of the same numbers."""

from pathlib import Path

import pytest
from tiny_job import TinyData, command, launch, make_data, metrics

from megalrps.config import parse_config
from megalrps.errors import InputError
from megalrps.training.implementations import check_implementations, describe_implementations
from megalrps.training.prepare import Job, prepare

DEVICES = ("cpu", "cuda")


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return make_data(tmp_path_factory.mktemp("one"), (6,))


@pytest.fixture(scope="module")
def losses(one: TinyData, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return trained(one, tmp_path_factory.mktemp("auto"))


def trained(data: TinyData, run: Path, *flags: str) -> list[float]:
    assert launch(command(data, run, *flags)) == 0
    return [line["loss"] for line in metrics(run)]


def job(data: TinyData, *flags: str) -> Job:
    return prepare(parse_config(command(data, Path("unused"), *flags)), 1)


@pytest.mark.parametrize(
    "flags",
    [
        ("--attention-backend", "reference"),
        ("--attention-backend", "sdpa", "--optimizer-backend", "torch"),
        ("--cross-entropy-fusion-impl", "linear", "--loss-chunk-tokens", "7"),
    ],
    ids=" ".join,
)
def test_every_implementation_trains_to_the_same_losses(
    one: TinyData, losses: list[float], tmp_path: Path, flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]
):
    assert trained(one, tmp_path / "run", *flags) == pytest.approx(losses, rel=2e-5)
    printed = capsys.readouterr().out
    if "--attention-backend" in flags:
        assert f"attention   {flags[1]} (--attention-backend)" in printed
    if "--optimizer-backend" in flags:
        assert "optimizer   AdamW by torch (asked for)" in printed


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--attention-backend", "triton"), "--attention-backend triton: Triton kernels need a CUDA device"),
        (("--attention-backend", "flash"), "--attention-backend flash: the package flash-attn needs a CUDA device"),
        (("--optimizer-backend", "cuda"), "--optimizer-backend cuda updates tensors on a CUDA device"),
        (("--optimizer-backend", "torch", "--exp-avg-dtype", "bf16"), "leave --exp-avg-dtype and --exp-avg-sq-dtype"),
        (("--loss-chunk-tokens", "64"), "--loss-chunk-tokens 64 needs --cross-entropy-fusion-impl linear: add it"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_compute_is_refused_before_a_file_is_written(
    one: TinyData, tmp_path: Path, flags: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
):
    assert launch(command(one, tmp_path / "run", *flags)) == 2
    message = capsys.readouterr().err
    assert told in message and message.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_gpu_needs_triton(one: TinyData, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("megalrps.training.implementations.HAS_TRITON", False)
    with pytest.raises(InputError, match="pip install 'megalrps\\[gpu\\]'"):
        check_implementations(job(one), "cuda")
    check_implementations(job(one), "cpu")


def test_the_optimizer_is_checked_where_its_state_lies(one: TinyData):
    check_implementations(job(one, "--optimizer-backend", "triton"), "cuda")
    with pytest.raises(InputError, match="these are on cpu"):
        check_implementations(job(one, "--optimizer-backend", "triton", "--optimizer-cpu-offload"), "cuda")


@pytest.mark.parametrize("device", DEVICES)
def test_the_log_names_all_four(one: TinyData, device: str):
    lines = list(describe_implementations(job(one), device))
    assert [line.split()[0] for line in lines] == ["samples", "attention", "optimizer"]
    assert lines[1].endswith({"cpu": "other kernels: torch", "cuda": "other kernels: triton"}[device])
