"""Every YAML of examples/ plans what it says, the launch scripts really train, and the snippets of the pages run."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import yaml
from node_launches import Ended, free_port, launch_nodes
from tiny_job import launch as launch_entry
from tiny_job import trained, world_of_harness

from megalrps.config import parse_config
from megalrps.data.increment import open_increment
from megalrps.data.indexed import IndexedDatasetWriter
from megalrps.data.manifest import TokenizerIdentity, describe_dataset, write_manifest
from megalrps.data.preprocess import preprocess
from megalrps.data.preprocess_options import InputOptions, OutputOptions, PreprocessOptions, TokenizerOptions
from megalrps.data.tokenizer_training import TokenizerTrainingOptions, train_tokenizer
from megalrps.paths.cost import cost_steps
from megalrps.training.prepare import prepare

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted([*EXAMPLES.glob("*.sh"), *EXAMPLES.glob("*.sbatch")])
YAMLS = sorted(EXAMPLES.glob("*.yaml"))
FULL_SIZE = sorted(EXAMPLES.glob("llama_*.yaml"))
GIB = 1 << 30
LAUNCH = re.compile(r"(\d+) ranks?, ([\d.]+) GiB, a GPU of (\d+) GB: (--.*)")
LAUNCHES = [(config, found.group()) for config in FULL_SIZE for found in LAUNCH.finditer(config.read_text())]
SENTENCE = "the path that never decays ships a branch of itself as each new version of the model arrives"
TOY = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --ffn-hidden-size 64 --seq-length 16 "
    "--global-batch-size 4 --micro-batch-size 2 --increment-steps 5 5 --save-interval 2 --log-interval 1 "
    "--device cpu --no-bf16 --lr-warmup-iters 1"
)


@pytest.fixture(scope="session")
def increments(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Four tiny increments whose tokenizer says it has 32,000 ids."""
    tokenizer = TokenizerIdentity("SentencePieceTokenizer", 32_000, 2, "0" * 64)
    prefixes = []
    for year in range(2021, 2025):
        prefix = tmp_path_factory.mktemp("increments") / str(year)
        with IndexedDatasetWriter(prefix, np.uint16) as writer:
            writer.add_document(np.arange(2100))
        manifest = describe_dataset(
            prefix, name=str(year), tokenizer=tokenizer, text_bytes=8400, append_eod=False, sources=("a.jsonl",)
        )
        write_manifest(prefix, manifest)
        prefixes.append(str(prefix))
    return tuple(prefixes)


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    """A tokenizer and two increments made with it, by the code that the tools run; held-out parts beside them."""
    folder = tmp_path_factory.mktemp("toy")
    model, words = folder / "tokenizer.model", SENTENCE.split()
    for name, step in (("old", 1), ("new", 5), ("old_held_out", 3), ("new_held_out", 7)):
        texts = (" ".join(words[(line + step * word) % len(words)] for word in range(40)) for line in range(40))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_tokenizer(TokenizerTrainingOptions(input=(str(folder / "old.jsonl"),), output=model, vocab_size=300))
    for name in ("old", "new", "old_held_out", "new_held_out"):
        preprocess(
            PreprocessOptions(
                text=InputOptions(input=(str(folder / f"{name}.jsonl"),)),
                tokenizer=TokenizerOptions(tokenizer_model=model),
                output=OutputOptions(output_prefix=folder / name, append_eod=True),
            )
        )
    return str(model), str(folder / "old_text_document"), str(folder / "new_text_document")


def held_out_of(*increments: str) -> list[str]:
    """The prefixes of the held-out parts of ``increments`` of toy_data."""
    return [increment.replace("_text_document", "_held_out_text_document") for increment in increments]


