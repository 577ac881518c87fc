"""A run with --async-save under watch: what was done in which order, and a writer that is held up or fails."""

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
from tiny_job import ALONE, opened

from megalrps.checkpoint.publication import Publisher
from megalrps.checkpoint.storage import CheckpointWriter
from megalrps.parallel.world import World
from megalrps.training import loop
from megalrps.training.run import Run
from megalrps.training.signals import StopRequest

SECONDS = 30.0
"""After which what a test waits for counts as never coming."""


@dataclass
class Course:
    """A run that is trained under watch: what was done in which order, and a writer that can be held up or fail.

    The writer of ``holds`` (a checkpoint's name) waits until ``until`` updates are made, or until it is let go; then it
    raises ``error``, if there is one. Update ``ended_by`` lasts until the save in flight is over on this rank;
    ``after`` is called with the number of every update.
    """

    holds: str = ""
    until: int = 1 << 30
    error: OSError | None = None
    after: Callable[[int], None] = lambda update: None
    events: list[str] = field(default_factory=list)
    ended_by: int = 0

    def __post_init__(self) -> None:
        self.reached, self.let_go = threading.Event(), threading.Event()
        self._updates = itertools.count(1)
        self.run: Run | None = None

    def update(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """In the place of train_step."""
        result = original(*args, **kwargs)
        update = next(self._updates)
        self.events.append(f"update {update}")
        if self.holds and update == int(self.holds[-2:]) + 1:
            assert self.reached.wait(SECONDS), "the save of the update before is under way"
        self.after(update)
        if update >= self.until:
            self.let_go.set()
        while update == self.ended_by and not self.saves_ended:
            time.sleep(0.001)
        return result

    @property
    def saves_ended(self) -> bool:
        """Whether the save in flight is over, which nobody has acted on."""
        assert self.run is not None and self.run.background is not None
        return self.run.background.saves.ended

    def write(self, original: Callable[..., Any], writer: CheckpointWriter, *args: Any) -> Any:
        """In the place of CheckpointWriter._write_shard."""
        if writer._name != self.holds:
            return original(writer, *args)
        assert threading.current_thread() is not threading.main_thread()
        self.reached.set()
        assert self.let_go.wait(SECONDS)
        if self.error is not None:
            raise self.error
        return original(writer, *args)

    def publish(self, original: Callable[..., Any], publisher: Publisher, name: str, record: Any) -> Any:
        """In the place of Publisher.publish."""
        publish = original(publisher, name, record)

        def noted(rename: Callable[[], None], digest: str) -> None:
            publish(rename, digest)
            self.events.append(f"saved {name}")

        return noted

    @contextmanager
    def watched(self) -> Iterator["Course"]:
        """Put all that in place."""
        places = ((loop, "train_step", self.update), (CheckpointWriter, "_write_shard", self.write))
        with ExitStack() as stack:
            for owner, name, instead in (*places, (Publisher, "publish", self.publish)):
                bound = partial(instead, getattr(owner, name))
                # a plain function, so that a method gets its self
                stack.enter_context(mock.patch.object(owner, name, lambda *a, bound=bound, **k: bound(*a, **k)))
            yield self


def train(arguments: list[str], course: Course, *, world: World = ALONE, stop: StopRequest | None = None) -> Run:
    """Open the run and train it under ``course``."""
    with course.watched(), opened(arguments, world) as run:
        course.run, run.stop = run, stop or run.stop
        try:
            loop.train(run)
        finally:
            course.events.append("left")
        return run


class Counted:
    """What one thread does while a block runs: calls that reach the disk or other ranks, and copies of tensors."""

    DISK = ("open", "write", "fsync", "mkdir", "rename", "replace", "unlink", "preadv")

    def __init__(self) -> None:
        self.calls: list[str] = []
        self._thread = threading.get_ident()

    def noting(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        """``original``, whose calls by that thread are taken note of."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == self._thread:
                self.calls.append(name)
            return original(*args, **kwargs)

        return call

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count while the block runs."""
        copied = mock.patch.object(torch.Tensor, "copy_", self.noting("copy", torch.Tensor.copy_))
        with ExitStack() as stack:
            for name in self.DISK:
                stack.enter_context(mock.patch.object(os, name, self.noting(name, getattr(os, name))))
            for name in ("all_gather_object", "broadcast_object_list", "all_reduce", "gather_object"):
                owner = torch.distributed
                stack.enter_context(mock.patch.object(owner, name, self.noting(name, getattr(owner, name))))
            stack.enter_context(copied)
            yield


def threads() -> list[threading.Thread]:
    """The saves that are under way in this process."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("save ")]
