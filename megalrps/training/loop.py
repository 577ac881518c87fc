"""The iteration loop: takes the plan's next unfinished segment, restores its parent state, trains it, commits it.

It knows nothing of paradigms. Path switching is: restore the state a segment starts from, train it with
``learning_rate = path.curve(step)``, commit, go on with the next segment.
"""

import math
import threading
import time
from collections.abc import Iterator
from functools import cached_property, partial

import numpy as np
import torch

from megalrps.checkpoint.errors import CorruptCheckpointError
from megalrps.checkpoint.names import path_of
from megalrps.data.stream import SampleSource
from megalrps.errors import InputError, PreemptedError
from megalrps.model.counts import flops_per_token
from megalrps.paths.plan import Segment, Window
from megalrps.training.feed import Draw, Feed, Share, Waits
from megalrps.training.metrics import StepMetrics
from megalrps.training.page_locked import lanes_to
from megalrps.training.run import Run
from megalrps.training.signals import GRACE_SECONDS, SAFE_GRACE_SECONDS
from megalrps.training.stability import Finding, append_event, error_of, event_of, judge, text_of
from megalrps.training.step import Batch, StepResult, train_step
from megalrps.training.throughput import peak_flops


def train(run: Run) -> None:
    """Train every segment of the run's paths that its lineage lacks, in the plan's order."""
    loop = Loop(run)
    with loop.feed:
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
        self._opening = threading.Lock()
        threads = run.job.config.data.num_workers
        self.feed = Feed(self._read, threads=threads, lanes=lanes_to(run.mesh.data.device))
        self._waits = Waits(threads)
        self._update_seconds = 0.0
        self._told_of_grace = False

    def train_segment(self, segment: Segment) -> None:
        """Restore the newest state inside ``segment``, or the one it starts from, and train to its end."""
        self.run.watch.enter("loading", f"of the state that path {segment.path} goes on from")
        self.restore(segment)
        self.feed.follow(self._course(segment, self.state.step))
        self.run.leave_if_asked(f"before step {self.state.step + 1} of path {segment.path}")
        interval = self.run.job.config.checkpoint.save_interval
        while self.state.step < segment.end:
            self.step(segment)
            at_end = self.state.step == segment.end
            if at_end or (interval and self.state.step % interval == 0):
                self.commit(segment, segment.kind if at_end else "periodic", in_background=not at_end)
            self.heed(segment)

    def heed(self, segment: Segment) -> None:
        """Act on what the ranks know together: leave with the state committed, or without where the path is lost."""
        run = self.run
        agreed = run.agree()
        if agreed.fenced:
            run.give_way()
        if agreed.stop is not None:
            run.finish_save()
            if self.state.checkpoint is None:
                self.commit(segment, "periodic")
            raise run.world.told_once(
                PreemptedError(
                    f"stopped by {agreed.stop} after step {self.state.step} of path {segment.path}, saved as "
                    f"{self.state.checkpoint}; the same command goes on from there",
                    agreed.stop,
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
            self.refuse_to_begin_again(segment)
            state.initialise(run.job.model, self.options.seed)
        elif state.checkpoint != candidates[0]:
            self.feed.follow(self._course(segment, run.lineage.records[candidates[0]].step))  # while the state loads
            record = run.load_first(candidates)
            run.log.say(f"restored {state.checkpoint}: {record.path} at step {record.step:,}")
            run.say_differences(record)
        if state.checkpoint == source and segment.start == path.start and not path.carry_optimizer:
            state.optimizer.reset()
        state.path = segment.path
        run.drop_lines_after(segment)

    def refuse_to_begin_again(self, segment: Segment) -> None:
        """Raise CorruptCheckpointError where a path that begins from random weights has checkpoints, all damaged."""
        refused = self.run.lineage.refused
        damaged = sorted(name for name in refused if path_of(name) == segment.path)
        if damaged:
            raise self.run.world.told_once(
                CorruptCheckpointError(
                    f"{refused[damaged[-1]]}. Path {segment.path} has no other checkpoint: to train it again from "
                    f"random weights, move {', '.join(damaged)} out of {self.run.store.directory}"
                )
            )

    def step(self, segment: Segment) -> None:
        """One update: the samples and the learning rate of the next step of the path, then its line of metrics."""
        run, step = self.run, self.state.step + 1
        started, where = time.perf_counter(), f"of step {step} of path {segment.path}"
        run.watch.enter("data", where)
        batch = self.batch(self.plan.window_at(segment.path, step), step)
        waited = time.perf_counter() - started
        result = train_step(
            self.state,
            batch,
            learning_rate=self.plan.path(segment.path).curve(step),
            mesh=run.mesh,
            enter=partial(run.watch.enter, where=where),
        )
        seconds = self._update_seconds = time.perf_counter() - started
        run.watch.enter("metrics", where)
        finding = judge(result, self.state, run.job.config.stability)
        if finding is not None:
            self.tell(segment, step, result, finding)
        self.state.step = step
        self.state.train_seconds += seconds
        metrics = self.metrics(segment, step, result, seconds, waited)
        if run.metrics is not None and run.publisher is not None and run.publisher.leases.are_held():
            run.metrics.write(metrics)  # the file may be another launch's by now: this one may have slept
        run.log.step(metrics, segment.end)
        slow = self._waits.note(waited, seconds)
        if slow is not None:
            run.log.say(slow)

    def tell(self, segment: Segment, step: int, result: StepResult, finding: Finding) -> None:
        """Say what was noticed of an update, and which samples it drew; end the run where that is the policy.

        On every rank and without asking the others: they have noticed the same.
        """
        run = self.run
        samples = self.drawn(self.plan.window_at(segment.path, step), step)
        text = text_of(finding, segment.path, step, result, samples, run.job.config.stability)
        if run.world.is_first:
            append_event(run.directory.events, event_of(finding, segment.path, step, result, samples))
        if finding.action == "stop":
            raise run.world.told_once(error_of(finding, text))
        run.log.say(text)

    def drawn(self, window: Window, step: int) -> dict[str, list[int]]:
        """The global batch of update ``step``: by increment, the indices in it of the samples that lie there."""
        size, stream = self.options.global_batch_size, self._stream(window)
        first = (step - 1 - window.start) * size
        ordinals, places = stream.locate(np.arange(first, first + size, dtype=np.int64))
        names = [increment.manifest.name for increment in stream.increments]
        found = {name: places[ordinals == ordinal].tolist() for ordinal, name in enumerate(names)}
        return {name: each for name, each in found.items() if each}

    def batch(self, window: Window, step: int) -> Batch:
        """This rank's samples of update ``step``: a contiguous share of the global batch, whatever the layout."""
        share = self.feed.take(self._draw(window, step))
        labels = self.options.global_batch_size * self.run.job.config.data.seq_length
        counted = labels if share.counted_BS is None else None
        return Batch(share.tokens, counted, share.starts_BS, share.counted_BS)

    def _draw(self, window: Window, step: int) -> Draw:
        size, data = self.options.global_batch_size, self.run.mesh.data
        share = size // data.size
        return Draw(window, (step - 1 - window.start) * size + data.rank * share, share)

    def _course(self, segment: Segment, step: int) -> Iterator[Draw]:
        """What will be drawn after ``step`` of ``segment``, and then, by what is known now, in the segments after it.

        One of those that was begun before goes on elsewhere than at its start, and says so when it is restored.
        """
        segments = self.plan.segments
        for each in segments[segments.index(segment) :]:
            if each == segment or (each.path in self.run.paths and self.run.finished(each) is None):
                first = step if each == segment else each.start
                for update in range(first + 1, each.end + 1):
                    yield self._draw(self.plan.window_at(each.path, update), update)

    def _read(self, draw: Draw) -> Share:
        """Of any thread, on several at once."""
        drawn = self._stream(draw.window).batch(draw.indices())
        return Share(drawn.tokens_BS, drawn.starts_BS, drawn.counted_BS)

    def _stream(self, window: Window) -> SampleSource:
        with self._opening:
            return self.run.job.stream(window)

    def metrics(self, segment: Segment, step: int, result: StepResult, seconds: float, waited: float) -> StepMetrics:
        """The line of metrics of update ``step``, which took ``seconds``, ``waited`` of them for its data."""
        samples, skipped = self.options.global_batch_size, result.skipped or not result.is_finite
        tokens = samples * self.run.job.config.data.seq_length
        return StepMetrics(
            path=segment.path,
            version=segment.version,
            step=step,
            loss=result.loss if math.isfinite(result.loss) else None,
            lr=self.plan.path(segment.path).curve(step),
            grad_norm=None if skipped else result.gradient_norm,
            tokens=step * tokens,
            samples=step * samples,
            seconds=seconds,
            tokens_per_second=tokens / seconds,
            mfu=tokens * self._flops_per_token / seconds / self._peak if self._peak else None,
            loss_scale=result.loss_scale,
            skipped=skipped,
            data_seconds=waited,
        )

    def commit(self, segment: Segment, kind: str, *, in_background: bool = False) -> None:
        """Save the live state as a checkpoint of ``kind``.

        One that ends a segment is there before what starts from it makes an update: never ``in_background``.
        """
        started = time.perf_counter()
        self.run.commit(segment, kind, in_background=in_background)
        if not in_background:
            self._tell_of_grace(time.perf_counter() - started)
        if kind != "periodic":
            name = f"released {segment.version}" if kind == "release" else f"{kind} point"
            self.run.log.say(f"{name}: {self.state.checkpoint}")

    def _tell_of_grace(self, save_seconds: float) -> None:
        """Say once that a run like this one cannot be asked to stop in the time that torchrun gives it."""
        if self._told_of_grace or self._update_seconds + save_seconds <= SAFE_GRACE_SECONDS:
            return
        self._told_of_grace = True
        self.run.log.say(
            f"an update took {self._update_seconds:.0f} s and a save {save_seconds:.0f} s: torchrun kills its ranks "
            f"{GRACE_SECONDS} s after a SIGTERM, and a run that is asked to stop would lose what it trained since its "
            "last checkpoint. Set TORCH_ELASTIC_SHUTDOWN_TIMEOUT (torch 2.12 or newer), or send SIGUSR1 to a rank"
        )

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
