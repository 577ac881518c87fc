"""What a person sees while it trains: a line a step, a progress bar on a terminal, TensorBoard when asked for."""

from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megalrps.errors import InputError
from megalrps.training.metrics import StepMetrics
from megalrps.training.options import LoggingOptions


def step_line(metrics: StepMetrics, last_step: int) -> str:
    """The log line of one update; ``last_step`` is where its segment ends."""
    width = len(str(last_step))
    where = metrics.path if metrics.path == metrics.version else f"{metrics.path} -> {metrics.version}"
    parts = [
        f"{where:>10}",
        f"step {metrics.step:>{width}}/{last_step}",
        f"loss {metrics.loss:.4f}" if metrics.loss is not None else "loss is no number",
        f"grad norm {metrics.grad_norm:.3f}" if metrics.grad_norm is not None else _why_skipped(metrics),
        f"lr {metrics.lr:.3e}",
        f"{metrics.tokens_per_second:,.0f} tokens/s",
    ]
    if metrics.mfu is not None:
        parts.append(f"MFU {metrics.mfu:.1%}")
    return " | ".join(parts)


def _why_skipped(metrics: StepMetrics) -> str:
    overflow = metrics.loss_scale is not None and metrics.loss is not None
    return "skipped: gradients overflowed" if overflow else "skipped: no numbers to update with"


def announce(text: str) -> None:
    """Print ``text`` before there is a :class:`Log`."""
    Console(highlight=False, soft_wrap=True, markup=False).print(text)


class Log:
    """The log of one launch. Every rank holds one; only the first rank's speaks.

    total_steps: updates of the whole plan; done_steps: those finished by earlier launches.
    """

    def __init__(self, options: LoggingOptions, *, speaks: bool, total_steps: int, done_steps: int) -> None:
        self._options = options
        self._speaks = speaks
        # Log lines are for grep: never wrapped at the width of a pipe, never coloured by what a number looks like.
        self._console = Console(highlight=False, soft_wrap=True, markup=False, quiet=not speaks)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not (speaks and self._console.is_terminal),
            transient=True,
        )
        self._task = self._progress.add_task("training", total=total_steps, completed=done_steps)
        self._scalars = _summary_writer(options.tensorboard_dir) if speaks and options.tensorboard_dir else None

    def say(self, text: str) -> None:
        """Print ``text`` as it is."""
        self._console.print(text)

    def step(self, metrics: StepMetrics, last_step: int) -> None:
        """Show one update; a line every ``--log-interval`` steps and at the end of a segment."""
        self._progress.update(self._task, advance=1, description=f"{metrics.path} -> {metrics.version}")
        if metrics.step % self._options.log_interval == 0 or metrics.step == last_step:
            self.say(step_line(metrics, last_step))
        if self._scalars is not None:
            for name in ("loss", "lr", "grad_norm", "tokens_per_second", "loss_scale"):
                if getattr(metrics, name) is not None:
                    self._scalars.add_scalar(f"{metrics.path}/{name}", getattr(metrics, name), metrics.step)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        if self._scalars is not None:
            self._scalars.close()


def _summary_writer(directory: str) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError(
            "--tensorboard-dir needs the package tensorboard: pip install 'megalrps[tracking]', or leave it out"
        ) from error
    try:
        return SummaryWriter(directory)
    except OSError as error:
        raise InputError(
            f"--tensorboard-dir {directory} cannot be written ({error.strerror}): name a directory that can"
        ) from error
