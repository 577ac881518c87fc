"""One training step of our model and optimizer beside transformers' LLaMA with torch's fused AdamW, on the CPU.

    OMP_NUM_THREADS=1 python benchmarks/model_step.py --output benchmarks/results/model_step_cpu.json

Ours: ``train_step`` of the training loop (``Transformer``, flat buffers, ``adamw_``). The peer: ``LlamaForCausalLM``
with scaled-dot-product attention, ``clip_grad_norm_`` and ``torch.optim.AdamW(fused=True)``. Both start from the same
weights, take the same batches, clip at the same norm and decay the same matrices, so their losses must agree; the
largest difference is written down with the times.

A figure is the median of alternating steps in CPU seconds of the process (all its threads), after steps that are not
counted. They are user seconds, the arithmetic, and system seconds, here the kernel's work for memory that is touched
for the first time; both are given apart. ``ratio`` is our seconds over the peer's: below 1 is faster. FLOPs are
6W + 12LSd a token (full square).
"""

import argparse
import json
import os
import platform
import resource
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from machine import processor
from torch import Tensor, nn

from megalrps.model.config import ModelConfig
from megalrps.model.counts import flops_per_token, parameter_count
from megalrps.model.huggingface import to_huggingface
from megalrps.model.initialisation import initialise_
from megalrps.model.presets import PRESETS
from megalrps.model.transformer import Transformer
from megalrps.parallel.buffers import FlatBuffers, decays_matrices
from megalrps.parallel.mesh import alone
from megalrps.training.engine import Engine
from megalrps.training.optimizer import Optimizer
from megalrps.training.options import OptimizerOptions
from megalrps.training.state import TrainState
from megalrps.training.step import Batch, train_step

_LEARNING_RATE = 3e-4
_WARM_UP_STEPS = 2
_MESH = alone(torch.device("cpu"))


class Times(NamedTuple):
    """Seconds, and pages of memory that were touched for the first time."""

    user: float
    system: float
    wall: float
    page_faults: int


Step = Callable[[np.ndarray], float]
"""One update with a batch of tokens [B, S + 1]; returns the loss."""


def our_step(state: TrainState) -> Step:
    """A step of the training loop."""

    def step(tokens: np.ndarray) -> float:
        batch = Batch(tokens, tokens.shape[0] * (tokens.shape[1] - 1))
        return train_step(state, batch, learning_rate=_LEARNING_RATE, mesh=_MESH).loss

    return step


def peer_step(model: nn.Module, options: OptimizerOptions, bf16: bool) -> Step:
    """The same step as a user of transformers and torch writes it."""
    groups = [
        {"params": [p for n, p in model.named_parameters() if decays_matrices(n, p) is flag], "weight_decay": decay}
        for flag, decay in ((True, options.weight_decay), (False, 0.0))
    ]
    betas = (options.adam_beta1, options.adam_beta2)
    optimizer = torch.optim.AdamW(groups, lr=_LEARNING_RATE, betas=betas, eps=options.adam_eps, fused=True)

    def step(tokens: np.ndarray) -> float:
        inputs, labels = torch.from_numpy(tokens[:, :-1]), torch.from_numpy(tokens[:, 1:]).contiguous()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss: Tensor = model(input_ids=inputs, labels=labels, shift_labels=labels, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), options.clip_grad)
        optimizer.step()
        return loss.item()

    return step


def make_steps(shape: ModelConfig, batch_size: int, sequence_length: int, bf16: bool) -> dict[str, Step]:
    """Both contenders, from the same weights."""
    ours = Transformer(shape)
    initialise_(ours, shape, seed=1234)
    exported = to_huggingface(ours.state_dict(), shape, max_position_embeddings=sequence_length)
    settings = transformers.LlamaConfig(**exported.config)
    peer = transformers.LlamaForCausalLM._from_config(settings, attn_implementation="sdpa")
    peer.load_state_dict({name: weight.clone() for name, weight in exported.weights.items()})
    options = OptimizerOptions()
    narrow = torch.bfloat16 if bf16 else None
    buffers = FlatBuffers(ours, compute_dtype=narrow)
    engine = Engine({0: ours}, _MESH, micro_batch_size=batch_size, sequence_length=sequence_length, autocast=narrow)
    return {
        "ours": our_step(TrainState(engine, buffers, Optimizer(buffers, options))),
        "peer": peer_step(peer.train(), options, bf16),
    }


def batches(shape: ModelConfig, batch_size: int, sequence_length: int) -> Iterator[np.ndarray]:
    """Random tokens [B, S + 1], the same at each call."""
    generator = np.random.default_rng(0)
    while True:
        yield generator.integers(0, shape.vocab_size, (batch_size, sequence_length + 1), dtype=np.int64)


