"""benchmarks/throughput.py: what its figures say is what was done, and they add up."""

import json
import multiprocessing
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))  # a benchmark is a script beside its parts

import throughput
import throughput_peers
from throughput_breakdown import GROUPS, IDLE, OTHER, TWICE, UPDATES, Breakdown, break_down, group_of_name
from throughput_report import figures, ratios
from throughput_rounds import Contender, Failed, Order, Round, Turns, Work, serve

from megalrps.commandline import run_tool
from megalrps.errors import InputError
from megalrps.model.presets import PRESETS

SHAPE = ("--preset", "llama-tiny", "--seq-length", "32", "--micro-batch-size", "2", "--device", "cpu")
VOCABULARY = 256


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def options(*flags: str) -> throughput.Options:
    return throughput.parsed(["--synthetic-vocabulary", str(VOCABULARY), *flags])[0]


def work(place: Path, updates: int) -> Work:
    """The job of SHAPE on random tokens, as the benchmark hands it to every contender."""
    chosen = options("--rounds", "1", "--steps", str(updates), "--warm-up", "1", "--profile-steps", "0")
    config, device = throughput.configured(chosen, SHAPE)
    prefix = throughput.write_random_increment(place / "random", VOCABULARY, 4 * 32 * updates + 1)
    return Work(replace(config, data=replace(config.data, increments=(prefix,))), device, 1, updates)


def trained_by_turns(
    train: Callable[[Work, Turns], list[float]], job: Work, orders: Sequence[Order]
) -> tuple[list[Any], list[float]]:
    """What a contender reports of its turns, and its losses; in this process."""
    here, there = multiprocessing.Pipe()
    for order in (*orders, None):
        here.send(order)
    losses = train(job, Turns(there, "cpu"))
    reports = []
    while here.poll():
        reports.append(here.recv())
    return reports, losses


def test_a_turn_is_as_many_updates_as_were_ordered_and_its_profile_adds_up(tmp_path: Path) -> None:
    reports, losses = trained_by_turns(
        throughput_peers.ours, work(tmp_path, 6), [Order(1), Order(2), Order(2, profiled=True)]
    )
    assert [each.updates for each in reports[:2]] == [1, 2]
    assert len(losses) == 5
    assert all(loss == pytest.approx(5.55, abs=0.15) for loss in losses)  # ln 256, of random tokens
    for each in reports[:2]:
        assert 0 < each.user + each.system <= 1.5 * each.wall + 0.02  # one thread
        assert each.peak_bytes > 4 * 3 * 350_000  # at least weights, gradients and a moment
    profile = reports[2]
    assert sum(profile.groups.values()) == pytest.approx(profile.whole, rel=1e-3)
    assert list(profile.groups) == [group for group in GROUPS if group in profile.groups]
    assert {"matmul", "attention", "norm", "rotary", "swiglu", "cross-entropy", "adamw", "clip"} <= set(profile.groups)
    assert profile.groups["adamw"] > 0 and profile.groups.get(OTHER, 0.0) < 0.3 * profile.whole


