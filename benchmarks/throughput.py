#!/usr/bin/env python3
"""Whole training steps, ours and our peers', by the clock: tokens/s, model TFLOP/s, MFU, and where the time goes.

    OMP_NUM_THREADS=1 python benchmarks/throughput.py --preset llama-20m --peer hf,hf-loop
    python benchmarks/throughput.py --device cuda --preset llama-1.2b --seq-length 2048 --micro-batch-size 8 \\
        --global-batch-size 32 --peer hf,torch-compile --output result.json

Ours is the loop of pretrain_gpt.py, step by step: samples, passes, clipping, AdamW, the line of metrics. Each contender
lives in a process of its own; they take turns, another one first in each round, and train on the same samples from the
same weights, so that their losses agree. The first updates are not counted. A figure is the median over rounds.

Flags that are not listed here are those of pretrain_gpt.py (--preset, --num-layers, --seq-length, --global-batch-size,
--micro-batch-size, --bf16, --device, --recompute-granularity, ...). Defaults: llama-20m, 4 sequences of 128 tokens, and
bf16 on CUDA, fp32 on the CPU. Peers take shape, batch, precision, optimizer and learning rate from them.
"""

import argparse
import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from machine import processor
from throughput_peers import PEERS, check_peer, ours
from throughput_report import OURS, breakdown_json, figures, ratios, show
from throughput_rounds import Contender, Work, in_turns

from megalrps.commandline import run_tool
from megalrps.config import Config, parse_config
from megalrps.data.indexed import IndexedDatasetWriter, token_dtype
from megalrps.data.manifest import TokenizerIdentity, describe_dataset, write_manifest
from megalrps.errors import InputError
from megalrps.model.config import ModelConfig
from megalrps.model.counts import flops_per_token, parameter_count
from megalrps.training.prepare import Job, prepare
from megalrps.training.throughput import peak_flops

OURS_DOES = (
    "the loop of pretrain_gpt.py, megalrps.training.loop.Loop.step: draws samples from the increment, passes, clip, "
    "AdamW, loss and norm on the host, a line in metrics.jsonl; no checkpoint, no evaluation"
)
CONVENTION = (
    "tokens/s: the labels of all updates of a turn over its wall seconds, from the end of the update before to the end "
    "of the last, the device synchronised; model TFLOP/s: tokens/s x (6W + 12LSd), W weights of matrix products with "
    "the head, full-square attention, nothing recomputed counted; MFU: that over the dense bf16 peak of the device, "
    "and none where the peak is not known or the work is fp32; CPU seconds: user and system, all threads of the "
    "process; medians over rounds; ratio = ours / peer of a rate, above 1 is faster"
)
_PEAK_MEMORY = {
    "cuda": "the most that torch's allocator has given out during a turn",
    "cpu": "the most resident memory of the process during a turn, libraries included",
}
_MOST_TOKENS = 1 << 24


@dataclass(frozen=True)
class Options:
    """The benchmark's own flags."""

    peers: tuple[str, ...]
    data: str | None
    synthetic_vocabulary: int
    rounds: int
    steps: int
    warm_up: int
    profile_steps: int
    threads: int
    one_at_a_time: bool
    output: Path | None

    def check(self) -> None:
        """Raise InputError for numbers and peers that nothing can be measured with."""
        for flag, value, least in (
            ("--rounds", self.rounds, 1),
            ("--steps", self.steps, 1),
            ("--warm-up", self.warm_up, 1),
            ("--profile-steps", self.profile_steps, 0),
            ("--threads", self.threads, 1),
            ("--synthetic-vocabulary", self.synthetic_vocabulary, 2),
        ):
            if value < least:
                raise InputError(f"{flag} {value}: must be at least {least}")
        for name in self.peers:
            check_peer(name)
        if self.output is not None and not self.output.parent.is_dir():
            raise InputError(f"--output {self.output}: there is no directory {self.output.parent}; make it first")

    @property
    def updates(self) -> int:
        """Updates of one contender from its first to its last."""
        return self.warm_up + self.rounds * self.steps + self.profile_steps


