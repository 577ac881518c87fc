"""The two commands of the README, measured in a fresh clone: time from nothing, again when finished, killed half-way.

python benchmarks/quickstart.py --output benchmarks/results/quickstart_cpu.json
python benchmarks/quickstart.py --compare --output benchmarks/results/compare_cpu.json

Clones the committed state of this repository into a temporary directory with an empty virtual environment. The killed
run is started again and its releases must be the uninterrupted run's, byte for byte; the script fails if they are not.
"""

import argparse
import datetime
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megalrps.fingerprint import file_digest

ROOT = Path(__file__).resolve().parent.parent


def make(clone: Path, *arguments: str) -> float:
    """Run make in ``clone``; returns its wall seconds."""
    started = time.perf_counter()
    subprocess.run(["make", "--silent", *arguments], cwd=clone, check=True)
    return round(time.perf_counter() - started, 1)


def make_and_kill(clone: Path, metrics: Path, lines: int, *arguments: str) -> int:
    """Run make in ``clone``, kill -9 its process group when ``metrics`` has that many lines; returns how many."""
    process = subprocess.Popen(["make", "--silent", *arguments], cwd=clone, start_new_session=True)
    while process.poll() is None and (not metrics.exists() or metrics.read_bytes().count(b"\n") < lines):
        time.sleep(0.05)
    if process.poll() is not None:
        sys.exit("the run ended before it could be killed")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(1.0)  # its ranks have sessions of their own and die with their launcher
    return metrics.read_bytes().count(b"\n")


def release_digests(run: Path) -> dict[str, list[str]]:
    """Digests of the shard files of every release."""
    summary = json.loads((run / "summary.json").read_text())
    directories = {
        release["name"]: run / "checkpoints" / Path(release["checkpoint"]).name for release in summary["releases"]
    }
    return {name: [file_digest(shard) for shard in sorted(place.glob("*.bin"))] for name, place in directories.items()}


def facts(command: str) -> dict[str, Any]:
    """What was run, on what, with which versions."""
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": f"CPU, {os.cpu_count()} cores, {platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "numpy", "megalrps")},
        },
        "load_average_before": round(os.getloadavg()[0], 1),
    }


def measure_quickstart(clone: Path, other: Path) -> dict[str, Any]:
    """Times of the first and the second ``make quickstart``; that a killed run reaches the same releases."""
    result = facts("make quickstart")
    result["seconds_first_run_with_set_up"] = make(clone, "quickstart")
    result["seconds_second_run"] = make(clone, "quickstart")
    run, killed = clone / "runs/quickstart", other / "runs/quickstart"
    total = len((run / "metrics.jsonl").read_bytes().splitlines())
    arguments = ("quickstart", f"VENV={clone / '.venv'}")
    result["killed_after_steps"] = make_and_kill(other, killed / "metrics.jsonl", total // 2, *arguments)
    make(other, *arguments)
    expected, found = release_digests(run), release_digests(killed)
    if expected != found:
        sys.exit(f"the killed run's releases differ from the uninterrupted run's: {expected} {found}")
    result["killed_run_equals_uninterrupted"] = True
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    result["loss_first_step"], result["loss_last_step"] = lines[0]["loss"], lines[-1]["loss"]
    return {**result, "summary": json.loads((run / "summary.json").read_text())}


def measure_comparison(clone: Path) -> dict[str, Any]:
    """Time and outcome of ``make compare``."""
    result = facts("make compare")
    result["seconds_with_set_up"] = make(clone, "compare")
    return {**result, "summaries": json.loads((clone / "runs/compare/summary.json").read_text())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", action="store_true", help="measure make compare instead of make quickstart")
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        clones = [Path(directory) / name for name in ("first", "second")]
        for clone in clones:
            subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
        result = measure_comparison(clones[0]) if options.compare else measure_quickstart(*clones)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
