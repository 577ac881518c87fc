"""Training steps at parallel layouts beside DDP and FSDP2: seconds, bytes sent, and memory, on the CPU over gloo.

    OMP_NUM_THREADS=1 python benchmarks/parallel.py --output benchmarks/results/parallel.json

*Overhead*: one update of a tiny LLaMA on 1, 2 and 4 processes of one thread each. All contenders on as many processes
live in the same ones and take turns, another one first in each round; the plain loops of one process are among them,
while the others wait. They train the same model on the same batches, and their losses are compared. A figure is the
median over rounds of the CPU seconds of an update, user and system, summed over the processes with all their threads: a
core that is waited for costs none, so what is left is arithmetic and communication. Wall seconds, those of the slowest
process, say little where processes share cores.

*Bytes*: what each rank's calls send by rings (an all-reduce of n bytes 2 n (R - 1) / R, an all-gather or reduce-scatter
n (R - 1) / R, a message n), beside the closed form of megalrps.model.traffic; and what the processes have really
written, to their sockets, beside what gloo needs for these calls (its reduce-scatter is an all-reduce).

*Memory*: the most that torch's allocator has given out on a rank during an update, beside what the dry run tells.

With ``--device cuda`` only one process is measured, ours beside the plain one, by wall seconds:

    python benchmarks/parallel.py --device cuda --preset llama-203m --sequence-length 1024 --bf16 \\
        --output benchmarks/results/parallel_cuda.json
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from machine import processor
from parallel_contenders import Contender, Work, contenders, job_of, with_memory_in_mind
from parallel_measures import Held, Sent, Timed, held, sent, times
from rank_processes import on_ranks

from megalrps.model.config import ModelConfig
from megalrps.model.counts import parameter_count
from megalrps.model.presets import PRESETS
from megalrps.model.traffic import step_traffic
from megalrps.training.dry_run import report_ranks
from megalrps.training.prepare import Job

_TINY = ModelConfig(num_layers=4, hidden_size=128, num_attention_heads=4, ffn_hidden_size=344, vocab_size=2048)
_PEERS = ("DDP", "FSDP2")


def overhead(by_ranks: Mapping[int, Sequence[Contender]], work: Work, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every contender, and how far any two losses of the same update part."""
    found: dict[str, Any] = {}
    losses: list[list[float]] = []
    for ranks, group in by_ranks.items():
        by_rank = on_ranks(ranks, times, group, work, options.device, options.rounds, options.updates)
        rows = {each.name: _seconds([of[each.name] for of in by_rank[: each.ranks]]) for each in group}
        for each in group:
            rows[each.name]["ratio"] = _ratios(each, rows, _clock(options.device))
        found[str(ranks)] = rows
        losses += [by_rank[0][each.name].losses for each in group]
    difference = max(max(same) - min(same) for same in zip(*losses, strict=True))
    return {"seconds": found, "largest_loss_difference_nats": float(f"{difference:.2g}")}


def _clock(device: str) -> str:
    return "cpu" if device == "cpu" else "wall"


def _seconds(by_rank: Sequence[Timed]) -> dict[str, Any]:
    rounds = list(zip(*(each.turns for each in by_rank), strict=True))
    cpu = [sum(turn.cpu for turn in ranks) for ranks in rounds]
    wall = [max(turn.wall for turn in ranks) for ranks in rounds]
    return {
        "median_cpu_seconds": round(statistics.median(cpu), 4),
        "median_wall_seconds": round(statistics.median(wall), 4),
        "cpu_seconds": [round(value, 4) for value in cpu],
        "wall_seconds": [round(value, 4) for value in wall],
    }


def _ratios(contender: Contender, rows: Mapping[str, Any], clock: str) -> dict[str, float]:
    """The contender's median over that of every peer in the same processes: on all of them, and on one."""
    if contender.alone is None:
        return {}
    peers = {name: rows[name] for name in _PEERS if name in rows and name != contender.name}
    peers["one process"] = rows[contender.alone]
    own = rows[contender.name][f"median_{clock}_seconds"]
    return {name: round(own / peer[f"median_{clock}_seconds"], 3) for name, peer in peers.items()}


