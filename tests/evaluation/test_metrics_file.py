"""metrics.jsonl as a killed run, a restarted run and a careless hand leave it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalrps.errors import InputError
from megalrps.evaluation.metrics_file import read_metrics, smoothed


def line(path: str, step: int, loss: float = 3.0, **more: Any) -> str:
    return json.dumps({"path": path, "step": step, "loss": loss, "lr": 1e-3, "tokens": 10 * step, **more}) + "\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def test_records_come_in_order_of_execution(file: Path) -> None:
    file.write_text(line("main", 1) + line("main", 2) + line("v1", 3) + line("main", 3))
    metrics = read_metrics(file)
    assert [(record.path, record.step) for record in metrics.records] == [
        ("main", 1),
        ("main", 2),
        ("v1", 3),
        ("main", 3),
    ]
    assert metrics.of("main").steps.tolist() == [1, 2, 3]
    assert not metrics.torn
    assert metrics.repeated == 0


@given(cut=st.integers(1, 60))
def test_only_a_torn_last_line_is_tolerated_and_it_is_told(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    file = tmp_path_factory.mktemp("torn") / "metrics.jsonl"
    file.write_text(line("main", 1) + line("main", 2) + line("main", 3)[:-1][:cut])
    metrics = read_metrics(file)
    assert metrics.torn
    assert [record.step for record in metrics.records] == [1, 2]


@pytest.mark.parametrize("bad", ['{"path": "main", "ste\n', "[]\n", "\n", line("main", 1).replace("0.001", '"x"')])
def test_a_bad_line_elsewhere_is_refused_by_its_number(file: Path, bad: str) -> None:
    file.write_text(line("main", 1) + bad + line("main", 2))
    with pytest.raises(InputError, match=r"metrics\.jsonl \(line 2\): .*; give the run's own metrics\.jsonl"):
        read_metrics(file)


@pytest.mark.parametrize("missing", ["path", "step", "loss", "lr", "tokens"])
def test_a_line_without_a_member_names_it(file: Path, missing: str) -> None:
    value = json.loads(line("main", 1))
    del value[missing]
    file.write_text(json.dumps(value) + "\n")
    with pytest.raises(InputError, match=f"no '{missing}'"):
        read_metrics(file)


def test_a_log_may_say_more(file: Path) -> None:
    file.write_text(line("main", 1, tokens_per_second=5.0, mfu=None, weather="fine"))
    record = read_metrics(file).records[0]
    assert (record.tokens_per_second, record.mfu) == (5.0, None)


def test_a_step_trained_again_counts_once_with_its_later_record(file: Path) -> None:
    file.write_text(line("main", 1) + line("main", 2, 9.0) + line("v1", 3) + line("main", 2, 4.0))
    metrics = read_metrics(file)
    assert metrics.repeated == 1
    assert [(record.path, record.step, record.loss) for record in metrics.records] == [
        ("main", 1, 3.0),
        ("v1", 3, 3.0),
        ("main", 2, 4.0),
    ]


def test_a_file_that_is_missing_or_empty_is_named(file: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_metrics(file)
    file.write_text('{"path"')
    with pytest.raises(InputError, match="no whole record"):
        read_metrics(file)


LOSSES = st.lists(st.floats(0, 20), min_size=1, max_size=60)


@given(LOSSES, st.floats(1, 30))
def test_an_average_lies_between_the_least_and_the_greatest_so_far(losses: list[float], memory: float) -> None:
    averages = smoothed(np.array(losses), memory)
    for index, average in enumerate(averages, start=1):
        assert min(losses[:index]) - 1e-9 <= average <= max(losses[:index]) + 1e-9


@given(LOSSES, st.floats(1, 30))
def test_what_is_no_number_leaves_the_average_where_it_was(losses: list[float], memory: float) -> None:
    spoilt = np.array([*losses, np.nan, np.inf, 2.0])
    averages, clean = smoothed(spoilt, memory), smoothed(np.array([*losses, 2.0]), memory)
    assert averages[: len(losses)].tolist() == clean[:-1].tolist()
    assert averages[len(losses)] == averages[len(losses) + 1] == clean[-2]
    assert averages[-1] == clean[-1]


def test_before_the_first_number_there_is_no_average() -> None:
    assert np.isnan(smoothed(np.array([np.nan, 3.0]), 5)).tolist() == [True, False]


def test_a_memory_of_one_step_is_the_loss_itself() -> None:
    assert smoothed(np.array([5.0, 1.0, 3.0]), 1).tolist() == [5.0, 1.0, 3.0]
