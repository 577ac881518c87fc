"""What a computation allocates and what it sends, counted while it runs, with real tensors or with fake ones.

Both are counted where operations are dispatched, below autograd: so whoever calls them is seen, backward passes too.
What an operation takes and gives up within itself is not.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

# torch.distributed._tools.mem_tracker of torch 2.13 counts in the same way, but refuses a second forward pass before
# the first one's backward pass, which is what pipelines do.

_DEVICE_OF = torch.ops.prim.device.default
"""What a fake tensor's ``device`` is dispatched as: nearly two of three operations of a trace, most of them autograd's.
Every mode that hands it on takes as long over it as over any other, and answering it at once takes nothing.
"""


def _device_of(tensor: Tensor) -> torch.device:
    return tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device


@contextmanager
def replaced(owner: object, name: str, value: object) -> Iterator[None]:
    """``owner.name`` is ``value`` inside."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


class StorageTracker(TorchDispatchMode):
    """Follows every storage that an operation takes or gives, from then until it is freed, while the mode is active.

    ``alive`` are the bytes now, ``peak`` the most since :meth:`mark`, both without what :meth:`set_apart` named, which
    has ``apart`` and ``peak_apart``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.apart = self.peak_apart = 0
        self._sizes: dict[int, int] = {}
        self._references: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._set_apart: set[int] = set()
        self._patches = ExitStack()

    def mark(self) -> int:
        """Forget the peak; returns the bytes alive."""
        self.peak = self.alive
        return self.alive

    def set_apart(self, tensors: Iterable[Tensor]) -> None:
        """Count the memory of ``tensors`` by itself from now on."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._see(storage)
            key = storage._cdata
            if key not in self._set_apart:
                self._change(key, 0)
                self._set_apart.add(key)
                self._change(key, storage.nbytes())

    def __enter__(self) -> Self:
        resize, tracker = torch.UntypedStorage.resize_, self

        def resized(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            result = resize(storage, size)
            if storage._cdata in tracker._sizes:
                tracker._change(storage._cdata, storage.nbytes())
            return result

        # storages are resized without any operation: gradients and gathered keys that are given up for a while
        self._patches.enter_context(replaced(torch.UntypedStorage, "resize_", resized))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()
        self._references.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE_OF:
            return _device_of(*args)
        result = func(*args, **(kwargs or {}))
        unseen = [result, *args, *(kwargs or {}).values()]
        while unseen:
            each = unseen.pop()
            if isinstance(each, Tensor):
                self._see(each.untyped_storage())
            elif isinstance(each, (list, tuple)):  # an operation's schema has no other containers
                unseen += each
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = 0
            self._change(key, storage.nbytes())
            self._references[key] = weakref.ref(storage, lambda _: self._gone(key))

    def _gone(self, key: int) -> None:
        self._change(key, 0)
        self._set_apart.discard(key)
        del self._sizes[key], self._references[key]

    def _change(self, key: int, size: int) -> None:
        grown, self._sizes[key] = size - self._sizes[key], size
        if key in self._set_apart:
            self.apart += grown
            self.peak_apart = max(self.peak_apart, self.apart)
        else:
            self.alive += grown
            self.peak = max(self.peak, self.alive)


class TrafficCounter(TorchDispatchMode):
    """Adds up what this rank sends while the mode is active, by what ``label`` calls it, in ``sent``.

    ``label`` is given the name of the process group and the whole tensor. Collectives are counted as rings: of n bytes
    that are gathered or scattered each of R ranks sends (R - 1) / R n, of n that are summed twice that. Raises
    ValueError for an operation between ranks that it has no count for.
    """

    def __init__(self, label: Callable[[str, Tensor], str]) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()
        self._label = label

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE_OF:
            return _device_of(*args)
        if func.namespace == "c10d":
            self._count(func.name().removeprefix("c10d::"), args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        if name in ("recv_", "barrier"):
            return
        if name == "send":
            (tensor,), group, share = args[0], args[1], 1.0
        elif name == "allreduce_":
            (tensor,), group, share = args[0], args[1], 2.0
        elif name in ("_allgather_base_", "_reduce_scatter_base_"):
            tensor, group, share = args[0 if name == "_allgather_base_" else 1], args[2], 1.0
        else:
            raise ValueError(f"no count of the bytes that {name} sends")
        ranks = dist.ProcessGroup.unbox(group)
        if name != "send":
            share *= (ranks.size() - 1) / ranks.size()
        self.sent[self._label(ranks.group_name, tensor)] += round(share * tensor.nbytes)
