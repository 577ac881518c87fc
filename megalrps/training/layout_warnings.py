"""What of a layout wastes ranks or memory, though it works: said before a launch takes them."""

from megalrps.training.dry_run import costs_of_stages
from megalrps.training.prepare import Job

_RANKS_OF_A_NODE = 8
_UNEVEN = 0.1
_PADDED = 0.05


def warnings(job: Job) -> list[str]:
    """A line for each, which names the flag to change; none for a layout without fault."""
    return [*_of_stages(job), *_of_batch(job), *_of_tensor_parallel(job), *_of_vocabulary(job), *_of_offload(job)]


def _of_stages(job: Job) -> list[str]:
    if job.schedule is None:
        return []
    told = []
    empty = [index for index, stage in enumerate(job.stages) if not stage.layers and not stage.has_head]
    if empty:
        which = ", ".join(f"{index} (rank {job.schedule.stage_ranks[index]})" for index in empty)
        told.append(f"pipeline stage {which} has no layer and idles: change --pipeline-model-parallel-layout")
    costs = costs_of_stages(job)
    by_rank = [0.0] * job.layout.pp
    for stage, rank in enumerate(job.schedule.stage_ranks):
        by_rank[rank] += costs[stage]
    mean = sum(by_rank) / len(by_rank)
    if max(by_rank) > (1 + _UNEVEN) * mean:
        dearest = by_rank.index(max(by_rank))
        told.append(
            f"stages are uneven: pipeline rank {dearest} computes {max(by_rank) / mean - 1:.0%} more than the mean, "
            "and the others wait for it: change --num-layers, --pipeline-model-parallel-size or "
            "--pipeline-model-parallel-layout"
        )
    return told


def _of_batch(job: Job) -> list[str]:
    told = []
    samples, layout = job.config.training.global_batch_size // job.layout.dp, job.layout
    if job.schedule is not None and job.schedule.micro_batches < 2 * layout.pp:
        told.append(
            f"{job.schedule.micro_batches} micro-batches a step for {layout.pp} stages leave a large bubble: raise "
            "--global-batch-size or lower --micro-batch-size"
        )
    if layout.dp > 1 and samples == 1:
        told.append(
            f"each of {layout.dp} data-parallel ranks has one sample a step: raise --global-batch-size, or take fewer "
            "ranks"
        )
    return told


def _of_tensor_parallel(job: Job) -> list[str]:
    told = []
    if job.layout.tp > 1 and not job.config.parallel.sequence_parallel:
        told.append(
            "without --sequence-parallel every tensor-parallel rank keeps norms and residual stream whole: add it"
        )
    if job.layout.tp > _RANKS_OF_A_NODE:
        told.append(
            f"--tensor-model-parallel-size {job.layout.tp}: a group of {job.layout.tp} ranks leaves a node of "
            f"{_RANKS_OF_A_NODE}, and exchanges in every layer"
        )
    return told


def _of_vocabulary(job: Job) -> list[str]:
    used, rows = job.increments[0].manifest.tokenizer.vocab_size, job.model.vocab_size
    if rows - used <= _PADDED * used:
        return []
    return [
        f"the vocabulary has {rows} rows for {used} ids, {rows / used - 1:.0%} more: lower "
        "--make-vocab-size-divisible-by or --vocab-size"
    ]


def _of_offload(job: Job) -> list[str]:
    if not job.config.activations.cpu_offloading_num_layers:
        return []
    return ["activations of --cpu-offloading-num-layers are counted as held, as they are on a CPU: a GPU holds less"]
