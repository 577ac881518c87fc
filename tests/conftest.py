"""Fixtures for all rooms."""

from collections.abc import Callable
from typing import Any

import distributed_harness
import pytest
import torch
import triton_interpreter  # noqa: F401 - it must come before any kernel


@pytest.fixture
def run_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Any]]:
    """``run_ranks(world_size, function, *args, timeout=60)``: results by rank of ``function(rank, *args)`` over gloo.

    ``function`` is a module-level function of the test's file; see distributed_harness.
    """

    def run(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
        rendezvous = tmp_path_factory.mktemp("ranks") / "rendezvous"
        return distributed_harness.run_ranks(rendezvous, world_size, function, *args, timeout=timeout)

    return run


# Files are shared out in this order, a file to whoever is free: the long ones first, so that short ones come last.
LONG_FIRST = ("test_readme.py", "test_two_nodes.py", "test_examples.py", "test_kernels_command.py")
ROOMS_IN_TURN = ("training", "faults", "parallel", "kernels", "tests")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; skip what needs a GPU where there is none, and say so in the summary (pytest -ra)."""
    rank = {name: place for place, name in enumerate((*LONG_FIRST, *ROOMS_IN_TURN))}
    items.sort(key=lambda item: rank.get(item.path.name, rank.get(item.path.parent.name, len(rank))))
    needing = [item for item in items if item.get_closest_marker("gpu")]
    if needing and not torch.cuda.is_available():
        for item in needing:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
