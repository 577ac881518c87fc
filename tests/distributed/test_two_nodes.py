"""Two nodes, as network namespaces of one machine: they train as one does, and when one is lost nothing else is.

A node has its own network, name and /etc/hosts, and a launch on it its own process tree; the nodes share this machine's
file system, as a cluster's do. All of it ends with the processes that hold it.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import distributed_harness
import pytest
from tiny_job import (
    ENTRY,
    TinyData,
    checkpoints,
    command,
    differing,
    make_data,
    metrics,
    results,
    tensors,
    trained,
    world_of_harness,
)

pytestmark = pytest.mark.slow

STEPS, SAVE_INTERVAL = 160, 20
TIMEOUT_SECONDS = 6.0  # --distributed-timeout-minutes 0.1
SECONDS_TO_END = 15.0  # what a launch may take to end beyond that; 2 were seen
SECONDS_TO_TRAIN = 120.0
# The second: restarted workers would find the addresses of the first start (pytorch#135712). pretrain.sh sets it too.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
ENDPOINT = ("node1", "29400")
RENDEZVOUS = {
    "c10d": lambda node: ("--rdzv-backend", "c10d", "--rdzv-endpoint", ":".join(ENDPOINT), "--rdzv-id", "two-nodes"),
    "static": lambda node: ("--node-rank", str(node), "--master-addr", ENDPOINT[0], "--master-port", ENDPOINT[1]),
}


@dataclass
class Launch:
    """torchrun on one node, and what it prints."""

    process: subprocess.Popen[bytes]
    log: Path

    def ended(self, within: float) -> tuple[int, float]:
        """The exit status, and after how many seconds of waiting it came."""
        start = time.monotonic()
        try:
            return self.process.wait(within), time.monotonic() - start
        except subprocess.TimeoutExpired:
            pytest.fail(f"{self.log.stem} has not ended after {within:.0f} s:\n{self.text()}", pytrace=False)

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def workers(self) -> list[int]:
        """The processes of the entry below this launcher, as this machine numbers them."""
        found, open_ = [], [self.process.pid]
        while open_:
            process = open_.pop()
            children = Path(f"/proc/{process}/task/{process}/children")
            open_ += [int(child) for child in children.read_text().split()] if children.exists() else []
            arguments = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
            if arguments[0].endswith(b"python") and os.fsencode(ENTRY) in arguments and b"-u" in arguments:
                found.append(process)
        return found


@dataclass
class Node:
    """A network, a name and an /etc/hosts of its own, held by a process that waits on a pipe."""

    name: str
    holder: subprocess.Popen[str]
    launches: list[Launch] = field(default_factory=list)

    def inside(self) -> list[str]:
        """What to say before a command that is to run on the node."""
        return ["nsenter", "--target", str(self.holder.pid), "--net", "--uts", "--mount"]

    def link(self, state: str) -> None:
        run(*self.inside(), "ip", "link", "set", "eth0", state)

    def torchrun(self, log: Path, *arguments: str) -> Launch:
        """Start torchrun in a process tree of its own, of which torchrun is the first: nothing of it outlives it."""
        torchrun = str(Path(sys.executable).with_name("torchrun"))
        tree = ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc"]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*self.inside(), *tree, torchrun, "--nnodes", "2", "--nproc-per-node", "1", *arguments],
                env=os.environ | ENVIRONMENT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        self.launches.append(Launch(process, log))
        return self.launches[-1]

    def end(self) -> None:
        for launch in self.launches:
            launch.process.kill()
            launch.process.wait()
        self.holder.stdin.close()
        self.holder.wait()
        self.holder.stdout.close()


def run(*arguments: str) -> None:
    """Run a command of the system, or raise CalledProcessError with what it said."""
    subprocess.run(arguments, check=True, capture_output=True, text=True)


def node(number: int, hosts: Path) -> Node:
    script = (
        f'mount --bind "{hosts}" /etc/hosts && hostname node{number} && ip link set lo up && echo ready && exec cat'
    )
    holder = subprocess.Popen(
        ["unshare", "--net", "--uts", "--mount", "sh", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said = holder.stdout.readline()
    made = Node(f"node{number}", holder)
    if said != "ready\n":
        made.end()
        raise OSError(f"unshare: {said.strip()}")
    return made


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Node]]:
    """Two nodes joined by a cable; skipped where the system does not let us make them."""
    lacking = [name for name in ("unshare", "nsenter", "ip") if shutil.which(name) is None]
    if os.geteuid() != 0 or lacking:
        pytest.skip(f"two nodes on one machine need root and unshare, nsenter and ip; lacking: {lacking or 'root'}")
    hosts = tmp_path_factory.mktemp("nodes") / "hosts"
    hosts.write_text("127.0.0.1 localhost\n10.77.1.1 node1\n10.77.1.2 node2\n")
    made: list[Node] = []
    try:
        try:
            made += [node(1, hosts)]
            made += [node(2, hosts)]
            first, second = (str(each.holder.pid) for each in made)
            run("ip", "link", "add", "eth0", "netns", first, "type", "veth", "peer", "name", "eth0", "netns", second)
            for number, each in enumerate(made, start=1):
                run(*each.inside(), "ip", "address", "add", f"10.77.1.{number}/24", "dev", "eth0")
                each.link("up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"this system makes no network namespaces: {error} {getattr(error, 'stderr', '')}")
        yield made
    finally:
        for each in made:
            each.end()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return make_data(tmp_path_factory.mktemp("data"), (STEPS,))


def arguments_of(data: TinyData, run: Path) -> list[str]:
    flags = ("--save-interval", str(SAVE_INTERVAL), "--distributed-timeout-minutes", str(TIMEOUT_SECONDS / 60))
    return command(data, run, *flags)


def _trains(rank: int, arguments: list[str]) -> None:
    trained(arguments, world_of_harness())


def train_on_one_node(data: TinyData, run: Path) -> None:
    """What two ranks of one machine make of the job."""
    rendezvous = run.with_name(f"{run.name}.rendezvous")
    distributed_harness.run_ranks(rendezvous, 2, _trains, arguments_of(data, run), timeout=SECONDS_TO_TRAIN)


@pytest.fixture(scope="module")
def undisturbed(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    train_on_one_node(data, run)
    return run


@pytest.fixture
def start(nodes: list[Node], data: TinyData, tmp_path: Path) -> Iterator[Callable[..., list[Launch]]]:
    """Start the job of ``tmp_path/run`` on both nodes; more arguments are torchrun's."""

    def launch(rendezvous: str, *arguments: str) -> list[Launch]:
        return [
            each.torchrun(
                tmp_path / f"{each.name}-{len(each.launches)}.log",
                *RENDEZVOUS[rendezvous](rank),
                *arguments,
                str(ENTRY),
                *arguments_of(data, tmp_path / "run"),
            )
            for rank, each in enumerate(nodes)
        ]

    yield launch
    for each in nodes:
        each.link("up")
        while each.launches:
            left = each.launches.pop()
            left.process.kill()
            left.process.wait()


