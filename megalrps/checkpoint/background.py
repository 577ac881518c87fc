"""Saves in the background: a thread writes a copy of the state while training goes on, one save at a time.

Two saves in flight on one process group wait for each other's collectives for ever, and so would a save and a training
step: the store that is written by has a group of its own, and :meth:`BackgroundSave.start` refuses a second save.
"""

import threading
from collections.abc import Callable, Mapping
from functools import partial
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, cast

import torch

from megalrps.checkpoint.errors import SaveError
from megalrps.checkpoint.publication import Publish
from megalrps.checkpoint.store import Store

T = TypeVar("T")

_SECONDS_TO_DISCARD = 5.0


class BackgroundSave(Generic[T]):
    """Saves by ``store``, whose process group nothing else uses. To be used in a ``with`` block, by every rank alike.

    Leaving the block waits for the save in flight. Where it is left by an exception, for no longer than ``patience``
    seconds: a save whose publication has not begun by then is never published, and what it has written is discarded, by
    its thread if that wakes up or when a store is next prepared.
    """

    def __init__(self, store: Store, patience: float) -> None:
        self.store = store
        self._patience = patience
        self._flight: _Flight[T] | None = None

    @property
    def name(self) -> str:
        """The checkpoint in flight, until :meth:`finish` has returned; there is one."""
        assert self._flight is not None, "no save is in flight"
        return self._flight.name

    @property
    def busy(self) -> bool:
        """Whether there is a save that :meth:`finish` has not been called for: then none can be started."""
        return self._flight is not None

    @property
    def ended(self) -> bool:
        """Whether that save is over on this rank, well or not: :meth:`finish` would not wait."""
        return self._flight is not None and self._flight.over.is_set()

    @property
    def error(self) -> Exception | None:
        """Why it has failed, once it has ended; None: it has not."""
        return self._flight.failure() if self._flight is not None and self._flight.over.is_set() else None

    @property
    def failed(self) -> bool:
        """Whether it has ended, and not well: nothing was committed unless ``afterwards`` is what failed."""
        return self.error is not None

    def start(
        self,
        name: str,
        tensors: Mapping[str, torch.Tensor],
        record: Mapping[str, Any],
        publish: Publish,
        afterwards: Callable[[], T],
    ) -> None:
        """Begin to save as :meth:`Store.save` does; ``tensors`` must keep their values until the save has ended.

        ``publish`` and then ``afterwards``, which may be collective over the store's group, run on the thread: the
        latter on every rank, once the checkpoint is committed.
        """
        assert self._flight is None, "a save is in flight: finish it first"
        self._flight = _Flight(self.store, name, tensors, record, publish, afterwards)

    def finish(self) -> T:
        """Wait for the save in flight (there is one): what ``afterwards`` gave. Raises what the thread raised."""
        assert self._flight is not None, "no save is in flight"
        self._flight.thread.join()
        flight, self._flight = self._flight, None
        error = flight.failure()
        if error is not None:
            raise error
        return cast(T, flight.result)

    def abandon(self) -> None:
        """Never publish the save in flight, unless that has begun: another rank's part of it is known to have failed.

        Leaving the block does not wait for it any more, beyond a moment to clear up.
        """
        if self._flight is not None:
            self._flight.abandon()
            self._patience = min(self._patience, _SECONDS_TO_DISCARD)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._flight is None:
            return
        if error is None:
            self.finish()
            return
        self._flight.thread.join(self._patience)
        if not self._flight.over.is_set():
            self._flight.abandon()
            error.add_note(f"checkpoint {self.name} was being written, and is given up")
        elif self._flight.error is not None and self._flight.error is not error:
            error.add_note(f"checkpoint {self.name} was not saved: {self._flight.error}")
        self._flight = None


class _Flight(Generic[T]):
    """One save on its thread."""

    def __init__(
        self,
        store: Store,
        name: str,
        tensors: Mapping[str, torch.Tensor],
        record: Mapping[str, Any],
        publish: Publish,
        afterwards: Callable[[], T],
    ) -> None:
        self.name = name
        self.over = threading.Event()
        self.error: BaseException | None = None
        self.result: T | None = None
        self._publish = publish
        self._abandoned = threading.Event()
        work = partial(self._work, store, tensors, record, afterwards)
        # A daemon: a process that has given a save up must be able to end, whatever its disk does.
        self.thread = threading.Thread(target=work, name=f"save {name}", daemon=True)
        self.thread.start()

    def failure(self) -> Exception | None:
        """What to raise, once over."""
        if self.error is None or isinstance(self.error, Exception):
            return self.error
        failure = SaveError(f"checkpoint {self.name} was not saved: {type(self.error).__name__}: {self.error}")
        failure.__cause__ = self.error
        return failure

    def abandon(self) -> None:
        self._abandoned.set()

    def _work(
        self,
        store: Store,
        tensors: Mapping[str, torch.Tensor],
        record: Mapping[str, Any],
        afterwards: Callable[[], T],
    ) -> None:
        try:
            store.save(self.name, tensors, record, self._publish_unless_abandoned)
            self.result = afterwards()
        except BaseException as error:  # whatever it is: the thread that waits raises it
            self.error = error
        finally:
            self.over.set()

    def _publish_unless_abandoned(self, rename: Callable[[], None], digest: str) -> None:
        if self._abandoned.is_set():
            raise SaveError(f"checkpoint {self.name} was given up before it was written")
        self._publish(rename, digest)
