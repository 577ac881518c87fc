"""The way of samples to a GPU: through page-locked memory, by copies that neither the loop nor its stream waits for.

A copy from pageable memory is staged by the driver and holds up the thread that asks for it. From page-locked memory
the GPU's copy engine fetches it by itself, on a stream beside the one that computes. Page-locking costs more than the
copy, so the memory is used again; that must not be before the copy out of it is done, which is what all here is about.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megalrps.training.feed import HostLane, Lane, Share

_SLOTS = 2
"""Sets of buffers of a lane: one is filled while the other is copied from."""


class Done(Protocol):
    """The moment at which a copy is done."""

    def synchronize(self) -> None:
        """Wait for it, on this thread."""


class Copier(Protocol):
    """What a device does for a :class:`PageLockedLane`."""

    def enter(self) -> None:
        """Called once on each thread, before anything else there."""

    def page_locked(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Uninitialised host memory that the device reads by itself."""

    def copy(self, sources: Sequence[Tensor]) -> tuple[list[Tensor], Done]:
        """Begin to copy such memory to the device, and when that is done; the thread goes on at once."""

    def receive(self, copies: Sequence[Tensor], done: Done) -> None:
        """On the loop's thread: what it computes from now on finds ``copies`` whole, and they live until then."""


class CudaCopier:
    """Copies on a stream of their own to the CUDA ``device``."""

    def __init__(self, device: torch.device) -> None:
        index = device.index if device.index is not None else torch.cuda.current_device()
        self._device = torch.device("cuda", index)
        self._stream: Any = torch.cuda.Stream(self._device)

    def enter(self) -> None:
        """Make the device the thread's own: a new thread begins with the first one, and would take memory there."""
        torch.cuda.set_device(self._device)

    def page_locked(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Page-locked memory."""
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def copy(self, sources: Sequence[Tensor]) -> tuple[list[Tensor], Done]:
        """Memory on the device of the side stream, and an event after the copies on it."""
        with torch.cuda.stream(self._stream):
            copies = [source.to(self._device, non_blocking=True) for source in sources]
            done = torch.cuda.Event(blocking=True)  # a thread that waits for it sleeps
            done.record(self._stream)
        return copies, done

    def receive(self, copies: Sequence[Tensor], done: Any) -> None:
        """Have the current stream wait for the event, and the allocator for that stream before it reuses the memory."""
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(done)
        for copied in copies:
            copied.record_stream(stream)


class PageLockedLane:
    """A lane through page-locked buffers, which are made at the first share and used for all that are like it."""

    def __init__(self, copier: Copier) -> None:
        copier.enter()
        self._copier = copier
        self._slots = [_Slot() for _ in range(_SLOTS)]

    def send(self, share: Share) -> Callable[[], Share]:
        """Begin the copies of ``share``'s arrays to the device."""
        arrays = {name: each for name, each in vars(share).items() if each is not None}
        slot = self._slots.pop(0)
        self._slots.append(slot)
        sources = [slot.filled(name, array, self._copier) for name, array in arrays.items()]
        copies, done = self._copier.copy(sources)
        slot.done = done

        def receive() -> Share:
            self._copier.receive(copies, done)
            return Share(**dict(zip(arrays, copies, strict=True)))

        return receive


class _Slot:
    """One buffer for each array of a share, and the end of the copies out of them."""

    def __init__(self) -> None:
        self.done: Done | None = None
        self._buffers: dict[str, Tensor] = {}

    def filled(self, name: str, array: NDArray[Any], copier: Copier) -> Tensor:
        """The buffer of that name, holding ``array``."""
        if self.done is not None:
            self.done.synchronize()
            self.done = None
        buffer = self._buffers.get(name)
        dtype = torch.from_numpy(array).dtype
        if buffer is None or buffer.shape != array.shape or buffer.dtype != dtype:
            buffer = self._buffers[name] = copier.page_locked(array.shape, dtype)
        np.copyto(buffer.numpy(), array)  # numpy's copy keeps to this thread; torch's would wake a team of its own
        return buffer


def lanes_to(device: torch.device) -> Callable[[], Lane]:
    """What makes the lanes to ``device``."""
    if device.type != "cuda":
        return HostLane
    copier = CudaCopier(device)
    return lambda: PageLockedLane(copier)
