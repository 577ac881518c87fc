"""Hostile arguments to every function of ``megalrps._native``: an exception or the right answer, soon, never a crash.

Calls are drawn at random. What must come of each is decided from its arguments alone: refused, or answered as the twin
in numpy or torch answers. An address is trusted to be that of the caller's memory (csrc/module.cpp says so), so lengths
that do not fit the memory are tried through the functions that take tensors and arrays.

All of it runs in a process of its own, where a signal is seen as such. As a script (``make sanitize``) it makes the
same calls to an extension that was built with sanitizers: ``test_native_arguments.py EXTENSION CALLS SEED``.
"""

import contextlib
import importlib.util
import itertools
import json
import os
import random
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile_calls as arrays
import hostile_memory as memory
import hostile_windows as windows
import pytest
import torch
from counts import count, record, seed
from distributed_harness import processes

CALLS = count("F12", small=3_000, full=200_000)

Family = Callable[[random.Random, Any], str]
FAMILIES: tuple[Family, ...] = (
    arrays.call_permute,
    arrays.call_keyed_permutation,
    arrays.call_word_pieces,
    windows.call_gather,
    windows.call_document_starts,
    windows.call_packing,
    windows.call_fill_packed,
    memory.call_adamw,
    memory.call_sum_of_squares,
    memory.call_pieces_of,
    memory.call_without_arguments,
    memory.call_cuda,
    memory.call_adamw_of_tensors,
    memory.call_sum_of_tensors,
)


def make_calls(native: Any, total: int, chosen_seed: int, in_hand: Callable[[str], None]) -> dict[str, Counter[str]]:
    """The outcomes by family; each call is drawn from (seed, number) alone. ``in_hand`` is told of it beforehand."""
    outcomes: dict[str, Counter[str]] = {family.__name__: Counter() for family in FAMILIES}
    torch.set_num_threads(1)
    for family, number in itertools.product(FAMILIES, range(10)):
        with contextlib.suppress(arrays.WrongAnswerError):  # imports of first calls are not counted among their seconds
            family(random.Random(number), native)
    for number in range(total):
        family = FAMILIES[number % len(FAMILIES)]
        in_hand(f"{number:9d} {family.__name__:25}")
        try:
            outcome = family(random.Random(f"{chosen_seed} {number}"), native)
        except arrays.WrongAnswerError as error:
            outcome = f"wrong: {error} (call {number})"
        outcomes[family.__name__][outcome] += 1
    return outcomes


def call_in_a_process(folder: Path, total: int, chosen_seed: int) -> None:
    import megalrps._native as native

    log = os.open(folder / "in_hand", os.O_WRONLY | os.O_CREAT)
    outcomes = make_calls(native, total, chosen_seed, lambda words: os.pwrite(log, words.encode(), 0))
    os.close(log)
    (folder / "outcomes.json").write_text(json.dumps(outcomes))


def failures_of(outcomes: dict[str, Counter[str]]) -> list[str]:
    return [f"{family}: {outcome}" for family, each in outcomes.items() for outcome in each if "wrong" in outcome]


@pytest.mark.timeout(1800)
def test_hostile_arguments_are_refused_or_answered_rightly(tmp_path: Path) -> None:
    pytest.importorskip("megalrps._native", reason="megalrps._native is not built here")
    process = processes().Process(target=call_in_a_process, args=(tmp_path, CALLS, seed()))
    process.start()
    process.join(1700)
    process.kill()
    process.join()
    in_hand = (tmp_path / "in_hand").read_text() if (tmp_path / "in_hand").exists() else "none"
    assert process.exitcode == 0, f"ended with {process.exitcode} in call {in_hand} (seed {seed()})"
    outcomes = json.loads((tmp_path / "outcomes.json").read_text())
    failures = failures_of(outcomes)
    totals = sum((Counter(each) for each in outcomes.values()), Counter())
    refused = sum(number for outcome, number in totals.items() if outcome.startswith("refused"))
    record("F12", calls=CALLS, refused=refused, right=totals["right"], wrong=len(failures), signals=0, seed=seed())
    assert not failures, f"seed {seed()}: " + "; ".join(failures[:5])
    for name, each in outcomes.items():
        if "not tried" not in each:
            assert any(outcome.startswith("refused") for outcome in each), f"{name}: nothing hostile was tried"
            assert name == "call_cuda" or each.get("right", 0) > 0, f"{name}: nothing sound was tried"


def main(extension: str, total: str, chosen_seed: str) -> None:
    """Load ``extension`` in the place of megalrps._native, make the calls in this process, say what came of them."""
    spec = importlib.util.spec_from_file_location("megalrps._native", extension)
    assert spec is not None and spec.loader is not None
    native = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(native)
    sys.modules["megalrps._native"] = native
    outcomes = make_calls(native, int(total), int(chosen_seed), lambda words: None)
    failures = failures_of(outcomes)
    calls = sum((Counter(each) for each in outcomes.values()), Counter())
    print(f"{extension}: {calls.total()} calls, seed {chosen_seed}, {calls['right']} answered, {len(failures)} wrong")
    if failures:
        sys.exit("\n".join(failures[:20]))


if __name__ == "__main__":
    main(*sys.argv[1:])
