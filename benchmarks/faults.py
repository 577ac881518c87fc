"""Inject every fault of tests/faults, in full numbers and from a fresh seed, and write what came of them.

    python benchmarks/faults.py --output benchmarks/results/faults.json      (make faults)

The tests' figures, by fault, under a head that says when, on what and from which seed; the tables of
docs/reliability.md are made of it. Nothing is written when a test fails: the seed that is printed repeats it, and what
has passed with that seed (build/faults/SEED) is not run again. The page alone, from the figures that are there:
``--pages-only``.
"""

import argparse
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy
import torch
from machine import processor

import megalrps

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "faults.json"
PAGE = ROOT / "docs" / "reliability.md"
BLOCK = re.compile(r"(<!-- (\w+): from benchmarks/results/faults\.json -->\n).*?(<!-- end -->)", re.DOTALL)
SECONDS_A_TEST = 1800
LONG = ("test_power_loss", "test_kills", "test_histories", "test_killed_preprocessing", "test_stop_signals")
"""What takes longest, and so comes first."""

Faults = Mapping[str, Mapping[str, Any]]


def table(header: tuple[str, ...], *rows: tuple[str, ...]) -> str:
    """A Markdown table."""
    return "".join(f"| {' | '.join(row)} |\n" for row in (header, ("---",) * len(header), *rows))


def kills(faults: Faults) -> str:
    """F1."""
    found = faults["F1"]
    operations = sum(number for name, number in found.items() if name.startswith("kills_"))
    return (
        f"{found['kills']} kills in shards and between steps, {operations} at file operations: {found['lost']} lost, "
        f"{found['torn']} torn; next launch open after {found['slowest_take_over_seconds']:.1f} s at most"
    )


def power(faults: Faults) -> str:
    """F2."""
    return f"{faults['F2']['states']:,} states of the disk: {faults['F2']['violations']} violations"


def killed_training(faults: Faults) -> str:
    """F3."""
    found = faults["killed training"]
    return (
        f"{found['equal']} of {found['cases']} killed runs end in the same bits; at most {found['most_lost']} updates "
        f"done again at --save-interval {found['interval']}"
    )


def damage(faults: Faults) -> str:
    """F4."""
    found = faults["F4"].values()
    return f"{sum(each['refused'] for each in found):,} of {sum(each['cases'] for each in found):,} damages refused"


def full_disk(faults: Faults) -> str:
    """F5."""
    refused = sum(number for name, number in faults["F5"].items() if name.startswith("refused writes"))
    return f"{refused} writes refused in turn, and a disk of 1 MiB: nothing lost, nothing half-made"


def payloads(faults: Faults) -> str:
    """F13."""
    found = faults["F13"]
    return (
        f"{found['payloads_run']} of {found['payloads_tried']} payloads run; {found['claims_accepted']} of "
        f"{found['claims']} false claims accepted, {found['largest_growth_bytes'] / 2**20:.1f} MiB taken at most; "
        f"{found['headers']} hostile manifests: {found['slowest_seconds_per_megabyte']:.2f} s a MB, "
        f"{found['memory_times_a_manifest']:.0f} times their size, at most"
    )


def states(faults: Faults) -> str:
    """F16."""
    return f"{len(faults['F16'])} states"


def datasets(faults: Faults) -> str:
    """F11 and F12."""
    found, calls = faults["F11"], faults["F12"]
    return (
        f"{found['mutants']:,} changed datasets: {found['silent']} accepted, {found['crashes']} crashes; "
        f"{calls['calls']:,} hostile calls of native code: {calls['signals']} signals, {calls['wrong']} wrong answers"
    )


def tokenizers(faults: Faults) -> str:
    """Fast tokenizers beside the reference libraries."""
    found = [each for name, each in faults.items() if name.startswith("tokenizers, ")]
    return (
        f"{sum(each['documents'] for each in found):,} odd and real texts by fast tokenizers: "
        f"{sum(each.get('different', 0) for each in found)} with other ids"
    )


