"""How far layouts part from one process in fp32 and bf16, where the rounding of sums shows.

    OMP_NUM_THREADS=1 python benchmarks/layout_precision.py --output benchmarks/results/layout_precision.json

In float64 every layout makes one process's updates within 1e-12 (tests/parallel/test_layouts_equal.py): the same
arithmetic. In narrower types sums in another order round otherwise, and AdamW, which divides by gradients, makes that
larger. Each layout trains the same small LLaMA from the same weights on the same batches as one process; a figure is
the largest difference of any update's loss, and of any parameter after the last, relative to the largest element of its
tensor. ``bf16`` beside one process in fp32 shows what the type itself costs.
"""

import argparse
import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import processor
from parallel_contenders import Contender, Work, contenders, start_ours
from rank_processes import on_ranks

from megalrps.model.config import ModelConfig
from megalrps.parallel.options import ParallelOptions

_SMALL = ModelConfig(num_layers=4, hidden_size=64, num_attention_heads=4, ffn_hidden_size=172, vocab_size=512)
Whole = dict[str, np.ndarray]


def trained(rank: int, contender: Contender, work: Work, updates: int) -> tuple[list[float], list[Any]]:
    """The losses, and what this rank holds of every parameter: name, global shape, offset, piece."""
    state, step, _ = start_ours(contender, work, torch.device("cpu"))
    losses = [step(work.batch(update)) for update in range(updates)]
    state.buffers.wait_parameters()
    held = []
    for name, tensor in state.buffers.named_masters():
        chunks = tensor.chunks() if hasattr(tensor, "__create_chunk_list__") else [((0,) * tensor.dim(), tensor)]
        held += [(name, tuple(tensor.shape), offset, piece.detach().numpy().copy()) for offset, piece in chunks]
    return losses, held


def together(by_rank: Sequence[tuple[list[float], list[Any]]]) -> tuple[list[float], Whole]:
    """The losses, and the whole parameters from the pieces of all ranks."""
    whole: Whole = {}
    for name, shape, offset, piece in (part for _, held in by_rank for part in held):
        box = tuple(slice(start, start + size) for start, size in zip(offset, piece.shape, strict=True))
        whole.setdefault(name, np.full(shape, np.nan, dtype=piece.dtype))[box] = piece
    assert not any(np.isnan(value).any() for value in whole.values())
    return by_rank[0][0], whole


def apart(found: tuple[list[float], Whole], expected: tuple[list[float], Whole]) -> dict[str, float]:
    """The two figures of the module's text."""
    losses = max(abs(one - other) for one, other in zip(found[0], expected[0], strict=True))
    parameters = max(
        float(np.abs(found[1][name] - value).max() / np.abs(value).max()) for name, value in expected[1].items()
    )
    return {"loss_nats": float(f"{losses:.2g}"), "parameter": float(f"{parameters:.2g}")}


def layouts() -> list[Contender]:
    """Ours of benchmarks/parallel.py, and a product of all dimensions but context."""
    ours = [each for group in contenders(1).values() for each in group if each.kind == "ours" and each.ranks > 1]
    product = ParallelOptions(
        tensor_model_parallel_size=2, sequence_parallel=True, pipeline_model_parallel_size=2, pipeline_schedule="zbv"
    )
    return [*ours, Contender("tp2 sp pp2 zbv dp2", 8, parallel=product, micro_batch=1)]


def main() -> None:
    parser = argparse.ArgumentParser(description="how far layouts part from one process in fp32 and bf16")
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--output", type=Path, help="write the JSON here too")
    options = parser.parse_args()
    alone, rows, exact = Contender("1x1x1", 1), {}, None
    for precision in ("fp32", "bf16"):
        work = Work(_SMALL, sequence_length=64, batch_size=8, bf16=precision == "bf16")
        expected = together(on_ranks(1, trained, alone, work, options.updates))
        exact = exact or expected
        found = {} if precision == "fp32" else {"1x1x1 beside fp32": apart(expected, exact)}
        for each in layouts():
            found[each.name] = apart(together(on_ranks(each.ranks, trained, each, work, options.updates)), expected)
        rows[precision] = found
        for name, row in found.items():
            print(f"{precision} {name:24} loss {row['loss_nats']:.1e} nats, parameters {row['parameter']:.1e}")
    result = {
        "convention": "largest difference from one process in the same precision over all updates (loss) and after the "
        "last (parameters, relative to the largest element of the tensor)",
        "command": shlex.join(["python", "benchmarks/layout_precision.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "device": {"kind": "cpu", "processor": processor(), "cores": os.cpu_count()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "updates": options.updates,
        "shape": {"layers": 4, "hidden": 64, "heads": 4, "vocabulary": 512, "sequence_length": 64, "batch_size": 8},
        "apart": rows,
    }
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
