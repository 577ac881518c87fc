"""Numbers that are none, and losses that leap: what is noticed, and what is done about it.

Every rank decides alike and alone: what it decides by, loss and gradient norm, is the same bits on all of them
(:func:`megalrps.training.step.forward_backward`), and so is the rest, which checkpoints keep.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megalrps.errors import DivergedError
from megalrps.files import locked, sync_directory, write_all
from megalrps.training.options import StabilityOptions
from megalrps.training.state import TrainState
from megalrps.training.step import StepResult

_TOLD = 4
"""Samples of an increment that a line of the log names; events.jsonl has all of them."""

Samples = Mapping[str, Sequence[int]]
"""By increment: the samples of one global batch that lie in it, by their index there, in the order of the batch."""


class NonFiniteError(DivergedError):
    """A loss or gradient norm that is no number: training stopped, and nothing of that step was committed."""


class LossSpikeError(DivergedError):
    """A loss far above those before it: training stopped, and nothing of that step was committed."""


@dataclass(frozen=True)
class Finding:
    """What was noticed of one step, and what the options say to do: log and go on, leave the update out, or stop.

    Of a spike, ``mean`` and ``deviation`` are those of the losses before it. ``in_a_row``: updates left out, this one
    included.
    """

    event: Literal["non_finite", "loss_spike"]
    action: Literal["log", "skip", "stop"]
    mean: float | None = None
    deviation: float | None = None
    in_a_row: int = 0


def judge(result: StepResult, state: TrainState, options: StabilityOptions) -> Finding | None:
    """Take note of a step in ``state``, as the next one's judgement needs it; what is wrong with the step, if anything.

    A step that fp16's loss scale leaves out counts as left out, and is nothing wrong.
    """
    if not result.is_finite:
        state.skipped += 1
        state.skipped_in_a_row += 1
        stops = options.on_non_finite == "stop" or state.skipped_in_a_row > options.max_skipped_steps
        return Finding("non_finite", "stop" if stops else "skip", in_a_row=state.skipped_in_a_row)
    state.skipped += result.skipped
    state.skipped_in_a_row *= result.skipped  # an update ends the row
    spread = None if options.on_loss_spike == "ignore" else spread_of(state.recent_losses, options.loss_spike_window)
    if spread is not None and result.loss > spread[0] + options.loss_spike_sigma * spread[1]:
        return Finding("loss_spike", "stop" if options.on_loss_spike == "stop" else "log", *spread)
    state.recent_losses = [*state.recent_losses, result.loss][-options.loss_spike_window :]
    return None


def spread_of(losses: Sequence[float], window: int) -> tuple[float, float] | None:
    """Mean and standard deviation of the last ``window`` losses, in fp64; None where there are fewer.

    Every sum is the exact one, rounded once: no order of additions matters.
    """
    if len(losses) < window:
        return None
    last = losses[-window:]
    mean = math.fsum(last) / window
    return mean, math.sqrt(math.fsum((loss - mean) ** 2 for loss in last) / (window - 1))


def event_of(finding: Finding, path: str, step: int, result: StepResult, samples: Samples) -> dict[str, Any]:
    """The line of events.jsonl. A figure that is no number is null: JSON has no other word for it."""
    return {
        "event": finding.event,
        "action": finding.action,
        "path": path,
        "step": step,
        "loss": _number(result.loss),
        "grad_norm": _number(result.gradient_norm),
        "mean": finding.mean,
        "std": finding.deviation,
        "samples": {name: list(each) for name, each in samples.items()},
    }


def text_of(
    finding: Finding, path: str, step: int, result: StepResult, samples: Samples, options: StabilityOptions
) -> str:
    """The line for people: a log's, or the error's that ends the run."""
    figures = f"path {path}, step {step}: loss {result.loss}, gradient norm {result.gradient_norm}"
    drew = f"its samples {_some(samples)} (all of them in events.jsonl)"
    if finding.event == "loss_spike":
        assert finding.mean is not None and finding.deviation is not None
        figures += (
            f"; a spike: the {options.loss_spike_window} losses before it are {finding.mean:.4f} +- "
            f"{finding.deviation:.4f}, and --loss-spike-sigma is {options.loss_spike_sigma:g}"
        )
        mend = "look at the samples, then train with a lower --lr, in a new --save, or with --on-loss-spike log"
    else:
        mend = "train with a lower --lr or longer warm-up, in a new --save, or look at the samples"
    if finding.action == "log":
        return f"{figures}; {drew}"
    if finding.action == "skip":
        return f"{figures}; the update was left out, {finding.in_a_row} in a row; {drew}"
    if finding.in_a_row > 1:
        figures += f"; more than --max-skipped-steps {options.max_skipped_steps} in a row"
    return f"{figures}; nothing of this step was saved; {drew}; {mend}"


def error_of(finding: Finding, text: str) -> DivergedError:
    """What ends the run."""
    return (LossSpikeError if finding.event == "loss_spike" else NonFiniteError)(text)


def append_event(path: Path, event: Mapping[str, Any]) -> None:
    """Append one line to events.jsonl, durably. Launches that write at the same time do not mix their lines."""
    line = json.dumps(event, allow_nan=False).encode() + b"\n"
    with locked(path.with_name(f".{path.name}.lock")):
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":  # a kill has cut the last line short
                line = b"\n" + line
            write_all(descriptor, line)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        sync_directory(path.parent)


def _some(samples: Samples) -> str:
    told = []
    for name, each in samples.items():
        more = f" and {len(each) - _TOLD} more" if len(each) > _TOLD else ""
        told.append(f"{name}: {', '.join(map(str, each[:_TOLD]))}{more}")
    return "; ".join(told)


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