def histories(faults: Faults) -> str:
    """Learning rates and samples."""
    found = faults["histories"]
    return (
        f"{found['histories']:,} histories, {found['killed']:,} launches killed, {found['resumed']:,} resumed, "
        f"{found['updates']:,} updates: {found['wrong']} with another rate or other samples"
    )


def trees(faults: Faults) -> str:
    """F14."""
    found = faults["F14"]
    races = sum(number for name, number in found.items() if name.startswith("races_of_"))
    return (
        f"{found['random_trees']:,} random trees: {found['wrongly_collected']} wrongly collected; {races:,} races with "
        f"pins and launches; {found['launches_refused']} second launches refused, "
        f"{found['files_the_refused_have_written']} files written by them"
    )


def preparation(faults: Faults) -> str:
    """F17."""
    found = faults["F17"].values()
    return f"{sum(each['kills'] for each in found):,} kills: {sum(each['failures'] for each in found)} half products"


def largest(found: Mapping[str, Any], beginning: str) -> float:
    """The largest of the figures whose names begin so."""
    return max(figure for name, figure in found.items() if name.startswith(beginning))


def signals(faults: Faults) -> str:
    """F6."""
    return f"committed {largest(faults['F6'], 'seconds to commit'):.1f} s after the signal at most"


def stuck(faults: Faults) -> str:
    """F7."""
    return f"all ranks gone {largest(faults['F7'], 'seconds beyond the time-out'):.1f} s after the time-out at most"


def launcher(faults: Faults) -> str:
    """F8."""
    commits = sum(number for name, number in faults["F8"].items() if name.startswith("commits"))
    return f"ranks gone after {largest(faults['F8'], 'seconds to'):.1f} s at most; {commits} commits of the dead launch"


def bad_numbers(faults: Faults) -> str:
    """F9."""
    found = faults["F9"]
    return f"{found['bad steps in a committed checkpoint']} of {found['bad steps']:,} bad updates in a checkpoint"


def other_worlds(faults: Faults) -> str:
    """F10."""
    found = faults["F10"]["ordered"]
    return f"{found['runs']} runs of {found['steps']} updates in one order of sums: {found['different ends']} end"


PROMISES: tuple[tuple[str, Callable[[Faults], str], str], ...] = (
    (
        "An acknowledged checkpoint survives `kill -9` of any process at any byte; nothing torn is visible, and the "
        "next launch on the same host goes on at once",
        kills,
        "F1 `test_kills.py`",
    ),
    (
        "It survives a loss of power on a POSIX file system, and so do its references and its lines of metrics",
        power,
        "F2 `test_power_loss.py`",
    ),
    ("Resume is exact to the bit on the same world", killed_training, "F3 `test_killed_training.py`"),
    (
        "A load gives exactly the bytes that were saved, or refuses with file and tensors named; then the newest whole "
        "ancestor is used, never random weights",
        damage,
        "F4 `test_damaged_checkpoints.py`",
    ),
    (
        "A full disk costs nothing that was committed: status 25, and the room of the failed save is given back",
        full_disk,
        "F5 `test_full_disk.py`",
    ),
    ("SIGTERM leaves a committed checkpoint", signals, "F6 `test_stop_signals.py`"),
    ("A rank that is stuck ends the launch, and is named with its phase", stuck, "F7 `test_stuck_ranks.py`"),
    (
        "A killed launcher leaves no rank that trains on, and a launch that was taken over commits nothing",
        launcher,
        "F8 `test_killed_launcher.py`",
    ),
    (
        "A fast tokenizer gives the ids of the reference library; a model or a text outside the proof is left to that",
        tokenizers,
        "`test_tokenizer_identity.py`",
    ),
    ("A loss or gradient that is no number reaches no checkpoint", bad_numbers, "F9 `test_bad_numbers.py`"),
    (
        "On another world the tensors and the order of samples are the same; with `--deterministic-reduction` so is "
        "every bit",
        other_worlds,
        "F10 `test_other_worlds.py`",
    ),
    (
        "Damaged datasets and hostile arguments never crash or read outside",
        datasets,
        "F11, F12 `test_damaged_datasets.py`, `test_native_arguments.py`",
    ),
    (
        "No file runs code; what claims too much is refused before it takes memory",
        payloads,
        "F13 `test_payloads.py`",
    ),
    (
        "Nothing that is reachable or leased is ever collected; one launch writes a path",
        trees,
        "F14 `test_random_trees.py`, `test_two_launches.py`",
    ),
    (
        "A tool that prepares data leaves nothing that is half made and can be read; run again, it makes the same",
        preparation,
        "F17 `test_killed_preprocessing.py`",
    ),
    (
        "What cannot be gone on from is refused by a status of its own; no wall clock decides anything",
        states,
        "F16 `test_refused_states.py`",
    ),
    (
        "Learning rates and sample ids are those of the plan, whatever happened on the way",
        histories,
        "`test_histories.py`",
    ),
)
"""What is promised, its figure, and the test in tests/faults."""


