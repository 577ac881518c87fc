"""The processes that save or load one checkpoint among them, and how they agree that all of them succeeded."""

import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, cast

import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from megalrps.checkpoint.errors import CheckpointError, NoSpaceError, SaveError
from megalrps.errors import InputError

Result = TypeVar("Result")

_REFUSALS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM})


@dataclass(frozen=True)
class Ranks:
    """The members of ``group`` (None: the default group), or this process alone without torch.distributed."""

    group: dist.ProcessGroup | None = None

    @property
    def alone(self) -> bool:
        return not (dist.is_available() and dist.is_initialized())

    @property
    def rank(self) -> int:
        return 0 if self.alone else dist.get_rank(self.group)

    @property
    def size(self) -> int:
        return 1 if self.alone else dist.get_world_size(self.group)

    def together(self, work: Callable[[], Result]) -> list[Result]:
        """Run ``work`` on every rank and return the results by rank; what raises on one rank raises on all of them.

        A collective: every rank of the group calls it. The exception is the one of the lowest rank that failed; one
        that is neither a CheckpointError nor an InputError becomes a CheckpointError that names the rank.
        """
        result, failure = None, None
        try:
            result = work()
        except Exception as error:
            failure = _portable(error, self.rank, CheckpointError, "failed")
        outcomes: list[tuple[Result | None, Exception | None]] = [(result, failure)]
        if not self.alone:
            outcomes = outcomes * self.size
            dist.all_gather_object(outcomes, (result, failure), group=self.group)
        for _, failed in outcomes:
            if failed is not None:
                raise failed
        return [cast(Result, outcome) for outcome, _ in outcomes]


def first_failure(exception: CheckpointException, kind: type[CheckpointError], what: str) -> Exception:
    """The exception to raise for what torch.distributed.checkpoint wraps (a BaseException, equal on all ranks).

    That of the lowest rank that failed, itself where it is ours, else as a ``kind`` that begins with ``what`` and
    names the rank.
    """
    rank, (error, _) = min(exception.failures.items(), key=lambda failure: failure[0])
    return _portable(error, rank, kind, what)


def _portable(error: BaseException, rank: int, kind: type[CheckpointError], what: str) -> Exception:
    """An exception that pickles (other ranks get it) and that callers can tell apart."""
    if isinstance(error, CheckpointError | InputError):
        return error
    reason = f"{what}: rank {rank}: {type(error).__name__}: {error}"
    if kind is SaveError and isinstance(error, OSError) and error.errno in _REFUSALS:
        reason += "; make room and start again: all that was committed is there, and nothing half-written is left"
        kind = NoSpaceError
    portable = kind(reason)
    portable.__cause__ = error
    return portable