def bytes_sent(ours: Sequence[Contender], work: Work) -> dict[str, Any]:
    """By layout and dimension: bytes that all ranks send in an update, and what is told of them."""
    rows = {}
    for contender in ours:
        by_rank: list[Sent] = on_ranks(contender.ranks, sent, contender, work)
        job = job_of(contender, work)
        forms, reports = [closed_form(job, rank) for rank in range(contender.ranks)], report_ranks(job)
        dimensions = sorted({name for each in by_rank for name in each.by_dimension})
        counted = {name: round(sum(each.by_dimension.get(name, 0.0) for each in by_rank)) for name in dimensions}
        told = {name: sum(each[name] for each in forms) for name in dimensions}
        written = [each.written for each in by_rank if each.written is not None]
        gloo = sum(each.gloo for each in by_rank)
        rows[contender.name] = {
            "counted": counted,
            "closed_form": told,
            "dry_run": {name: sum(each.sent[name] for each in reports) for name in dimensions},
            "ratio": {name: round(counted[name] / told[name], 4) for name in dimensions},
            "needed_by_gloo": round(gloo),
            "written": None if len(written) < len(by_rank) else sum(written),
            "written_ratio": None if len(written) < len(by_rank) else round(sum(written) / gloo, 4),
        }
    return rows


