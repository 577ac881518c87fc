"""How a rank's share of the global batch becomes micro-batches."""

from typing import get_args

import pytest

from megalrps.errors import InputError
from megalrps.parallel.layout import Layout
from megalrps.parallel.options import ParallelOptions
from megalrps.parallel.schedule import PipelineSchedule, check_micro_batches
from megalrps.training.batching import micro_batch_size
from megalrps.training.options import TrainingOptions


def size(
    share: int, *, stated: int | None = None, pp: int = 1, dp: int = 1, schedule: PipelineSchedule = "1f1b"
) -> int:
    training = TrainingOptions(global_batch_size=share * dp, micro_batch_size=stated)
    parallel = ParallelOptions(pipeline_model_parallel_size=pp, pipeline_schedule=schedule)
    return micro_batch_size(training, parallel, Layout(pp=pp, dp=dp))


@pytest.mark.parametrize(("share", "dp"), [(1, 1), (7, 3), (512, 2)])
def test_without_a_pipeline_the_whole_share_is_one_pass(share: int, dp: int):
    assert size(share, dp=dp) == share
    assert size(share, stated=1, dp=dp) == 1


@pytest.mark.parametrize("schedule", get_args(PipelineSchedule))
@pytest.mark.parametrize("pp", [2, 3, 4])
@pytest.mark.parametrize("share", [1, 2, 3, 4, 5, 8, 12, 16, 60, 97, 128])
def test_a_pipeline_gets_what_it_can_run_and_enough_of_it_where_there_is(
    share: int, pp: int, schedule: PipelineSchedule
):
    try:
        chosen = size(share, pp=pp, schedule=schedule)
    except InputError as refusal:
        assert "--pipeline-schedule" in str(refusal)
        with pytest.raises(InputError):
            check_micro_batches(schedule, pp, share)
        return
    assert share % chosen == 0
    check_micro_batches(schedule, pp, share // chosen)
    if share % (2 * pp) == 0:
        assert share // chosen == 2 * pp


def test_what_is_stated_is_run_or_refused():
    assert size(8, stated=4, pp=2) == 4
    with pytest.raises(InputError, match="--pipeline-schedule 1f1b cannot run 1 micro-batches a step over 2 pipeline"):
        size(8, stated=8, pp=2)
