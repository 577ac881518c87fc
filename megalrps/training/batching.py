"""How a data-parallel rank's share of a global batch is cut into micro-batches."""

from megalrps.errors import InputError
from megalrps.parallel.layout import Layout
from megalrps.parallel.options import ParallelOptions
from megalrps.parallel.schedule import check_micro_batches
from megalrps.training.options import TrainingOptions


def micro_batch_size(training: TrainingOptions, parallel: ParallelOptions, layout: Layout) -> int:
    """Samples of one pass: as stated, or else the whole share of a rank, or as much of it as keeps a pipeline busy.

    A pipeline of P ranks is given at least 2 P micro-batches where the share and the schedule allow, which leaves 1F1B
    idle for less than a third of a step, and otherwise as many as they allow. Raises InputError where the schedule can
    run with no number of micro-batches that the share can be cut into, or not with the stated one.
    """
    share = training.global_batch_size // layout.dp
    stated = training.micro_batch_size
    if layout.pp == 1:
        return stated or share
    if stated is None:
        runnable = [size for size in _divisors(share) if _runs(parallel, layout, share // size)]
        busy = [size for size in runnable if share // size >= 2 * layout.pp]
        if runnable:
            return max(busy) if busy else min(runnable)
    size = stated or 1
    check_micro_batches(parallel.pipeline_schedule, layout.pp, share // size)
    return size


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _runs(parallel: ParallelOptions, layout: Layout, micro_batches: int) -> bool:
    try:
        check_micro_batches(parallel.pipeline_schedule, layout.pp, micro_batches)
    except InputError:
        return False
    return True
