"""Options of the fault tests: ``pytest tests/faults --full-faults`` injects the full number of faults, freshly drawn.

A run of the whole suite injects the small numbers, from a fixed seed; the options are known where this folder is named.
"""

import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import counts
import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options, of which counts.py holds what they say."""
    group = parser.getgroup("faults", "injected faults (tests/faults)")
    group.addoption("--full-faults", action="store_true", help="the full counts of faults, from a fresh seed")
    group.addoption("--faults-seed", type=int, default=None, help="the seed of the faults (to repeat a run)")
    group.addoption("--faults-json", type=Path, default=None, help="file for the figures recorded, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    """Hand the options to counts.py; where there are workers, they get the seed that their controller drew."""
    is_worker = hasattr(config, "workerinput")
    full = config.getoption("full_faults", default=False)
    seed = getattr(config, "workerinput", {}).get("faults_seed", config.getoption("faults_seed", default=None))
    if seed is None:
        seed = int.from_bytes(os.urandom(4)) if full else counts.FIXED_SEED
    json_file = config.getoption("faults_json", default=None)
    counts.SESSION = counts.Session(full, seed, None if json_file is None else Path(json_file).resolve())
    if counts.SESSION.parts is not None and not is_worker:
        counts.SESSION.parts.unlink(missing_ok=True)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """The controller's seed on its way to the worker ``node`` of xdist."""
    node.workerinput["faults_seed"] = counts.seed()


def pytest_report_header(config: pytest.Config) -> str:
    """The seed, so that a failure can be repeated."""
    return f"faults: {'full' if counts.SESSION.full else 'small'} counts, seed {counts.seed()}"


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Merge what was recorded; xdist's workers have ended when the controller comes here."""
    if not hasattr(session.config, "workerinput"):
        counts.write_figures()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Name the seed in every failure."""
    report = yield
    if report.failed:
        report.sections.append(("faults", f"--faults-seed {counts.seed()}{' --full-faults' * counts.SESSION.full}"))
    return report
