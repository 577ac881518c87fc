"""The data that most tests of the training room share, and the run that nothing has disturbed."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_job import TinyData, command, make_data, trained

from megalrps.evaluation import report

STEPS = (10, 8, 10)
"""Steps of the increments. At alpha 0.6: forks at 4, 13 and 22, releases at 10, 18 and 28, 39 steps in all."""


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """No drawings: a report costs more than the training it tells of."""
    monkeypatch.setattr(report, "write_report", lambda run, page: SimpleNamespace(page=page))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    """Three increments; not to be written to."""
    return make_data(tmp_path_factory.mktemp("data"), STEPS)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, data: TinyData) -> Path:
    """The directory of a run by path switching over all increments, saved every third step; not to be written to."""
    return trained(command(data, tmp_path_factory.mktemp("undisturbed") / "run", "--save-interval", "3"))
