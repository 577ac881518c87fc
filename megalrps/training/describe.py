"""What a job would do, before it does it: parameters, FLOPs, memory, plan and cost. Reads no weights."""

from dataclasses import asdict
from typing import Any

from megalrps.model.counts import (
    TrainingMemory,
    flops_per_token,
    parameter_count,
    rank_parameter_count,
    training_memory,
)
from megalrps.model.traffic import Traffic, step_traffic
from megalrps.paths.cost import cost_steps, cost_steps_by_paradigm
from megalrps.paths.draw import draw_tree
from megalrps.paths.plan import Increment
from megalrps.training.prepare import Job

_GIB = 1 << 30


def job_as_json(job: Job) -> dict[str, Any]:
    """The object that ``--dry-run --json`` prints."""
    data, training, memory = job.config.data, job.config.training, _memory(job)
    return {
        "config": job.config.to_json(),
        "plan": job.plan.to_json(),
        "parameters": parameter_count(job.model),
        "flops_per_token": flops_per_token(job.model, data.seq_length),
        "flop_convention": "full-square",
        "tokens_per_step": training.global_batch_size * data.seq_length,
        "cost_steps": cost_steps(job.plan),
        "cost_steps_by_paradigm": cost_steps_by_paradigm(job.plan.increments, job.config.plan),
        "layout": asdict(job.layout),
        "parameters_per_rank": rank_parameter_count(job.model, job.layout.tp),
        "bytes_per_rank": {**asdict(memory), "total": memory.total},
        "bytes_sent_per_step": asdict(_traffic(job)),
        "increments": {
            each.manifest.name: {"tokens": each.manifest.tokens, "fingerprint": each.manifest.fingerprint}
            for each in job.increments
        },
    }


def describe_job(job: Job) -> str:
    """The same for a person: the resolved options as ``--config`` reads them, the tree of paths, and the figures."""
    return "\n".join((job.config.to_yaml(), draw_tree(job.plan), "", describe_size(job)))


def describe_size(job: Job) -> str:
    """Model, batch, cost and memory in a few lines; also the head of every log."""
    data, training = job.config.data, job.config.training
    tokens, steps = training.global_batch_size * data.seq_length, cost_steps(job.plan)
    flops, memory = flops_per_token(job.model, data.seq_length), _memory(job)
    return "\n".join(
        (
            f"model       {parameter_count(job.model) / 1e6:,.2f} M parameters, "
            f"{flops / 1e6:,.1f} MFLOP a token (6N + 12LSd: forward and backward, full-square attention)",
            f"batch       {training.global_batch_size} x {data.seq_length} = {tokens:,} tokens a step, "
            f"ranks: {job.layout.world_size}, {'bf16 autocast over fp32' if training.bf16 else 'fp32'}",
            f"increments  {', '.join(_describe_increment(job, each) for each in job.plan.increments)}",
            f"cost        {steps:,} steps = {steps * tokens:,} tokens = {steps * tokens * flops:.3e} FLOP",
            f"memory      about {memory.total / _GIB:.2f} GiB a rank "
            f"(weights {memory.parameters / _GIB:.2f}, gradients {memory.gradients / _GIB:.2f}, "
            f"optimizer {memory.optimizer / _GIB:.2f}, activations {memory.activations / _GIB:.2f})",
            *_describe_layout(job),
        )
    )


def _describe_increment(job: Job, increment: Increment) -> str:
    """Its steps, and how often they go over its data where that is more than once."""
    samples = increment.steps * job.config.training.global_batch_size
    passes = samples / job.stream((increment.name,)).samples_per_epoch
    return f"{increment.name} ({increment.steps:,} steps{f', {passes:.2f} passes' if passes > 1 else ''})"


def _describe_layout(job: Job) -> list[str]:
    """A line for a layout that cuts the model; data parallelism alone is told by the number of ranks."""
    layout, traffic = job.layout, _traffic(job)
    if layout.tp == 1:
        return []
    sequence = ", sequence parallel" if job.config.parallel.sequence_parallel else ""
    held = rank_parameter_count(job.model, layout.tp) / 1e6
    return [
        f"layout      tp {layout.tp}{sequence} x dp {layout.dp}: {held:,.2f} M parameters a rank, which sends "
        f"{traffic.tensor / _GIB:.3f} GiB a step along tp and {traffic.data / _GIB:.3f} along dp"
    ]


def _traffic(job: Job) -> Traffic:
    training, layout = job.config.training, job.layout
    return step_traffic(
        job.model,
        samples=training.global_batch_size // layout.dp,
        sequence_length=job.config.data.seq_length,
        autocast=training.bf16,
        tensor=layout.tp,
        data=layout.dp,
        sequence_parallel=job.config.parallel.sequence_parallel,
    )


def _memory(job: Job) -> TrainingMemory:
    return training_memory(
        job.model,
        micro_batch_size=job.micro_batch_size,
        sequence_length=job.config.data.seq_length,
        autocast=job.config.training.bf16,
        ranks=job.layout.tp,
        sequence_parallel=job.config.parallel.sequence_parallel,
    )
