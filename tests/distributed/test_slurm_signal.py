"""slurm.sbatch passes Slurm's warning on as SIGTERM, waits for the save, and queues the job again if it was made.

Slurm and torchrun are scripts here; that torchrun passes SIGTERM on and the run saves is for
tests/faults/test_stop_signals.py.
"""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "slurm.sbatch"
SCRIPTS = {
    "scontrol": """
        if [[ $1 == show ]]; then echo localhost; else echo "$@" >> "$NOTES/scontrol"; fi""",
    # Like Slurm's: what it is sent goes on to its tasks, and it ends when they have.
    "srun": """
        shift
        trap 'kill -TERM "$task"' TERM
        SLURM_NODEID=0 "$@" &
        task=$!
        while true; do status=0; wait "$task" || status=$?; kill -0 "$task" 2> /dev/null || exit "$status"; done""",
    "torchrun": """
        echo "$@" > "$NOTES/arguments"
        echo "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT" > "$NOTES/grace"
        saved() {
            sleep 0.3
            echo '  "state": "'"$STATE"'",' > "$FILE"
            exit 1
        }
        trap saved TERM
        touch "$NOTES/started"
        for tenth in {1..100}; do sleep 0.1; done""",
}


class Job:
    """The batch script of a job, running; a signal makes ``file``, the state of its run, say ``state``."""

    def __init__(self, folder: Path, *arguments: str, file: Path, state: str) -> None:
        commands, self.notes = folder / "bin", folder / "notes"
        for made in (commands, self.notes, file.parent):
            made.mkdir()
        for name, text in SCRIPTS.items():
            (commands / name).write_text(f"#!/usr/bin/env bash\nset -e\n{text}\n")
            (commands / name).chmod(0o755)
        environment = {"PATH": f"{commands}:{os.environ['PATH']}", "NOTES": self.notes, "STATE": state, "FILE": file}
        environment |= {"SLURM_SUBMIT_DIR": folder, "SLURM_JOB_NODELIST": "node1", "SLURM_NNODES": "1"}
        self.process = subprocess.Popen(
            ["bash", SCRIPT, *arguments],
            env={name: str(value) for name, value in environment.items()} | {"SLURM_JOB_ID": "77"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> "Job":
        deadline = time.monotonic() + 10.0
        while not (self.notes / "started").exists():
            assert time.monotonic() < deadline and self.process.poll() is None, self.process.communicate()[0]
            time.sleep(0.01)
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()

    def asked(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        return self.process.wait(20)

    @property
    def queued_again(self) -> bool:
        file = self.notes / "scontrol"
        return file.exists() and file.read_text() == "requeue 77\n"


# What Slurm sends, what the run makes of it, and whether the job is queued again by the script.
CASES = {
    "time is nearly up": (signal.SIGUSR1, "preempted", True),
    "the save was too slow": (signal.SIGUSR1, "running", False),
    "preempted or cancelled": (signal.SIGTERM, "preempted", False),
}


@pytest.mark.skipif(shutil.which("bash") is None, reason="slurm.sbatch is a bash script")
@pytest.mark.parametrize("case", CASES)
def test_the_warning_reaches_the_ranks_and_the_job_is_queued_again_if_they_saved(tmp_path: Path, case: str):
    number, state, again = CASES[case]
    run = tmp_path / "run"
    with Job(tmp_path, "--save", str(run), "--lr", "1e-3", file=run / "run_state.json", state=state) as job:
        assert job.asked(number) == 1, "torchrun's status"
        assert job.queued_again == again
        assert state in (run / "run_state.json").read_text(), "it waited for the save"
        assert int((job.notes / "grace").read_text()) < 120
        assert f"--save {run} --lr 1e-3" in (job.notes / "arguments").read_text()


def test_a_launch_of_some_paths_looks_at_its_own_file(tmp_path: Path):
    run = tmp_path / "run"
    arguments = ("--paths", "v1", "v2", "--lr", "1e-3", f"--save={run}")
    with Job(tmp_path, *arguments, file=run / "run_state.v1+v2.json", state="preempted") as job:
        job.asked(signal.SIGUSR1)
        assert job.queued_again