def dry_run(*arguments: str) -> dict:
    """What the entry prints of a job as JSON."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = launch_entry([*arguments, "--dry-run", "--json"])
    assert (status, err.getvalue()) == (0, "")
    return json.loads(out.getvalue())


@pytest.fixture(scope="session")
def planned(increments: tuple[str, ...]) -> dict[tuple[Path, str | None], dict]:
    """What a dry run prints of every YAML, by itself and at every launch that its head names."""
    printed = {}
    for config, launch in [*((config, None) for config in YAMLS), *LAUNCHES]:
        ranks, _, _, flags = LAUNCH.fullmatch(launch).groups() if launch else ("1", "", "", "")
        steps = ("--increment-steps", "10000", "10000", "10000", "10000")
        job = ("--config", str(config), "--increments", *increments, *steps)
        printed[config, launch] = dry_run(*job, "--world-size", ranks, *flags.split())
    return printed


def fullest(printed: dict) -> dict:
    """The rank that holds the most."""
    return max(printed["ranks"], key=lambda rank: rank["bytes_total"])


@pytest.mark.parametrize("config", YAMLS, ids=lambda path: path.stem)
def test_every_yaml_is_planned(config: Path, planned: dict) -> None:
    printed = planned[config, None]
    assert printed["cost_steps"] == 58_000
    assert [path["parent"]["step"] for path in printed["plan"]["paths"] if path["parent"]] == [
        4000, 14000, 24000, 34000,
    ]  # fmt: skip
    stated = {key: value for section in yaml.safe_load(config.read_text()).values() if isinstance(section, dict)
              for key, value in section.items()}  # fmt: skip
    resolved = {key: value for section in printed["config"].values() for key, value in section.items()}
    assert {key: resolved[key.replace("-", "_")] for key in stated} == stated


@pytest.mark.parametrize("config", FULL_SIZE, ids=lambda path: path.stem)
def test_a_full_size_yaml_states_its_memory_and_its_batch(config: Path, planned: dict) -> None:
    printed = planned[config, None]
    stated = re.search(r"memory: ([\d.]+) GiB +\((.*)\)", config.read_text())
    assert stated
    assert stated.group(1) == f"{fullest(printed)['bytes_total'] / GIB:.2f}"
    parts = ", ".join(f"{part} {size / GIB:.2f}" for part, size in fullest(printed)["bytes"].items() if size)
    assert stated.group(2) == parts
    assert printed["tokens_per_step"] == 2**20
    size = {"llama_203m": 203e6, "llama_1.2b": 1.2e9, "llama_3.1b": 3.1e9}[config.stem]
    assert printed["parameters"] == pytest.approx(size, rel=0.01)


@pytest.mark.parametrize(("config", "launch"), LAUNCHES, ids=lambda part: part.stem if isinstance(part, Path) else part)
def test_a_launch_that_is_said_to_fit_does(config: Path, launch: str, planned: dict) -> None:
    _, stated, gpu, _ = LAUNCH.fullmatch(launch).groups()
    printed = planned[config, launch]
    assert f"{fullest(printed)['bytes_total'] / GIB:.2f}" == stated
    assert float(stated) < 0.8 * float(gpu), "a fifth is left to what the figure does not count"
    assert printed["tokens_per_step"] == 2**20


@pytest.mark.parametrize("config", FULL_SIZE, ids=lambda path: path.stem)
def test_every_full_size_yaml_names_a_launch(config: Path) -> None:
    assert any(config == named for named, _ in LAUNCHES)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_parses(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    result = subprocess.run(
        ["shellcheck", "--external-sources", str(script)], capture_output=True, cwd=ROOT, check=False
    )
    assert result.returncode == 0, result.stdout.decode()


def toy_environment(**more: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port()), **more}


def launch(*command: str | Path, environment: dict[str, str], folder: Path) -> Ended:
    (ended,) = launch_nodes(*command, environments=[environment], folder=folder)
    return ended


def steps_of(run: Path) -> list[tuple[str, int]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [(line["path"], line["step"]) for line in map(json.loads, lines)]


EXPECTED = [("main", 1), ("main", 2), *(("v1", step) for step in (3, 4, 5)),
            *(("main", step) for step in (3, 4, 5, 6, 7)), *(("v2", step) for step in (8, 9, 10))]  # fmt: skip


# How two nodes of one launch find each other, by what pretrain.sh takes from the environment of each.
MEETINGS = {
    "by node rank": lambda node, port: {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "NODE_RANK": str(node)},
    "by rendezvous": lambda node, port: {"RDZV_ENDPOINT": f"localhost:{port}", "MAX_RESTARTS": "1"},
}


LAYOUTS = {"by node rank": "--context-parallel-size 2", "by rendezvous": "--pipeline-model-parallel-size 2"}


@dataclass(frozen=True)
class Trained:
    """What ``command`` has left in ``folder``, started on two nodes, and what these printed."""

    command: list[str]
    environment: dict[str, str]
    folder: Path
    printed: str


@pytest.fixture(scope="module")
def trained_on_two_nodes(
    toy_data: tuple[str, str, str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Trained]:
    """By how the nodes meet, each trained once."""
    tokenizer, old, new = toy_data
    command = [str(part) for part in (EXAMPLES / "pretrain.sh", "RUN", "none", tokenizer, old, new)]

    @cache
    def train(meeting: str) -> Trained:
        environment, folder = toy_environment(TRAIN_ARGS=TOY), tmp_path_factory.mktemp("nodes")
        environment["HELD_OUT"] = " ".join(held_out_of(old, new))
        of_all = environment | {"NUM_NODES": "2", "LAYOUT": LAYOUTS[meeting]}
        of_each = [of_all | MEETINGS[meeting](node, environment["MASTER_PORT"]) for node in (0, 1)]
        nodes = launch_nodes(*command, environments=of_each, folder=folder)
        assert [node.returncode for node in nodes] == [0, 0], "\n".join(node.stderr for node in nodes)
        return Trained(command, environment, folder, "".join(node.stdout for node in nodes))

    return train


@pytest.mark.slow
@pytest.mark.parametrize("meeting", MEETINGS)
def test_pretrain_trains_on_two_nodes(trained_on_two_nodes: Callable[[str], Trained], meeting: str) -> None:
    trained = trained_on_two_nodes(meeting)
    assert "ranks: 2" in trained.printed
    assert steps_of(trained.folder / "RUN") == EXPECTED
    summary = json.loads((trained.folder / "RUN" / "summary.json").read_text())
    assert [release["name"] for release in summary["releases"]] == ["v1", "v2"]
    assert all(list(release["perplexity"]) == ["old", "new"] for release in summary["releases"])


def handed_on(*arguments: str, folder: Path, environment: dict[str, str]) -> tuple[list[str], list[str]]:
    """What pretrain.sh says to torchrun, and what it has torchrun give the entry.

    The torchrun is a script that prints what it is given.
    """
    torchrun = folder / "bin" / "torchrun"
    torchrun.parent.mkdir()
    torchrun.write_text("#!/usr/bin/env bash\nprintf '%s\\0' \"$@\"\n")
    torchrun.chmod(0o755)
    environment = environment | {"PATH": f"{torchrun.parent}:{environment['PATH']}"}
    ended = launch(EXAMPLES / "pretrain.sh", *arguments, environment=environment, folder=folder)
    assert (ended.returncode, ended.stderr) == (0, "")
    words = ended.stdout.split("\0")[:-1]
    entry = words.index(str(ROOT / "pretrain_gpt.py"))
    return words[:entry], words[entry + 1 :]


@pytest.mark.slow
def test_the_same_command_on_one_node_finds_all_done(
    trained_on_two_nodes: Callable[[str], Trained],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """torchrun takes these flags of two nodes too; the entry runs in this process."""
    trained = trained_on_two_nodes("by node rank")
    of_torchrun, arguments = handed_on(*trained.command[1:], folder=tmp_path, environment=trained.environment)
    port = trained.environment["MASTER_PORT"]
    wanted = ("--nproc-per-node 1", "--nnodes 1", "--node-rank 0", "--master-addr localhost", f"--master-port {port}")
    assert of_torchrun == " ".join(wanted).split()
    monkeypatch.chdir(trained.folder)
    assert launch_entry(arguments) == 0
    assert "13 of 13 steps done" in capsys.readouterr().out
    assert steps_of(trained.folder / "RUN") == EXPECTED


@pytest.mark.parametrize("config", FULL_SIZE, ids=lambda path: path.stem)
def test_pretrain_hands_model_and_layout_on(toy_data: tuple[str, str, str], tmp_path: Path, config: Path) -> None:
    environment = toy_environment(
        MODEL=config.stem,
        LAYOUT="--tensor-model-parallel-size 2 --sequence-parallel",
        TRAIN_ARGS="--increment-steps 10000 10000",
    )
    _, arguments = handed_on("RUN", "none", *toy_data, folder=tmp_path, environment=environment)
    job = prepare(parse_config(arguments), 8)
    assert job.model.hidden_size == {"llama_203m": 896, "llama_1.2b": 2048, "llama_3.1b": 2560}[config.stem]
    assert (job.layout.tp, job.layout.dp) == (2, 4)
    assert [path.end for path in job.plan.paths if path.release] == [10_000, 20_000]


def test_pretrain_names_a_model_that_is_not_there(tmp_path: Path) -> None:
    environment = toy_environment(MODEL="llama_7b")
    result = launch(EXAMPLES / "pretrain.sh", "R", "none", "t", "a", environment=environment, folder=tmp_path)
    assert result.returncode == 2 and "MODEL=llama_7b" in result.stderr


def test_pretrain_without_its_arguments_says_which(tmp_path: Path) -> None:
    result = launch(EXAMPLES / "pretrain.sh", "RUN", environment=toy_environment(), folder=tmp_path)
    assert result.returncode == 2
    assert "RUN TENSORBOARD TOKENIZER INCREMENT" in result.stderr


# Like Slurm's: what one node prints, all of them print; with --kill-on-bad-exit=1 none outlives one that has failed.
SRUN = """
[[ $1 == --kill-on-bad-exit=1 ]]
shift
for node in 0 1; do
    SLURM_NODEID=$node "$@" &
