"""A run directory as a real run leaves it, made from a real plan and invented figures; nothing is trained."""

import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from megalrps.evaluation.summary import Release, Summary, write_summary
from megalrps.files import write_json
from megalrps.paths.cost import cost_steps
from megalrps.paths.options import PlanOptions
from megalrps.paths.paradigms import build_plan
from megalrps.paths.plan import Increment, Plan, Segment

TOKENS_PER_STEP = 8 * 256
INCREMENTS = (Increment("language", 100), Increment("library", 80), Increment("tests", 120))


@dataclass(frozen=True)
class Invented:
    """What to invent: ``stop_after`` steps leaves the run unfinished, without a summary."""

    options: PlanOptions = field(default_factory=lambda: PlanOptions(lr=3e-3, min_lr=3e-4, lr_warmup_iters=10))
    increments: tuple[Increment, ...] = INCREMENTS
    noise: float = 0.06
    stop_after: int | None = None
    device: str | None = "cpu"
    parameters: int | None = 3_283_200


def make_run(directory: Path, paradigm: str = "lrps", invented: Invented | None = None) -> Plan:
    """Write a run of ``paradigm`` into ``directory``; returns its plan."""
    invented = invented or Invented()
    options = replace(invented.options, paradigm=paradigm)
    plan = build_plan(invented.increments, options)
    directory.mkdir(parents=True)
    write_json(directory / "plan.json", plan.to_json())
    flags = {"paradigm": paradigm, "alpha": list(options.alpha), "lr-decay-style": options.lr_decay_style}
    (directory / "config.yaml").write_text(yaml.safe_dump({"plan": flags}))
    lines = list(metric_lines(plan, invented.noise))[: invented.stop_after]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if invented.stop_after is None:
        write_summary(directory / "summary.json", invented_summary(plan, directory, invented))
    return plan


def metric_lines(plan: Plan, noise: float) -> Iterator[dict[str, Any]]:
    """A line for each update in order of execution; the loss falls with the steps and with the learning rate."""
    generator = random.Random(plan.fingerprint)
    for segment in plan.segments:
        for step in range(segment.start + 1, segment.end + 1):
            yield _line(plan, segment, step, generator.gauss(0.0, noise))


def _line(plan: Plan, segment: Segment, step: int, noise: float) -> dict[str, Any]:
    curve = plan.path(segment.path).curve
    seconds = 0.11 + 0.001 * (step % 7)
    return {
        "path": segment.path,
        "version": segment.version,
        "step": step,
        "loss": invented_loss(step, curve(step) / 3e-3) + noise,
        "lr": curve(step),
        "grad_norm": 1.0 + noise,
        "tokens": step * TOKENS_PER_STEP,
        "samples": step * 8,
        "seconds": seconds,
        "tokens_per_second": TOKENS_PER_STEP / seconds,
        "mfu": None,
    }


def invented_loss(step: int, relative_lr: float) -> float:
    """Falls as a power of the steps, and by a little more where the learning rate has decayed."""
    return 2.6 + 6.2 * (1 + step / 6) ** -0.62 + 0.35 * relative_lr * min(1.0, step / 40)


def invented_summary(plan: Plan, directory: Path, invented: Invented) -> Summary:
    """Perplexities that fall with the steps, and are worse on increments not seen and, under cpt, on older ones."""
    releases = [_release(plan, index, invented.increments) for index in range(len(plan.releases))]
    return Summary(
        paradigm=plan.paradigm,
        releases=tuple(releases),
        cost_steps=cost_steps(plan),
        wall_seconds=0.118 * cost_steps(plan) + 4.2,
        report=str(directory / "report.html"),
        device=invented.device,
        parameters=invented.parameters,
    )


def _release(plan: Plan, index: int, increments: Sequence[Increment]) -> Release:
    path = plan.releases[index]
    forgetting = 0.12 if plan.paradigm == "cpt" else 0.02
    nats = {
        increment.name: invented_loss(path.end, 0.1)
        + 0.05 * place
        + (0.3 if place > index else forgetting * (index - place))
        for place, increment in enumerate(increments)
    }
    assert path.release
    return Release(
        name=path.release,
        path=path.name,
        step=path.end,
        tokens=path.end * TOKENS_PER_STEP,
        checkpoint=f"checkpoints/{path.name}-{path.end}",
        perplexity={name: math.exp(loss) for name, loss in nats.items()},
        bits_per_byte={name: loss / math.log(2) / 3.1 for name, loss in nats.items()},
    )
