"""Fixtures for all rooms."""

from collections.abc import Callable
from typing import Any

import distributed_harness
import pytest


@pytest.fixture
def run_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Any]]:
    """``run_ranks(world_size, function, *args, timeout=60)``: results by rank of ``function(rank, *args)`` over gloo.

    ``function`` is a module-level function of the test's file; see distributed_harness.
    """

    def run(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
        rendezvous = tmp_path_factory.mktemp("ranks") / "rendezvous"
        return distributed_harness.run_ranks(rendezvous, world_size, function, *args, timeout=timeout)

    return run
