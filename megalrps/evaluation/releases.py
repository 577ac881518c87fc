"""Every release on every increment's held-out part, once; and the summary and the report of a run that has finished."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megalrps.data.increment import OpenIncrement
from megalrps.errors import InputError
from megalrps.evaluation.perplexity import HeldOutLoss, evaluate
from megalrps.evaluation.summary import Release, Summary, write_summary
from megalrps.files import write_json
from megalrps.model.counts import parameter_count
from megalrps.paths.cost import cost_steps
from megalrps.training.engine import Engine
from megalrps.training.run import Run


def evaluate_releases(run: Run) -> None:
    """Measure what is not yet measured: the loss of each release on the held-out part of each increment.

    Collective. Results lie in ``evaluations/CHECKPOINT.json``, one file a release; a part whose content changed is
    measured again, and so is a release on a part that a later increment brought.
    """
    run.refresh()
    for name in run.lineage.releases():
        known = run.world.decided(partial(_read, run, name))
        missing = [place for place in range(len(run.job.held_out)) if _key(run, place) not in known]
        if not missing:
            continue
        model = run.state.engine
        run.store.load(name, run.state.weights())
        run.state.filled()
        run.state.checkpoint = None  # the weights are the release's now, the moments are not
        for place in missing:
            where = f"of {name} on {run.job.increments[place].manifest.name}"
            run.leave_if_asked(f"before the evaluation {where}")
            run.watch.enter("evaluation", where)
            loss = _measure(run, model, run.job.held_out[place])
            known[_key(run, place)] = loss.to_json()
            version, increment = run.lineage.records[name].version, run.job.increments[place].manifest.name
            run.log.say(
                f"{version} on {increment}: perplexity {loss.perplexity:.3f}, {loss.bits_per_byte:.4f} bits per byte"
            )
            if run.world.is_first:
                write_json(_file(run, name), known)


def finish_run(run: Run) -> None:
    """Write ``summary.json`` and the report; a finished run that is started again leaves the summary as it is.

    Where other launches still train other paths, it only says what is not trained yet.
    """
    from megalrps.evaluation.report import write_report  # it loads matplotlib: on one rank, at the end
    from megalrps.evaluation.run_files import read_run

    run.watch.enter("summary and report")
    lineage, job = run.lineage, run.job
    missing = {segment.path: None for segment in job.plan.segments if run.finished(segment) is None}
    if missing:
        run.log.say(f"no summary yet: {', '.join(missing)} are not trained to their ends")
        return
    releases = []
    for name in lineage.releases():
        record, known = lineage.records[name], _read(run, name)
        held_out = {
            increment.manifest.name: HeldOutLoss(**known[_key(run, place)])
            for place, increment in enumerate(job.increments[: len(job.held_out)])
        }
        checkpoint = str(run.directory.checkpoints / name)
        releases.append(Release.measured(record.version, record.path, record.step, record.tokens, checkpoint, held_out))
    summary = Summary(
        paradigm=job.plan.paradigm,
        releases=tuple(releases),
        cost_steps=cost_steps(job.plan),
        wall_seconds=round(_train_seconds(run), 3),
        report=str(run.directory.report),
        device=_device_name(run.world.device),
        parameters=parameter_count(job.model),
    )
    write_summary(run.directory.summary, summary)
    run.log.say(f"summary {run.directory.summary}")
    try:
        report = write_report(read_run(run.directory.root), run.directory.report)
    except InputError as error:  # a file that only the report reads was lost; what was trained and measured is whole
        run.log.say(f"no report: {error}")
    else:
        run.log.say(f"report {report.page}")


def _measure(run: Run, model: Engine, held_out: OpenIncrement) -> HeldOutLoss:
    return evaluate(
        model,
        held_out,
        sequence_length=run.job.config.data.seq_length,
        micro_batch_size=run.job.micro_batch_size,
        world=run.mesh.data,
        documents=run.job.config.data.knows_documents,
    )


def _file(run: Run, name: str) -> Path:
    return run.directory.evaluations / f"{name}.json"


def _read(run: Run, name: str) -> dict[str, Any]:
    """What is measured of the checkpoint ``name``, by :func:`_key`."""
    file = _file(run, name)
    return dict(json.loads(file.read_text())) if file.exists() else {}


def _key(run: Run, place: int) -> str:
    """What a measurement depends on besides the weights: the increment, and the content of its held-out part."""
    return f"{run.job.increments[place].manifest.name} {run.job.held_out[place].manifest.fingerprint}"


def _train_seconds(run: Run) -> float:
    """Seconds of training in all segments together: what each segment's end adds to the checkpoint it began from."""
    records = run.lineage.records
    return sum(
        record.train_seconds - (records[record.parent].train_seconds if record.parent else 0.0)
        for record in records.values()
        if record.permanent
    )


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