def measure(steps: dict[str, Step], data: Iterator[np.ndarray], repetitions: int) -> dict[str, Any]:
    """User, system and wall seconds of each contender by repetition, in turns, and how far their losses part."""
    times: dict[str, list[Times]] = {name: [] for name in steps}
    difference = 0.0
    for repetition in range(-_WARM_UP_STEPS, repetitions):
        tokens, losses = next(data), {}
        for name in list(steps) if repetition % 2 else list(reversed(steps)):
            before = now()
            losses[name] = steps[name](tokens)
            after = now()
            if repetition >= 0:
                times[name].append(Times(*(later - earlier for later, earlier in zip(after, before, strict=True))))
        difference = max(difference, abs(losses["ours"] - losses["peer"]))
    return {"times": times, "largest_loss_difference": difference}


def now() -> Times:
    """The clocks of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return Times(used.ru_utime, used.ru_stime, time.perf_counter(), used.ru_minflt)


def summarise(measured: dict[str, Any], tokens: int, flops: int) -> dict[str, Any]:
    """The figures of one precision."""
    times: dict[str, list[Times]] = measured["times"]
    cpu = {name: [each.user + each.system for each in of] for name, of in times.items()}
    user = {name: statistics.median(each.user for each in of) for name, of in times.items()}
    system = {name: statistics.median(each.system for each in of) for name, of in times.items()}
    medians = {name: statistics.median(of) for name, of in cpu.items()}
    return {
        "median_cpu_seconds": _rounded(medians),
        "median_user_seconds": _rounded(user),
        "median_system_seconds": _rounded(system),
        "median_page_faults": {
            name: round(statistics.median(each.page_faults for each in of)) for name, of in times.items()
        },
        "ratio": round(medians["ours"] / medians["peer"], 3),
        "ratio_of_minima": round(min(cpu["ours"]) / min(cpu["peer"]), 3),
        "ratio_of_user_seconds": round(user["ours"] / user["peer"], 3),
        "tokens_per_cpu_second": {name: round(tokens / value) for name, value in medians.items()},
        "gflop_per_cpu_second": {name: round(tokens * flops / value / 1e9, 1) for name, value in medians.items()},
        "largest_loss_difference_nats": float(f"{measured['largest_loss_difference']:.2g}"),
        "cpu_seconds": {name: [round(value, 4) for value in of] for name, of in cpu.items()},
        "wall_seconds": {name: [round(each.wall, 4) for each in of] for name, of in times.items()},
    }


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in values.items()}


def _load() -> list[float]:
    return [round(value, 2) for value in os.getloadavg()]


def describe(options: argparse.Namespace, shape: ModelConfig) -> dict[str, Any]:
    """What was compared, on what and how."""
    return {
        "compares": {
            "ours": "megalrps train_step: Transformer, flat buffers, adamw_",
            "peer": "transformers LlamaForCausalLM (sdpa), clip_grad_norm_, torch.optim.AdamW(fused=True)",
        },
        "convention": "median CPU seconds of one training step (forward, backward, clip, AdamW), in turns; "
        "ratio = ours / peer, below 1 is faster; FLOPs 6W + 12LSd a token",
        "command": shlex.join(["python", "benchmarks/model_step.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "device": {"kind": "cpu", "processor": processor(), "cores": os.cpu_count(), "threads": options.threads},
        "load_average": {"before": _load()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "shape": {
            "preset": options.preset,
            "layers": shape.num_layers,
            "hidden": shape.hidden_size,
            "heads": shape.num_attention_heads,
            "feed_forward": shape.feed_forward_width,
            "vocabulary": shape.vocab_size,
            "parameters": parameter_count(shape),
            "sequence_length": options.sequence_length,
            "batch_size": options.batch_size,
        },
        "repetitions": options.repetitions,
        "warm_up_steps": _WARM_UP_STEPS,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="a training step beside transformers' LLaMA with torch's fused AdamW")
    parser.add_argument("--preset", default="llama-20m", choices=[n for n, p in PRESETS.items() if p.vocab_size])
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="write the JSON here too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape = PRESETS[options.preset]
    result = describe(options, shape)
    tokens, flops = options.batch_size * options.sequence_length, flops_per_token(shape, options.sequence_length)
    for precision, bf16 in (("fp32", False), ("bf16_autocast", True)):
        steps = make_steps(shape, options.batch_size, options.sequence_length, bf16)
        data = batches(shape, options.batch_size, options.sequence_length)
        result[precision] = summarise(measure(steps, data, options.repetitions), tokens, flops)
        seconds, ratio = result[precision]["median_cpu_seconds"], result[precision]["ratio"]
        print(f"{precision}: ours {seconds['ours']:.3f}, peer {seconds['peer']:.3f} CPU s, ratio {ratio}")
    result["load_average"]["after"] = _load()
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