def promises(result: Mapping[str, Any]) -> str:
    """Each promise with its figure and its test."""
    rows = [(promise, figure(result["faults"]), test) for promise, figure, test in PROMISES]
    return table(("promise", "measured", "fault, test"), *rows)


def fsyncs(result: Mapping[str, Any]) -> str:
    """What is broken when one kind of fsync is left out."""
    word = "without the fsync of "
    found = {name.removeprefix(word): each for name, each in result["faults"]["F2"].items() if name.startswith(word)}
    rows = [(name, f"{each['states']:,}", f"{each['violations']:,}") for name, each in sorted(found.items())]
    return table(("fsync left out", "further states tried", "of them broken"), *rows)


def defects(result: Mapping[str, Any]) -> str:
    """Which check caught which defect."""
    rows = [(name, ", ".join(f"`{check}`" for check in checks)) for name, checks in result["faults"]["F18"].items()]
    return table(("defect put into the package", "caught by"), *rows)


def conditions(result: Mapping[str, Any]) -> str:
    """On what, when and from which seed."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    again = f"Then `{result['run_again']['command']}`.\n" if "run_again" in result else ""
    return (
        f"`{result['command']}`: {result['date']}, {result['device']['cores']} cores, "
        f"{versions}; seed {result['seed']}, {result['tests']['passed']} tests passed and {result['tests']['skipped']} "
        f"skipped, {result['seconds_of_tests'] / 60:.0f} minutes of tests, several files at a time.\n{again}"
    )


def rendered(text: str, result: Mapping[str, Any]) -> str:
    """``text`` with every marked block made anew from ``result``."""
    render = {"conditions": conditions, "promises": promises, "fsyncs": fsyncs, "defects": defects}
    return BLOCK.sub(lambda found: f"{found[1]}{render[found[2]](result)}{found[3]}", text)


def run_file(file: Path, seed: int, scratch: Path) -> tuple[Path, int]:
    """Run one file of tests in full numbers, unless that was done before with this seed; the file and pytest's status.

    Its figures and the numbers of its tests are left in ``scratch``.
    """
    figures, report = scratch / f"{file.stem}.json", scratch / f"{file.stem}.xml"
    if report.exists():
        return file, 0
    running, log = report.with_suffix(".running"), report.with_suffix(".log")
    figures.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", str(file), "--full-faults", f"--faults-seed={seed}", "-q", "-rs"]
    command += [f"--faults-json={figures}", f"--junit-xml={running}", f"--timeout={SECONDS_A_TEST}"]
    command += ["--show-capture=no", "-p", "no:cacheprovider"]
    with log.open("w") as out:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        status = subprocess.run(command, cwd=ROOT, env=environment, stdout=out, stderr=out, check=False).returncode
    print(f"{file.name}: {log.read_text().strip().splitlines()[-1]}", flush=True)
    if status == 0:
        running.rename(report)
    return file, status


def run(
    seed: int, processes: int, scratch: Path, only: Sequence[str] = ()
) -> tuple[dict[str, Any], dict[str, int], float]:
    """The figures of one full run of tests/faults, the numbers of its tests and the seconds that its files took.

    Ends the program when one fails.
    """
    files = sorted((ROOT / "tests" / "faults").glob("test_*.py"), key=lambda file: (file.stem not in LONG, file.stem))
    files = [file for file in files if not only or file.stem in only]
    with ThreadPoolExecutor(processes) as pool:
        ended = list(pool.map(lambda file: run_file(file, seed, scratch), files))
    if failed := [file for file, status in ended if status]:
        logs = ", ".join(str(scratch / f"{file.stem}.log") for file in failed)
        sys.exit(f"{logs}: failed. Nothing was written; --seed {seed} goes on with what has not passed")
    faults: dict[str, Any] = {}
    counts, seconds = {"passed": 0, "skipped": 0}, 0.0
    for file in files:
        suite = next(iter(ET.parse(scratch / f"{file.stem}.xml").getroot()))
        skipped = int(suite.get("skipped", 0))
        counts["skipped"] += skipped
        seconds += float(suite.get("time", 0.0))
        counts["passed"] += int(suite.get("tests", 0)) - skipped
        figures = scratch / f"{file.stem}.json"
        found = json.loads(figures.read_text(encoding="utf-8")) if figures.exists() else {}
        for name, each in found.items():
            faults.setdefault(name, {}).update(each)
    return {name: faults[name] for name in sorted(faults)}, counts, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description="inject every fault of tests/faults, in full numbers")
    parser.add_argument("--output", type=Path, help="write the JSON here, and the page's tables where it is the page's")
    parser.add_argument("--seed", type=int, help="of the faults (default: a fresh one, printed)")
    parser.add_argument("--processes", type=int, default=2, help="test files at a time")
    parser.add_argument(
        "--only", nargs="+", default=[], help="test files to run again; --output keeps all other figures"
    )
    parser.add_argument("--pages-only", action="store_true", help="only write docs/reliability.md from the figures")
    options = parser.parse_args()
    if options.pages_only:
        PAGE.write_text(rendered(PAGE.read_text(), json.loads(RESULT.read_text())))
        return
    seed = int.from_bytes(os.urandom(4)) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    before = os.getloadavg()
    scratch = ROOT / "build" / "faults" / str(seed)
    scratch.mkdir(parents=True, exist_ok=True)
    faults, tests, seconds = run(seed, options.processes, scratch, options.only)
    result = {
        "command": shlex.join(["python", "benchmarks/faults.py", *sys.argv[1:]]),
        "convention": "every fault of tests/faults in its full number, drawn from the seed; a figure is what the "
        "test of that name has counted, and no test failed",
        "date": datetime.now(UTC).date().isoformat(),
        "device": {"kind": "cpu", "processor": processor(), "cores": os.cpu_count()},
        "load_average": {
            "before": [round(load, 2) for load in before],
            "after": [round(load, 2) for load in os.getloadavg()],
        },
        "versions": {
            "megalrps": megalrps.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
        },
        "seed": seed,
        "seconds_of_tests": round(seconds),
        "tests": tests,
        "faults": faults,
    }
    if options.only:
        kept = json.loads(options.output.read_text(encoding="utf-8"))
        merged = {**kept["faults"], **faults}
        again = {name: each for name, each in result.items() if name not in ("faults", "convention", "device")}
        result = {**kept, "run_again": again, "faults": {name: merged[name] for name in sorted(merged)}}
    text = json.dumps(result, indent=2)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")
        if options.output.resolve() == RESULT:
            PAGE.write_text(rendered(PAGE.read_text(), result))


if __name__ == "__main__":
    main()