def finish(launches: list[Launch]) -> None:
    for launch in launches:
        status, _ = launch.ended(SECONDS_TO_TRAIN)
        assert status == 0, launch.text()


def wait_for_checkpoints(run: Path, count: int, launches: list[Launch]) -> tuple[str, ...]:
    """The committed checkpoints, as soon as the run has committed ``count`` of them, removed ones included."""
    seen: set[str] = set()
    deadline = time.monotonic() + SECONDS_TO_TRAIN
    while len(seen) < count:
        seen |= set(checkpoints(run))
        assert time.monotonic() < deadline and all(launch.process.poll() is None for launch in launches), [
            launch.text() for launch in launches
        ]
        time.sleep(0.005)
    return checkpoints(run)


def check_undisturbed(run: Path, undisturbed: Path) -> None:
    assert results(run) == results(undisturbed)
    for name in checkpoints(undisturbed):
        assert differing(tensors(run, name), tensors(undisturbed, name)) == [], name


def test_two_nodes_give_the_numbers_of_one(
    start: Callable[..., list[Launch]], data: TinyData, undisturbed: Path, tmp_path: Path
):
    """To the last bit those of two ranks on one node; to rounding, those of one process."""
    finish(start("c10d"))
    check_undisturbed(tmp_path / "run", undisturbed)
    alone = metrics(trained(arguments_of(data, tmp_path / "alone")))
    for line, whole in zip(metrics(tmp_path / "run"), alone, strict=True):
        assert (line["path"], line["step"]) == (whole["path"], whole["step"])
        assert line["loss"] == pytest.approx(whole["loss"], rel=1e-4)


def goes_on_on_both(start: Callable[..., list[Launch]], data: TinyData, run: Path) -> None:
    finish(start("c10d"))


def goes_on_on_one(start: Callable[..., list[Launch]], data: TinyData, run: Path) -> None:
    train_on_one_node(data, run)


# What is lost, by which rendezvous the launches met, after how many seconds the others notice, and how it goes on.
LOSSES = {
    "the second node is killed": (1, "c10d", 0.0, goes_on_on_both),
    "the node of rank 0 is killed": (0, "static", 0.0, goes_on_on_one),
    "the cable is pulled": (None, "static", TIMEOUT_SECONDS, goes_on_on_both),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_when_a_node_is_lost_the_job_ends_in_time_and_loses_nothing_committed(
    nodes: list[Node],
    start: Callable[..., list[Launch]],
    data: TinyData,
    undisturbed: Path,
    tmp_path: Path,
    loss: str,
):
    killed, rendezvous, notice, go_on = LOSSES[loss]
    run, launches = tmp_path / "run", start(rendezvous)
    committed = wait_for_checkpoints(run, 4, launches)
    if killed is None:
        nodes[0].link("down")
    else:
        launches[killed].process.kill()
    for place, launch in enumerate(launches):
        limit = notice + SECONDS_TO_END
        status, seconds = launch.ended(limit)
        assert status != 0, f"{launch.log.stem} ended as if all were done {seconds:.1f} s after {loss}"
        assert place == killed or "rank" in launch.text(), f"{launch.log.stem} does not say which rank failed"
        assert seconds >= notice - 2 or place, (
            f"{launch.log.stem} ended {seconds:.1f} s after {loss}: for which reason?"
        )
    left = checkpoints(run)
    assert committed[-1] in left and len(left) < len(checkpoints(undisturbed)) + 2
    for name in left:
        tensors(run, name)  # whole: every byte is verified
    lines = len(metrics(run))
    assert SAVE_INTERVAL < lines < STEPS, "it was to be lost in the middle"
    nodes[0].link("up")
    go_on(start, data, run)
    check_undisturbed(run, undisturbed)


def test_a_worker_that_dies_is_started_again_on_both_nodes(
    start: Callable[..., list[Launch]], undisturbed: Path, tmp_path: Path
):
    """torchrun's own restart, from the last checkpoint, without the batch system."""
    launches = start("c10d", "--max-restarts", "1")
    wait_for_checkpoints(tmp_path / "run", 4, launches)
    (worker,) = launches[1].workers()
    os.kill(worker, signal.SIGKILL)
    finish(launches)
    text = launches[0].text()
    assert text.count("samples ") == 2, "each start says how its samples are ordered"
    assert f" 0 of {STEPS} steps done" in text and text.count("steps done") == 2, text
    check_undisturbed(tmp_path / "run", undisturbed)
