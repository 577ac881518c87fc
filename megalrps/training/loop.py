"""The iteration loop: takes the plan's next unfinished segment, restores its parent state, trains it, commits it.

It knows nothing of paradigms. Path switching is: restore the state a segment starts from, train it with
``learning_rate = path.curve(step)``, commit, go on with the next segment.
"""

import time
from functools import cached_property

import numpy as np
import torch

from megalrps.checkpoint.names import path_of
from megalrps.data.stream import SampleStream
from megalrps.errors import DivergedError, InputError, PreemptedError
from megalrps.model.counts import flops_per_token
from megalrps.paths.plan import Segment, Window
from megalrps.training.metrics import StepMetrics
from megalrps.training.run import Run
from megalrps.training.step import Batch, StepResult, train_step
from megalrps.training.throughput import peak_flops


class NonFiniteError(DivergedError):
    """A loss or gradient norm that is no number: training stopped, and nothing of that step was committed."""


def train(run: Run) -> None:
    """Train every segment of the run's paths that its lineage lacks, in the plan's order."""
    loop = Loop(run)
    for segment in run.job.plan.segments:
        if segment.path not in run.paths:
            continue
        run.refresh()
        if run.finished(segment) is None:
            loop.train_segment(segment)


class Loop:
    """Executes segments in one run; holds what all its steps share."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.options = run.job.config.training
        self.plan = run.job.plan
        self.state = run.state
        self._streams: dict[tuple[str, ...], SampleStream] = {}

    def train_segment(self, segment: Segment) -> None:
        """Restore the newest state inside ``segment``, or the one it starts from, and train to its end."""
        self.restore(segment)
        interval = self.run.job.config.checkpoint.save_interval
        while self.state.step < segment.end:
            self.step(segment)
            at_end = self.state.step == segment.end
            if at_end or (interval and self.state.step % interval == 0):
                self.commit(segment, segment.kind if at_end else "periodic")
            self.heed(segment)

    def heed(self, segment: Segment) -> None:
        """Act on what the ranks know together: leave with the state committed, or without where the path is lost."""
        run = self.run
        agreed = run.agree()
        if agreed.fenced:
            run.give_way()
        if agreed.stop is not None:
            if self.state.checkpoint is None:
                self.commit(segment, "periodic")
            raise run.world.told_once(
                PreemptedError(
                    f"stopped by {agreed.stop} after step {self.state.step} of path {segment.path}, saved as "
                    f"{self.state.checkpoint}; the same command goes on from there"
                )
            )

    def restore(self, segment: Segment) -> None:
        """Bring the live state to where ``segment`` goes on from; a state that is already there is left as it is."""
        run, state, path = self.run, self.state, self.plan.path(segment.path)
        source = run.source(segment)
        fingerprint = self.plan.segment_fingerprint(segment)
        candidates = list(run.lineage.resumable(segment.path, fingerprint, segment.start, segment.end))
        candidates += [source] if source is not None else []
        if source is not None and source not in run.lineage.records:
            raise run.world.told_once(
                InputError(
                    f"path {segment.path} starts from {source}, which is not there yet: train path {path_of(source)} "
                    "first (--paths), or wait for the launch that does"
                )
            )
        if not candidates:
            state.initialise(run.job.model, self.options.seed)
        elif state.checkpoint != candidates[0]:
            record = run.load_first(candidates)
            run.log.say(f"restored {state.checkpoint}: {record.path} at step {record.step:,}")
        if state.checkpoint == source and segment.start == path.start and not path.carry_optimizer:
            state.optimizer.reset()
        state.path = segment.path
        run.drop_lines_after(segment)

    def step(self, segment: Segment) -> None:
        """One update: the samples and the learning rate of the next step of the path, then its line of metrics."""
        run, step = self.run, self.state.step + 1
        started = time.perf_counter()
        result = train_step(
            self.state,
            self.batch(self.plan.window_at(segment.path, step), step),
            learning_rate=self.plan.path(segment.path).curve(step),
            mesh=run.mesh,
        )
        seconds = time.perf_counter() - started
        if not result.is_finite:
            # on every rank and without asking the others: a rank that alone saw it must not wait for them
            raise run.world.told_once(
                NonFiniteError(
                    f"path {segment.path}, step {step}: loss {result.loss}, gradient norm {result.gradient_norm}; "
                    "nothing of this step was saved. Train with a lower --lr or longer warm-up, in a new --save"
                )
            )
        self.state.step = step
        self.state.train_seconds += seconds
        metrics = self.metrics(segment, step, result, seconds)
        if run.metrics is not None:
            run.metrics.write(metrics)
        run.log.step(metrics, segment.end)

    def batch(self, window: Window, step: int) -> Batch:
        """This rank's samples of update ``step``: a contiguous share of the global batch, whatever the layout."""
        size, data = self.options.global_batch_size, self.run.mesh.data
        if window.increments not in self._streams:
            self._streams[window.increments] = self.run.job.stream(window.increments)
        share = size // data.size
        first = (step - 1 - window.start) * size + data.rank * share
        samples = self._streams[window.increments].samples(np.arange(first, first + share, dtype=np.int64))
        return Batch(samples, size * self.run.job.config.data.seq_length)

    def metrics(self, segment: Segment, step: int, result: StepResult, seconds: float) -> StepMetrics:
        """The line of metrics of update ``step``."""
        samples = self.options.global_batch_size
        tokens = samples * self.run.job.config.data.seq_length
        return StepMetrics(
            path=segment.path,
            version=segment.version,
            step=step,
            loss=result.loss,
            lr=self.plan.path(segment.path).curve(step),
            grad_norm=None if result.skipped else result.gradient_norm,
            tokens=step * tokens,
            samples=step * samples,
            seconds=seconds,
            tokens_per_second=tokens / seconds,
            mfu=tokens * self._flops_per_token / seconds / self._peak if self._peak else None,
            loss_scale=result.loss_scale,
        )

    def commit(self, segment: Segment, kind: str) -> None:
        """Save the live state as a checkpoint of ``kind``."""
        self.run.commit(segment, kind)
        if kind != "periodic":
            name = f"released {segment.version}" if kind == "release" else f"{kind} point"
            self.run.log.say(f"{name}: {self.state.checkpoint}")

    @cached_property
    def _flops_per_token(self) -> int:
        return flops_per_token(self.run.job.model, self.run.job.config.data.seq_length)

    @cached_property
    def _peak(self) -> float | None:
        """FLOP/s of all ranks together; None where the device's peak is not known."""
        device = self.run.world.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        peak = peak_flops(name, self.options.bf16)
        return peak * self.run.world.size if peak else None
