"""What a job would do, before it does it: parameters, FLOPs, memory, plan and cost. Reads no weights."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from megalrps.data.options import DataOptions
from megalrps.exact import percent
from megalrps.model.counts import flops_per_token, parameter_count
from megalrps.parallel.layout import DIMENSIONS
from megalrps.parallel.schedule import SCHEDULES
from megalrps.paths.cost import cost_steps, cost_steps_by_paradigm
from megalrps.paths.draw import draw_tree
from megalrps.paths.plan import Increment
from megalrps.training.prepare import Job

_GIB = 1 << 30
_DRAWN_RANKS = 64


def job_as_json(job: Job) -> dict[str, Any]:
    """The object that ``--dry-run --json`` prints."""
    from megalrps.training.dry_run import report_ranks, timeline  # only a dry run needs the tracing of torch
    from megalrps.training.layout_warnings import warnings

    data, training, played = job.config.data, job.config.training, timeline(job)
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
        "micro_batch_size": job.micro_batch_size,
        "bubble_fraction": 0.0 if played is None else played.bubble_fraction,
        "stages": [
            {"layers": list(stage.layers), "embedding": stage.has_embedding, "head": stage.has_head, "pp": rank}
            for stage, rank in zip(job.stages, _where(job), strict=True)
        ],
        "warnings": warnings(job),
        "increments": {
            each.manifest.name: {"tokens": each.manifest.tokens, "fingerprint": each.manifest.fingerprint}
            for each in job.increments
        },
        "ranks": [report.to_json() for report in report_ranks(job)],
    }


def describe_job(job: Job) -> str:
    """The same for a person: the resolved options as ``--config`` reads them, the tree of paths, and the figures."""
    from megalrps.training.dry_run import timeline
    from megalrps.training.layout_warnings import warnings

    played = timeline(job)
    parts = [job.config.to_yaml(), draw_tree(job.plan), "", describe_size(job)]
    if played is not None:
        parts.append(f"bubble      {played.bubble_fraction:.1%} of all ranks' time, on paper: exchanges take none")
    if 1 < job.layout.world_size <= _DRAWN_RANKS:
        parts += ["", job.layout.draw()]
    parts += ["", *_table_of_ranks(job)]
    parts += [f"warning     {warning}" for warning in warnings(job)]
    return "\n".join(parts)


def describe_size(job: Job) -> str:
    """Model, batch, cost and layout in a few lines; also the head of every log."""
    data, training = job.config.data, job.config.training
    tokens, steps = training.global_batch_size * data.seq_length, cost_steps(job.plan)
    flops = flops_per_token(job.model, data.seq_length)
    precision = "bf16 over fp32" if training.bf16 else "fp16 over fp32" if training.fp16 else "fp32"
    return "\n".join(
        (
            f"model       {parameter_count(job.model) / 1e6:,.2f} M parameters, "
            f"{flops / 1e6:,.1f} MFLOP a token (6N + 12LSd: forward and backward, full-square attention)",
            f"batch       {training.global_batch_size} x {data.seq_length} = {tokens:,} tokens a step, "
            f"ranks: {job.layout.world_size}, {precision}",
            *_describe_documents(data),
            f"increments  {', '.join(_describe_increment(job, each) for each in job.plan.increments)}",
            f"cost        {steps:,} steps = {steps * tokens:,} tokens = {steps * tokens * flops:.3e} FLOP",
            *_describe_layout(job),
            *(f"note        {note}" for note in job.notes),
        )
    )


def _describe_documents(data: DataOptions) -> list[str]:
    """A line for samples that are not one text each; figures per token count every position of them all the same."""
    told = {
        "attention is within documents": data.reset_attention_mask,
        "positions count from each document's first token": data.reset_position_ids,
        "labels after an end of document do not count": data.eod_mask_loss,
        "samples are packed with whole documents, padding does not count": data.pack_documents,
    }
    given = [text for text, is_given in told.items() if is_given]
    return [f"documents   {'; '.join(given)}"] if given else []


def _describe_increment(job: Job, increment: Increment) -> str:
    """Its steps, and how often they go over its data where that is more than once."""
    samples = increment.steps * job.config.training.global_batch_size
    windows = (window for path in job.plan.paths for window in path.windows)
    replay = next((window.replay for window in windows if window.increments == (increment.name,)), None)
    passes = samples * (1 - replay.share if replay else 1) / job.union(increment.name).samples_per_epoch
    told = [f"{increment.steps:,} steps", *([f"{float(passes):.2f} passes"] if passes > 1 else [])]
    return f"{increment.name} ({', '.join([*told, *([f'{percent(replay.share)} replay'] if replay else [])])})"


def _describe_layout(job: Job) -> list[str]:
    """A line for a layout that cuts the model or its sequences, and one for a pipeline's schedule."""
    layout, parallel = job.layout, job.config.parallel
    sizes = [f"{name} {getattr(layout, name)}" for name in DIMENSIONS if getattr(layout, name) > 1 or name == "dp"]
    if layout.tp == layout.cp == layout.pp == 1:
        return []
    sequence = ", sequence parallel" if parallel.sequence_parallel and layout.tp > 1 else ""
    lines = [f"layout      {' x '.join(sizes)}{sequence}"]
    if job.schedule is not None:
        lines.append(
            f"schedule    {SCHEDULES[job.schedule.name].title}, {job.schedule.micro_batches} micro-batches of "
            f"{job.micro_batch_size}, layers by stage: {' '.join(str(len(stage.layers)) for stage in job.stages)}"
        )
    return lines


def _where(job: Job) -> tuple[int, ...]:
    """By stage: its pipeline rank."""
    return (0,) if job.schedule is None else job.schedule.stage_ranks


_HEADINGS = ("parameters", "total", "params", "grads", "optim", "activ", "exchange", "transient")


def _table_of_ranks(job: Job) -> list[str]:
    """A line for each kind of rank: what it holds, and what it sends."""
    from megalrps.training.dry_run import kinds_of_ranks

    sizes = asdict(job.layout)
    several = [name for name in DIMENSIONS if sizes[name] > 1 or (name == "dp" and sizes["cp"] > 1)]
    rows = [("rank", *_HEADINGS, *(f"sent {name}" for name in several))]
    for report in kinds_of_ranks(job):
        place = "  ".join(f"{name} {getattr(report.coordinates, name)}" for name in ("pp", "cp") if name in several)
        held = (report.bytes.total, *asdict(report.bytes).values())
        rows.append(
            (
                place or "each",
                f"{report.parameters / 1e6:,.2f} M",
                *(_gib(size) for size in held),
                *(_gib(report.sent[name]) for name in several),
            )
        )
    return [
        "memory at the fullest moment of a step and bytes sent in one, GiB a rank"
        + (f" of {job.layout.world_size}" if job.layout.world_size > 1 else ""),
        *_aligned(rows),
    ]


def _gib(size: int) -> str:
    return f"{size / _GIB:.3f}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if at else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