def test_a_whole_run_of_the_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a peer that is installed: same losses, rates that belong to their seconds, and all fields written."""
    peers = ["hf" if find_spec("accelerate") else "hf-loop"]
    flags = ("--rounds", "2", "--steps", "2", "--warm-up", "1", "--profile-steps", "1", "--peer", ",".join(peers))
    result = json.loads(json.dumps(throughput.measure(options(*flags), SHAPE)))
    tokens = result["tokens_per_update"]
    assert tokens == 4 * 32 and result["shape"]["micro_batch_size"] == 2
    assert result["shape"]["flops_per_token"] == flops_by_hand()
    for row in result["contenders"].values():
        assert len(row["rounds"]) == 2
        seconds = statistics.median(turn["wall"] / turn["updates"] for turn in row["rounds"])
        assert row["tokens_per_second"] * seconds == pytest.approx(tokens, rel=0.02)  # turns are rounded to 0.1 ms
        assert row["model_tflops"] * 1e12 * row["wall_seconds_per_update"] == pytest.approx(tokens * flops_by_hand())
        assert row["mfu"] is None
    for peer in peers:
        assert result["largest_loss_difference_nats"][peer] < 1e-5
        assert len(result["losses"][peer]) == len(result["losses"]["ours"]) == 1 + 2 * 2 + 1
        assert len(result["ratio"][peer]["of_rounds"]["wall"]) == 2
    for profile in result["breakdown"].values():
        assert sum(profile["groups"].values()) == pytest.approx(profile["milliseconds_per_update"], rel=1e-3)
    assert set(result["compares"]) == set(result["contenders"]) == {"ours", *peers}
    assert {"command", "date", "convention", "device", "versions", "load_average", "data"} <= set(result)
    throughput.show(result)
    shown = capsys.readouterr().out
    for said in ("full-square attention", "the first 1 updates of each are not counted", "no MFU", "ours / hf"):
        assert said in shown


def flops_by_hand() -> int:
    """6 x weights of matrix products + 12 L S d of SHAPE, with numbers: 2 layers of 128, 4 heads, 2 of keys, 344."""
    layer = 128 * 128 + 2 * 128 * 64 + 128 * 128 + 3 * 128 * 344
    return 6 * (2 * layer + VOCABULARY * 128) + 12 * 2 * 32 * 128


def invented(peak: float | None) -> dict[str, Any]:
    return {
        "tokens_per_update": 512,
        "shape": {"flops_per_token": 2_000_000_000},
        "device": {"dense_bf16_peak_tflops": peak},
    }


def test_figures_are_medians_of_an_update_and_mfu_is_given_where_a_peak_is_known() -> None:
    turns = [Round(4, wall, 0.5 * wall, 0.1 * wall, peak) for wall, peak in ((0.4, 7), (0.04, 9), (0.08, 8))]
    row = figures(turns, invented(989.4))
    assert row["tokens_per_second"] == pytest.approx(512 / 0.02)
    assert row["tokens_per_cpu_second"] == pytest.approx(512 / 0.012)
    assert row["model_tflops"] == pytest.approx(51.2)
    assert row["mfu"] == pytest.approx(51.2 / 989.4)
    assert row["peak_bytes"] == 9
    assert figures(turns, invented(None))["mfu"] is None


def test_a_ratio_above_one_says_that_ours_is_faster() -> None:
    ours, peer = ([Round(1, wall, wall, 0.0, 10)] * 3 for wall in (0.5, 1.0))
    rows = {"ours": figures(ours, invented(None)), "peer": figures(peer, invented(None))}
    found = ratios(rows, "peer")
    assert found["tokens_per_second"] == found["tokens_per_cpu_second"] == 2.0
    assert found["median_of_rounds"] == found["of_minima"] == {"wall": 2.0, "cpu": 2.0}


def event(name: str, start: float, end: float, **more: Any) -> SimpleNamespace:
    span = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
    usual = {"device_type": "DeviceType.CPU", "kernels": [], "cpu_parent": None, "sequence_nr": -1, "thread": 1}
    return SimpleNamespace(**{"name": name, "time_range": span, "is_user_annotation": False, **usual, **more})


def on_device(name: str, start: float, end: float, **more: Any) -> SimpleNamespace:
    return event(name, start, end, device_type="DeviceType.CUDA", **more)


def cuda_profile(second: tuple[float, float] = (30, 40)) -> Breakdown:
    """An elementwise kernel that an operator of SwiGLU launched, a matrix product, and a kernel nobody launched."""
    linked = [SimpleNamespace(name="vectorized_elementwise", duration=10)]
    root = event(UPDATES, 0, 100)
    swiglu = event("megalrps::swiglu", 1, 5, cpu_parent=root)
    launch = event("aten::mul", 2, 3, kernels=linked, cpu_parent=swiglu)
    kernels = [
        on_device("vectorized_elementwise", 10, 20),
        on_device("sm90_xmma_gemm_bf16", *second),
        on_device("Memset (Device)", 50, 55),
        on_device("Optimizer.step#AdamW.step", 0, 90, is_user_annotation=True),
    ]
    return break_down([root, swiglu, launch, *kernels], 1, on_cuda=True)


def test_on_cuda_kernels_and_idle_time_add_up_to_the_whole() -> None:
    profile = cuda_profile()
    expected = {"matmul": 10e-6, "swiglu": 10e-6, OTHER: 5e-6, IDLE: 75e-6}
    assert profile.groups == pytest.approx(expected)
    assert profile.whole == pytest.approx(sum(profile.groups.values()))


def test_kernels_side_by_side_are_not_counted_as_idle_time() -> None:
    profile = cuda_profile(second=(15, 25))
    assert profile.groups[IDLE] == pytest.approx(80e-6) and profile.groups[TWICE] == pytest.approx(-5e-6)
    assert profile.whole == pytest.approx(sum(profile.groups.values()))


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("aten::mm", "matmul"),
        ("aten::addmm", "matmul"),
        ("nvjet_hsh_128x256", "matmul"),
        ("aten::comma", None),
        ("void pytorch_flash::flash_fwd_kernel<cutlass::bfloat16_t>", "attention"),
        ("megalrps::rms_norm", "norm"),
        ("_adamw_kernel", "adamw"),
        ("aten::_log_softmax", "cross-entropy"),
        ("aten::mul", None),
    ],
)
def test_names_tell_the_operation(name: str, group: str | None) -> None:
    assert group_of_name(name) == group


def test_an_unknown_peer_ends_with_one_line_that_names_the_known_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["throughput.py", "--peer", "hf-loop,nobody"])
    with pytest.raises(SystemExit) as ended:
        run_tool(throughput.main, "throughput.py")
    assert ended.value.code == 2
    said = "--peer nobody is unknown: it is one of hf, hf-loop, torch-compile, litgpt"
    assert capsys.readouterr().err == f"throughput.py: error: {said}\n"


def test_a_missing_package_is_named_with_its_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput_peers, "find_spec", lambda name: None if name == "accelerate" else True)
    with pytest.raises(InputError, match=r"--peer hf needs accelerate: pip install accelerate"):
        throughput_peers.check_peer("hf")
    throughput_peers.check_peer("hf-loop")


@pytest.mark.parametrize(
    ("own", "rest", "message"),
    [
        (("--rounds", "0"), (), "--rounds 0: must be at least 1"),
        (("--profile-steps", "-1"), (), "--profile-steps -1: must be at least 0"),
        (("--output", "no/such/place.json"), (), "there is no directory no/such"),
        ((), ("--preset", "llama-9b"), "--preset llama-9b is unknown"),
        ((), ("--tensor-model-parallel-size", "2"), "of one process"),
        ((), ("--global-batch-size", "5", "--micro-batch-size", "2"), "--micro-batch-size 2 does not divide the 5"),
        (("--peer", "hf-loop"), ("--fp16",), "--fp16: peers are run in fp32 or bf16"),
        (("--data", "no/increment"), (), "no/increment"),
    ],
)
def test_bad_input_is_refused_before_anything_is_started(own: Any, rest: Any, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        throughput.measure(options(*own), ("--device", "cpu", *rest))


def test_precision_is_fp32_on_the_cpu_unless_said_otherwise() -> None:
    assert not throughput.configured(options(), ("--device", "cpu"))[0].training.bf16
    assert throughput.configured(options(), ("--device", "cpu", "--bf16"))[0].training.bf16
    assert throughput.configured(options(), ("--device", "cpu"))[0].model == PRESETS["llama-20m"]


def _refuses(_: Work, turns: Turns) -> list[float]:
    raise InputError("lower something")


def _breaks(_: Work, turns: Turns) -> list[float]:
    raise ZeroDivisionError("a defect")


def test_a_contender_that_fails_says_so(tmp_path: Path) -> None:
    here, there = multiprocessing.Pipe()
    job = work(tmp_path, 1)
    serve(_refuses, job, there)
    assert here.recv() == Failed("lower something", True)
    serve(_breaks, job, there)
    told = here.recv()
    assert not told.from_user and "ZeroDivisionError: a defect" in told.text


def test_a_contender_that_is_ended_from_outside_is_reported(tmp_path: Path) -> None:
    contender = Contender("hf", throughput_peers.ours, work(tmp_path, 1))
    contender.stop()
    with pytest.raises(InputError, match=r"hf was ended from outside \(exit code -9\): where memory ran out, lower"):
        contender.run(1)