def parsed(arguments: Sequence[str]) -> tuple[Options, list[str]]:
    """Our own flags, and the rest."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--peer", default="", help=f"by commas, of {', '.join(PEERS)}; default: ours alone")
    parser.add_argument("--data", metavar="PREFIX", help="train on this increment; default: random tokens")
    parser.add_argument("--synthetic-vocabulary", type=int, default=2048, help="of a shape that has none of its own")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender")
    parser.add_argument("--steps", type=int, default=5, help="updates of a turn")
    parser.add_argument("--warm-up", type=int, default=3, help="updates before the first turn, which are not counted")
    parser.add_argument("--profile-steps", type=int, default=2, help="updates of the breakdown; 0: no breakdown")
    parser.add_argument("--threads", type=int, default=1, help="of torch, in every contender")
    parser.add_argument("--one-at-a-time", action="store_true", help="start and end a contender for every turn")
    parser.add_argument("--output", type=Path, metavar="PATH", help="write all figures here too")
    known, rest = parser.parse_known_args(arguments)
    values = vars(known)
    peers = tuple(dict.fromkeys(name.strip() for name in values.pop("peer").split(",") if name.strip()))
    return Options(peers=peers, **values), rest


def configured(options: Options, rest: Sequence[str]) -> tuple[Config, str]:
    """The job's options without its data, and the device it runs on."""
    said = {flag.partition("=")[0] for flag in rest}
    shaped = said & {"--preset", "--config", "--num-layers"}
    defaults = [*([] if shaped else ["--preset", "llama-20m"]), "--seq-length", "128", "--global-batch-size", "4"]
    config = parse_config([*defaults, *rest], "throughput.py")
    device = config.runtime.device
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no CUDA device is visible; use --device cpu, or check the driver")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not said & {"--bf16", "--no-bf16", "--fp16"}:
        config = replace(config, training=replace(config.training, bf16=True))
    if config.training.fp16 and options.peers:
        raise InputError("--fp16: peers are run in fp32 or bf16 alone; leave --peer out, or use --bf16")
    if device == "cuda" and torch.cuda.device_count() > 1:
        raise InputError("several GPUs are visible, and transformers' Trainer takes all: set CUDA_VISIBLE_DEVICES=0")
    if config.parallel.fewest_ranks > 1:
        raise InputError("this benchmark is of one process: leave the flags of a layout out")
    plan = replace(
        config.plan, paradigm="ptfs", increment_steps=(options.updates,), lr_decay_style="constant", lr_warmup_iters=0
    )
    # a run directory of its own is made when the run opens; the name alone has to be there
    checkpoint = replace(config.checkpoint, save="unused")
    logging = replace(config.logging, log_interval=options.updates + 1, tensorboard_dir=None)
    return replace(config, plan=plan, checkpoint=checkpoint, logging=logging), device


def write_random_increment(prefix: Path, vocabulary: int, tokens: int) -> str:
    """An increment of uniformly random tokens; returns its prefix."""
    kind = token_dtype(vocabulary)
    with IndexedDatasetWriter(prefix, kind) as writer:
        writer.add_document(np.random.default_rng(0).integers(0, vocabulary, tokens, dtype=np.int64).astype(kind))
    identity = TokenizerIdentity("SentencePieceTokenizer", vocabulary, 0, "0" * 64)
    manifest = describe_dataset(
        prefix, name="random", tokenizer=identity, text_bytes=tokens, append_eod=False, sources=("random",)
    )
    write_manifest(prefix, manifest)
    return str(prefix)


