"""The processes of one launch: who I am, how many we are, and the group we talk through."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from megalrps.errors import InputError, RepeatedError, ToldError, exit_status_of
from megalrps.parallel.group import Group

T = TypeVar("T")

_NCCL_WAITS_LONGER = 10.0  # seconds
TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World(Group):
    """All processes of the launch: what they decide, write and fail at together."""

    @property
    def is_first(self) -> bool:
        """Whether this is the one rank that writes logs, metrics and manifests."""
        return self.rank == 0

    @property
    def store(self) -> dist.Store | None:
        """Where the ranks found each other: a key-value store that outlives a failed collective; None: it is alone."""
        return None if self.group is None else dist.distributed_c10d._get_default_store()

    def decided(self, decide: Callable[[], T]) -> T:
        """What ``decide`` gives on the first rank, on every rank.

        For whatever is read from a place that changes meanwhile, such as a directory: ranks that each look for
        themselves may see different things, act on them, and wait for one another for ever. An error travels too.
        """
        answer = [self.together(decide if self.is_first else lambda: None)]
        if self.group is not None:
            dist.broadcast_object_list(answer, src=0, group=self.group)
        return cast(T, answer[0])

    def gathered(self, value: T) -> list[T]:
        """What every rank hands in, by rank, on every rank."""
        values = [value] * self.size
        if self.group is not None:
            dist.all_gather_object(values, value, group=self.group)
        return values

    def told_once(self, error: ToldError) -> ToldError:
        """What this rank raises where every rank knows of ``error``: the first one that, the others a RepeatedError."""
        return error if self.is_first else RepeatedError(str(error), exit_status_of(error))

    def together(self, act: Callable[[], T]) -> T:
        """What ``act`` gives on this rank, once it has succeeded on every rank; see :meth:`agree` where it has not."""
        answer: T | None = None
        error: Exception | None = None
        try:
            answer = act()
        except Exception as raised:
            error = raised
        self.agree(error)
        return cast(T, answer)

    def agree(self, error: Exception | None) -> None:
        """Raise on every rank if any rank has an error, so that none is left waiting in a collective.

        The first rank with an error raises its own. For a ToldError all others raise RepeatedError, so that it is
        printed once; for anything else they raise their own error, or a RuntimeError that names the rank.
        """
        if self.group is None:
            if error is not None:
                raise error
            return
        texts: list[tuple[bool, str, int] | None] = [None] * self.size
        mine = None if error is None else (isinstance(error, ToldError), str(error), exit_status_of(error))
        dist.all_gather_object(texts, mine, group=self.group)
        teller = next((rank for rank, told in enumerate(texts) if told is not None), None)
        if teller is None:
            return
        is_told, text, status = cast(tuple[bool, str, int], texts[teller])
        if is_told and teller != self.rank:
            raise RepeatedError(text, status) from error
        raise error if error is not None else RuntimeError(f"rank {teller}: {text}")


@contextmanager
def open_world(
    environment: Mapping[str, str], *, device: str, backend: str | None, timeout_minutes: float
) -> Iterator[World]:
    """Join the process group that torchrun describes in ``environment``; without torchrun, a world of one.

    device is "auto" (an accelerator if there is one), "cpu" or "cuda"; backend is None for the device's own (nccl on
    CUDA, gloo on CPU). Raises InputError for a device that is not there, an incomplete torchrun environment, or ranks
    that gloo does not connect.
    """
    missing = [name for name in TORCHRUN_VARIABLES if name not in environment]
    if len(missing) == len(TORCHRUN_VARIABLES) or "RANK" in missing:
        yield World(0, 1, _device(device, 0), None)
        return
    if missing:
        raise InputError(f"RANK is set but {', '.join(missing)} is not: launch with torchrun, or unset RANK")
    rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    place = _device(device, int(environment["LOCAL_RANK"]))
    backend = backend or ("nccl" if place.type == "cuda" else "gloo")
    try:
        dist.init_process_group(
            backend, rank=rank, world_size=size, timeout=collective_timeout(timeout_minutes, backend)
        )
    except RuntimeError as error:
        if "connectFullMesh" not in str(error):
            raise
        raise InputError(
            f"rank {rank} cannot reach the other ranks over gloo: set GLOO_SOCKET_IFNAME to the network interface that "
            f"joins the nodes, as `ip address` names it; {error}"
        ) from error
    try:
        yield World(rank, size, place, dist.group.WORLD)
        # A rank that tears the group down while another still uses it can abort the other at exit.
        dist.barrier()
    finally:
        dist.destroy_process_group()


def collective_timeout(minutes: float, backend: str) -> timedelta:
    """After how long a collective of ``backend`` fails, where ranks may wait for each other ``minutes``.

    gloo raises an error, which can be explained. NCCL's own watchdog ends the process without naming a rank: it is to
    come after whoever does (megalrps/training/watch.py).
    """
    return timedelta(minutes=minutes, seconds=_NCCL_WAITS_LONGER if backend == "nccl" else 0.0)


def _device(name: str, local_rank: int) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise InputError(f"--device {name} is unknown: use auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no CUDA device is visible; use --device cpu, or check the driver")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise InputError(
            f"local rank {local_rank} has no GPU: {torch.cuda.device_count()} visible; lower --nproc-per-node"
        )
    place = torch.device("cuda", local_rank)
    torch.cuda.set_device(place)
    return place
