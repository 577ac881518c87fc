"""What a job would do, before it does it: parameters, FLOPs, memory, plan and cost. Reads no weights."""

from dataclasses import asdict
from typing import Any

from megalrps.model.counts import TrainingMemory, flops_per_token, parameter_count, training_memory
from megalrps.paths.cost import cost_steps, cost_steps_by_paradigm
from megalrps.paths.draw import draw_tree
from megalrps.training.prepare import Job

_GIB = 1 << 30


def job_as_json(job: Job, world_size: int) -> dict[str, Any]:
    """The object that ``--dry-run --json`` prints."""
    data, training = job.config.data, job.config.training
    return {
        "config": job.config.to_json(),
        "plan": job.plan.to_json(),
        "parameters": parameter_count(job.model),
        "flops_per_token": flops_per_token(job.model, data.seq_length),
        "flop_convention": "full-square",
        "tokens_per_step": training.global_batch_size * data.seq_length,
        "cost_steps": cost_steps(job.plan),
        "cost_steps_by_paradigm": cost_steps_by_paradigm(job.plan.increments, job.config.plan),
        "bytes_per_rank": {**asdict(_memory(job, world_size)), "total": _memory(job, world_size).total},
        "increments": {
            each.manifest.name: {"tokens": each.manifest.tokens, "fingerprint": each.manifest.fingerprint}
            for each in job.increments
        },
    }


def describe_job(job: Job, world_size: int) -> str:
    """The same for a person: the resolved options as ``--config`` reads them, the tree of paths, and the figures."""
    return "\n".join((job.config.to_yaml(), draw_tree(job.plan), "", describe_size(job, world_size)))


def describe_size(job: Job, world_size: int) -> str:
    """Model, batch, cost and memory in a few lines; also the head of every log."""
    data, training = job.config.data, job.config.training
    tokens, steps = training.global_batch_size * data.seq_length, cost_steps(job.plan)
    flops, memory = flops_per_token(job.model, data.seq_length), _memory(job, world_size)
    return "\n".join(
        (
            f"model       {parameter_count(job.model) / 1e6:,.2f} M parameters, "
            f"{flops / 1e6:,.1f} MFLOP a token (6N + 12LSd: forward and backward, full-square attention)",
            f"batch       {training.global_batch_size} x {data.seq_length} = {tokens:,} tokens a step, "
            f"ranks: {world_size}, {'bf16 autocast over fp32' if training.bf16 else 'fp32'}",
            f"increments  {', '.join(f'{each.name} ({each.steps:,} steps)' for each in job.plan.increments)}",
            f"cost        {steps:,} steps = {steps * tokens:,} tokens = {steps * tokens * flops:.3e} FLOP",
            f"memory      about {memory.total / _GIB:.2f} GiB a rank "
            f"(weights {memory.parameters / _GIB:.2f}, gradients {memory.gradients / _GIB:.2f}, "
            f"optimizer {memory.optimizer / _GIB:.2f}, activations {memory.activations / _GIB:.2f})",
        )
    )


def _memory(job: Job, world_size: int) -> TrainingMemory:
    return training_memory(
        job.model,
        micro_batch_size=job.config.training.micro_batch(world_size),
        sequence_length=job.config.data.seq_length,
        autocast=job.config.training.bf16,
    )
