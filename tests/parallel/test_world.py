"""The ranks of a launch: what one decides all know, and an error of one is an error of all."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_job import ALONE, world_of_harness

from megalrps.errors import InputError
from megalrps.parallel.world import World, open_world

TORCHRUN = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
ERRORS = (InputError("--save x is taken"), RuntimeError("the disk is gone"), KeyError("a defect"))


def raising(error: Exception | None) -> Callable[[], str]:
    def act() -> str:
        if error is not None:
            raise error
        return "done"

    return act


def outcome(act: Callable[[], Any]) -> tuple[str, str]:
    """The kind and the text of what ``act`` gives or raises."""
    try:
        return "value", str(act())
    except Exception as error:
        return type(error).__name__, str(error)


def still_together(world: World) -> bool:
    """Whether a collective after what has happened gives every rank the right sum."""
    return world.sum_(torch.ones(3)).tolist() == [world.size] * 3


def _decide(rank: int) -> tuple[str, list[int]]:
    world, asked = world_of_harness(), []

    def look() -> str:
        asked.append(rank)
        return f"seen by {rank}"

    return world.decided(look), asked


def _decide_with_error(rank: int, error: Exception) -> tuple[tuple[str, str], bool]:
    world = world_of_harness()
    return outcome(lambda: world.decided(raising(error))), still_together(world)


def _act_together(rank: int, failing: int, error: Exception) -> tuple[tuple[str, str], bool]:
    world = world_of_harness()
    return outcome(lambda: world.together(raising(error if rank == failing else None))), still_together(world)


def _agree_on_two_errors(rank: int) -> list[tuple[str, str]]:
    world = world_of_harness()
    both = outcome(lambda: world.agree(InputError(f"of rank {rank}")))
    return [both, outcome(lambda: world.agree(None))]


def test_what_the_first_rank_sees_all_ranks_know(run_ranks):
    answers = run_ranks(3, _decide)
    assert [answer for answer, _ in answers] == ["seen by 0"] * 3
    assert [asked for _, asked in answers] == [[0], [], []]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_of_the_decision_reaches_all_ranks(run_ranks, error: Exception):
    (first, first_sums), *others = run_ranks(3, _decide_with_error, error)
    assert first == (type(error).__name__, str(error))
    expected = ("RepeatedError", str(error)) if isinstance(error, InputError) else ("RuntimeError", f"rank 0: {error}")
    assert [told for told, _ in others] == [expected] * 2
    assert first_sums and all(sums for _, sums in others), "the ranks wait for different collectives"


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_any_rank_reaches_all(run_ranks, failing: int):
    for (told, sums), rank in zip(run_ranks(2, _act_together, failing, ERRORS[1]), range(2), strict=True):
        assert told == ("RuntimeError", str(ERRORS[1]) if rank == failing else f"rank {failing}: {ERRORS[1]}")
        assert sums


def test_one_rank_alone_reports_a_mistake_and_none_where_there_is_none(run_ranks):
    for outcomes, kind in zip(run_ranks(2, _agree_on_two_errors), ("InputError", "RepeatedError"), strict=True):
        assert outcomes == [(kind, "of rank 0"), ("value", "None")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_process_alone_raises_what_was_raised(error: Exception):
    for collective in (ALONE.decided, ALONE.together):
        with pytest.raises(type(error)) as caught:
            collective(raising(error))
        assert caught.value is error
        assert collective(raising(None)) == "done"
    with pytest.raises(type(error)):
        ALONE.agree(error)
    ALONE.agree(None)


def test_without_torchrun_the_world_is_one_process():
    with open_world({}, device="cpu", backend=None, timeout_minutes=1) as world:
        assert world == World(0, 1, torch.device("cpu"), None)
        assert world.is_first and still_together(world)
    assert not torch.distributed.is_initialized()


def test_torchruns_variables_make_a_group_that_ends_with_the_block(monkeypatch: pytest.MonkeyPatch):
    environment = TORCHRUN | {"MASTER_PORT": "0"}  # any free port
    for name, value in environment.items():
        monkeypatch.setenv(name, value)  # torch.distributed reads the address itself
    for _ in range(2):  # the second launch in a process finds nothing of the first
        with open_world(os.environ, device="cpu", backend=None, timeout_minutes=1) as world:
            assert (world.rank, world.size, world.device.type) == (0, 1, "cpu")
            assert torch.distributed.get_backend(world.group) == "gloo" and still_together(world)
        assert not torch.distributed.is_initialized()


def test_the_group_ends_with_an_error_too(monkeypatch: pytest.MonkeyPatch):
    for name, value in (TORCHRUN | {"MASTER_PORT": "0"}).items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(KeyError),
        open_world(os.environ, device="cpu", backend=None, timeout_minutes=1),
    ):
        raise KeyError("a defect")
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("missing", ["WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_half_of_torchruns_variables_are_refused_by_name(missing: str):
    environment = {name: value for name, value in TORCHRUN.items() if name != missing}
    with (
        pytest.raises(InputError, match=f"RANK is set but {missing} is not"),
        open_world(environment, device="cpu", backend=None, timeout_minutes=1),
    ):
        pass


@pytest.mark.parametrize(
    ("device", "complaint"),
    [
        ("tpu", "--device tpu is unknown: use auto, cpu or cuda"),
        pytest.param(
            "cuda",
            "--device cuda: no CUDA device is visible",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_a_device_that_is_not_there_is_refused(device: str, complaint: str):
    with (
        pytest.raises(InputError, match=complaint),
        open_world({}, device=device, backend=None, timeout_minutes=1),
    ):
        pass


def test_ranks_that_gloo_does_not_connect_are_told_what_to_set(monkeypatch: pytest.MonkeyPatch):
    def unreachable(*_: Any, **__: Any) -> None:
        raise RuntimeError("Gloo connectFullMesh failed with Connect timeout [none]")

    monkeypatch.setattr(torch.distributed, "init_process_group", unreachable)
    with (
        pytest.raises(InputError, match=r"rank 0 .* GLOO_SOCKET_IFNAME .*Connect timeout"),
        open_world(TORCHRUN, device="cpu", backend=None, timeout_minutes=1),
    ):
        pass