def measure(options: Options, rest: Sequence[str]) -> dict[str, Any]:
    """All figures, as they are written."""
    options.check()
    config, device = configured(options, rest)
    with TemporaryDirectory() as place:
        prefix = options.data
        if prefix is None:
            config.model.validate()
            samples = (options.updates + 1) * config.training.global_batch_size
            tokens = min(samples * config.data.seq_length, max(_MOST_TOKENS, config.data.seq_length)) + 1
            vocabulary = config.model.vocab_size or options.synthetic_vocabulary
            prefix = write_random_increment(Path(place) / "random", vocabulary, tokens)
        data = replace(config.data, increments=(prefix,), valid_data_path=(), tokenizer_model=None)
        config = replace(config, data=data)
        job = prepare(config, 1)
        work = Work(config, device, options.threads, options.updates)
        trains = {OURS: ours, **{name: PEERS[name].train for name in options.peers}}
        result = described(options, job, device)
        before = _load()
        rounds, profiles, losses = in_turns(
            {name: partial(Contender, name, train, work) for name, train in trains.items()},
            warm_up=options.warm_up,
            rounds=options.rounds,
            updates=options.steps,
            profiled=options.profile_steps,
            one_at_a_time=options.one_at_a_time,
        )
    result["load_average"] = {"before": before, "after": _load()}
    result["contenders"] = {name: figures(of, result) for name, of in rounds.items()}
    result["ratio"] = {name: ratios(result["contenders"], name) for name in options.peers}
    result["breakdown"] = {name: breakdown_json(of) for name, of in profiles.items()}
    result["losses"] = {name: [float(f"{value:.7g}") for value in of] for name, of in losses.items()}
    result["largest_loss_difference_nats"] = {
        name: float(f"{max(abs(a - b) for a, b in zip(losses[OURS], losses[name], strict=True)):.2g}")
        for name in options.peers
        if name != "litgpt"
    }
    return result


def described(options: Options, job: Job, device: str) -> dict[str, Any]:
    """What is compared, on what and how."""
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    training, sequence = job.config.training, job.config.data.seq_length
    peak = peak_flops(gpu, training.bf16)
    names = ("torch", "transformers", "accelerate", "litgpt", "triton", "numpy")
    return {
        "compares": {OURS: OURS_DOES, **{name: PEERS[name].does for name in options.peers}},
        "convention": CONVENTION,
        "peak_memory": _PEAK_MEMORY[device],
        "command": shlex.join(["python", "benchmarks/throughput.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "device": {
            "kind": device,
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": options.threads,
            "gpu": gpu,
            "dense_bf16_peak_tflops": None if peak is None else peak / 1e12,
        },
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in names if _version(name)}},
        "shape": {
            "preset": job.config.preset,
            **_sizes(job.model),
            "parameters": parameter_count(job.model),
            "flops_per_token": flops_per_token(job.model, sequence),
            "sequence_length": sequence,
            "global_batch_size": training.global_batch_size,
            "micro_batch_size": job.micro_batch_size,
            "precision": "bf16" if training.bf16 else "fp16" if training.fp16 else "fp32",
        },
        "data": "random tokens" if options.data is None else job.increments[0].manifest.name,
        "tokens_per_update": training.global_batch_size * sequence,
        "rounds": options.rounds,
        "updates_a_turn": options.steps,
        "warm_up_updates": options.warm_up,
        "profiled_updates": options.profile_steps,
        "one_at_a_time": options.one_at_a_time,
    }


def _sizes(model: ModelConfig) -> dict[str, Any]:
    return {
        "layers": model.num_layers,
        "hidden": model.hidden_size,
        "heads": model.num_attention_heads,
        "key_value_heads": model.query_groups,
        "feed_forward": model.feed_forward_width,
        "vocabulary": model.vocab_size,
        "tied": not model.untie_embeddings_and_output_weights,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _load() -> list[float]:
    return [round(value, 2) for value in os.getloadavg()]


def main() -> None:
    options, rest = parsed(sys.argv[1:])
    result = measure(options, rest)
    show(result)
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_tool(main, "throughput.py")