done
for node in 0 1; do
    wait -n || { status=$?; jobs -rp | xargs -r kill -KILL; exit $status; }
done
"""


@pytest.fixture
def slurm(tmp_path: Path) -> Callable[..., Ended]:
    """Run slurm.sbatch on two nodes of a Slurm that is two scripts: no more of it can be had in a test."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", "printf '%s\\n' localhost elsewhere")):
        (commands / name).write_text(f"#!/usr/bin/env bash\nset -e\n{text}\n")
        (commands / name).chmod(0o755)

    def run(*arguments: str) -> Ended:
        environment = toy_environment(
            SLURM_SUBMIT_DIR=str(ROOT), SLURM_JOB_NODELIST="node[1-2]", SLURM_NNODES="2", SLURM_GPUS_ON_NODE="1",
        )  # fmt: skip
        port = int(environment["MASTER_PORT"])  # as the script makes it of the job's number
        environment |= {"SLURM_JOB_ID": f"{1230000 + port % 10000}", "PATH": f"{commands}:{environment['PATH']}"}
        return launch("bash", EXAMPLES / "slurm.sbatch", *arguments, environment=environment, folder=tmp_path)

    return run


def _rank_trains(rank: int, arguments: list[str]) -> None:
    trained(arguments, world_of_harness())


