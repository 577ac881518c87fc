"""metrics.jsonl keeps what a checkpoint covers, drops what was lost, and refuses what it does not know."""

import json

import pytest

from megalrps.errors import InputError
from megalrps.training.metrics import MetricsFile, StepMetrics


def line(path: str, step: int) -> StepMetrics:
    return StepMetrics(path, "v1", step, 3.0, 1e-3, 1.0, step * 64, step, 0.1, 640.0)


def written(path):
    return [(entry["path"], entry["step"]) for entry in map(json.loads, path.read_text().splitlines())]


def test_every_step_is_a_line_in_order(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path, {}) as metrics:
        for step in (1, 2, 3):
            metrics.write(line("main", step))
    assert written(path) == [("main", 1), ("main", 2), ("main", 3)]


def test_lines_beyond_the_last_checkpoint_of_their_path_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path, {}) as metrics:
        for step in (1, 2):
            metrics.write(line("main", step))
        for step in (3, 4, 5):
            metrics.write(line("v1", step))
    with MetricsFile(path, {"main": 2, "v1": 3}) as metrics:
        assert metrics.dropped == 2
        metrics.write(line("v1", 4))
    assert written(path) == [("main", 1), ("main", 2), ("v1", 3), ("v1", 4)]


def test_half_a_last_line_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path, {}) as metrics:
        metrics.write(line("main", 1))
        metrics.write(line("main", 2))
    path.write_bytes(path.read_bytes()[:-9])
    with MetricsFile(path, {"main": 2}):
        pass
    assert written(path) == [("main", 1)]


def test_a_line_that_is_no_metrics_is_refused_by_its_number(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"path": "main", "step": 1}\nnonsense\n{"path": "main", "step": 2}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl:2"):
        MetricsFile(path, {"main": 2})
    assert "nonsense" in path.read_text(), "the file must be left as it was"


def test_lines_of_steps_that_are_made_again_are_dropped_and_new_ones_follow(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path, {}) as metrics:
        for name, steps in (("main", (1, 2)), ("v1", (3, 4, 5)), ("main", (3, 4, 5))):
            for step in steps:
                metrics.write(line(name, step))
        assert metrics.drop("v1", 3, 5) == 2
        assert metrics.drop("v1", 3, 5) == 0
        metrics.write(line("v1", 4))
        metrics.sync()
        assert written(path) == [("main", 1), ("main", 2), ("v1", 3), ("main", 3), ("main", 4), ("main", 5), ("v1", 4)]


def test_a_line_is_seen_as_soon_as_it_is_written(tmp_path):
    with MetricsFile(tmp_path / "metrics.jsonl", {}) as metrics:
        metrics.write(line("main", 1))
        assert written(tmp_path / "metrics.jsonl") == [("main", 1)]