def closed_form(job: Job, rank: int) -> Counter[str]:
    """What a rank sends in an update by megalrps.model.traffic, which knows one stage: the sum over those it holds."""
    place, layout = job.layout.coordinates(rank), job.layout
    where = job.schedule.stage_ranks if job.schedule is not None else (0,)
    total = Counter[str]()
    for index, stage in enumerate(job.stages):
        if where[index] != place.pp:
            continue
        traffic = step_traffic(
            job.model,
            layout,
            stage,
            samples=job.config.training.global_batch_size // layout.dp,
            sequence_length=job.config.data.seq_length,
            autocast=job.config.training.bf16,
            sequence_parallel=job.config.parallel.sequence_parallel,
            sharded=job.config.parallel.data_parallel_sharding_strategy != "no_shard",
        )
        beside = [each for each in (index - 1, index + 1) if 0 <= each < len(where)]
        elsewhere = sum(where[each] != place.pp for each in beside)  # to a stage on this same rank nothing is sent
        total.update({**asdict(traffic), "pp": traffic.pp * elsewhere // max(1, len(beside))})
    return total


def memory(group: Sequence[Contender], work: Work) -> dict[str, Any]:
    """By contender: the peak of every rank, and what the dry run tells of it where it is ours."""
    rows: dict[str, Any] = {}
    for contender in group:
        by_rank: list[Held] = on_ranks(contender.ranks, held, contender, work)
        peaks = [each.peak for each in by_rank]
        several = contender.kind in ("ddp", "fsdp2")  # of these there is one for each number of processes
        name = f"{contender.name}, {contender.ranks} processes" if several else contender.name
        rows[name] = {"peak": peaks, "between_updates": [each.between for each in by_rank]}
        if contender.kind == "ours":
            expected = [each.bytes.total for each in report_ranks(job_of(contender, work))]
            rows[name] |= {
                "told": expected,
                "ratio": [round(tells / peak, 4) for tells, peak in zip(expected, peaks, strict=True)],
            }
    return rows


def _load() -> list[float]:
    return [round(value, 2) for value in os.getloadavg()]


def describe(options: argparse.Namespace, work: Work) -> dict[str, Any]:
    """What was compared, on what and how."""
    on_gpu = {"gpu": torch.cuda.get_device_name()} if options.device == "cuda" else {}
    return {
        "compares": {
            "ours": "megalrps train_step at a layout: Transformer, flat buffers, AdamW kernel, --ddp-bucket-size 40M",
            "peer": "the same Transformer under torch's DistributedDataParallel or fully_shard (each block, then the "
            "rest), or alone; clip_grad_norm_ and torch.optim.AdamW(fused=True)",
        },
        "convention": "median over rounds of the CPU seconds of one update, user and system, summed over processes "
        "(with a GPU: wall seconds); ratio = ours / peer, below 1 is faster; bytes as ring collectives send them; "
        "memory is what torch's allocator has given out",
        "command": shlex.join(["python", "benchmarks/parallel.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "device": {
            "kind": options.device,
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads_a_process": 1,
            **on_gpu,
        },
        "load_average": {"before": _load()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "shape": {
            "layers": work.model.num_layers,
            "hidden": work.model.hidden_size,
            "heads": work.model.num_attention_heads,
            "feed_forward": work.model.feed_forward_width,
            "vocabulary": work.model.vocab_size,
            "parameters": parameter_count(work.model),
            "sequence_length": work.sequence_length,
            "batch_size": work.batch_size,
            "micro_batch_size_of_pipelines": options.micro_batch_size,
            "precision": "bf16 autocast" if work.bf16 else "fp32",
        },
        "rounds": options.rounds,
        "updates_a_turn": options.updates,
    }


def print_overhead(found: Mapping[str, Any]) -> None:
    """A line for every contender."""
    print(f"{'ranks':>5} {'':24} {'CPU s':>8} {'wall s':>8}  ratio to")
    for ranks, group in found["seconds"].items():
        for name, row in group.items():
            ratios = ", ".join(f"{peer} {value:.2f}" for peer, value in row["ratio"].items())
            print(f"{ranks:>5} {name:24} {row['median_cpu_seconds']:8.4f} {row['median_wall_seconds']:8.4f}  {ratios}")
    print(f"losses differ by at most {found['largest_loss_difference_nats']:.1e} nats")


def print_bytes(rows: Mapping[str, Any]) -> None:
    """A line for every layout and dimension."""
    for name, row in rows.items():
        for dimension, counted in row["counted"].items():
            told = f"closed form {row['closed_form'][dimension]:12,}, ratio {row['ratio'][dimension]:.4f}"
            print(f"{name:30} {dimension:4} {counted:12,} bytes, {told}")
        print(f"{'':30} written / needed by gloo: {row['written_ratio']}")


def print_memory(rows: Mapping[str, Any]) -> None:
    """A line for every layout and rank."""
    for name, row in rows.items():
        for rank, peak in enumerate(row["peak"]):
            tells = f", told {row['told'][rank]:12,}, ratio {row['ratio'][rank]:.4f}" if "told" in row else ""
            print(f"{name:30} rank {rank} {peak:12,} bytes{tells}")


def main() -> None:
    parser = argparse.ArgumentParser(description="training steps at parallel layouts beside DDP and FSDP2")
    parser.add_argument("--preset", choices=list(PRESETS), help="default: 4 layers of 128, vocabulary 2,048")
    parser.add_argument("--vocab-size", type=int, default=32000, help="of a preset that has none of its own")
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--micro-batch-size", type=int, default=2, help="of pipelines and what they are compared with")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--updates", type=int, default=5, help="of a contender's turn")
    parser.add_argument("--parts", nargs="+", choices=["overhead", "bytes", "memory"], help="default: all, on the CPU")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--output", type=Path, help="write the JSON here too")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device is visible")
    model = _TINY if options.preset is None else PRESETS[options.preset]
    model = model if model.vocab_size else replace(model, vocab_size=options.vocab_size)
    work = Work(model, options.sequence_length, options.batch_size, options.bf16)
    everyone = contenders(options.micro_batch_size)
    if options.device == "cuda":
        everyone, options.parts = {1: everyone[1]}, ["overhead"]
    parts = options.parts or ["overhead", "bytes", "memory"]
    result = describe(options, work)
    ours = [each for group in everyone.values() for each in group if each.kind == "ours"]
    if "overhead" in parts:
        result["overhead"] = overhead(everyone, work, options)
        print_overhead(result["overhead"])
    if "bytes" in parts:
        result["bytes"] = bytes_sent([each for each in ours if each.ranks > 1], work)
        print_bytes(result["bytes"])
    if "memory" in parts:
        chosen = [each for ranks, group in everyone.items() for each in group if each.ranks == ranks]
        result["memory"] = memory([*chosen, *with_memory_in_mind(options.micro_batch_size)], work)
        print_memory(result["memory"])
    result["load_average"]["after"] = _load()
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