@pytest.mark.slow
def test_a_slurm_job_that_is_queued_again_goes_on(
    run_ranks: Callable[..., list], slurm: Callable[..., Ended], toy_data: tuple[str, str, str], tmp_path: Path
) -> None:
    """The first job is two ranks of the harness: what a launch leaves tells nothing of its launcher."""
    _, old, new = toy_data
    run = tmp_path / "run"
    arguments = ("--config", str(EXAMPLES / "llama_203m.yaml"), "--save", str(run), *TOY.split())
    run_ranks(2, _rank_trains, [*arguments, "--increments", old, "--increment-steps", "5"])
    assert steps_of(run) == EXPECTED[:5]
    result = slurm(*arguments, "--increments", old, new, "--increment-steps", "5", "5")
    assert result.returncode == 0, result.stderr
    assert "ranks: 2" in result.stdout
    assert f"5 of {len(EXPECTED)} steps done" in result.stdout
    assert steps_of(run) == EXPECTED


def snippet(page: str, first_line: str) -> str:
    """The Python block of ``page`` that begins with ``first_line``."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    (found,) = (block for block in blocks if block.startswith(first_line))
    return found


def test_the_paradigm_of_the_tour_is_planned() -> None:
    from megalrps.paths import paradigms

    names = {**vars(paradigms)}
    exec(snippet("CONTRIBUTING.md", "def constant_minimum"), names)
    increments = tuple(paradigms.Increment(name, 1000) for name in ("a", "b", "c"))
    plan = names["constant_minimum"](increments, paradigms.PlanOptions(lr=3e-3, min_lr=3e-4))
    assert cost_steps(plan) == 3000
    curve = plan.path("v3").curve
    assert [curve(step) for step in (200, 1000, 1001, 3000)] == [3e-3, 3e-4, 3e-4, 3e-4]


def test_the_manifest_of_a_dataset_of_megatrons_is_written_as_documented(
    toy_data: tuple[str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, old, _ = toy_data
    for kind in ("bin", "idx"):
        shutil.copy(f"{old}.{kind}", tmp_path / f"PREFIX.{kind}")
    shutil.copy(tokenizer, tmp_path / "tokenizer.model")
    monkeypatch.chdir(tmp_path)
    exec(snippet("docs/data.md", "from megalrps.data.manifest"), {})
    assert open_increment("PREFIX", verify=True).manifest.fingerprint == open_increment(old).manifest.fingerprint
