"""Gathering updated parameters from the replicas that own their shards, while the next forward pass goes on.

Buckets are gathered in the order of the forward pass, and each is waited for by the first module that uses it. Which
modules are called is seen, not presumed: a map may be applied by the module that holds it, a table be read as a head. A
pass shows which ones are, and a parameter is waited for by the nearest called module around it. What no called module
holds is waited for at once.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from megalrps.parallel.bucket import Bucket
from megalrps.parallel.collectives import Pending, start_fill_
from megalrps.parallel.group import Group


class ParameterGathers:
    """The gathers of ``buckets``, which hold the parameters of ``module``, over ``replicas``.

    ``overlap`` False: each blocks. Where nothing is sharded there are none.
    """

    def __init__(self, module: nn.Module, buckets: Sequence[Bucket], replicas: Group, *, overlap: bool) -> None:
        self._buckets = buckets
        self._replicas = replicas
        self._sharded = [len(bucket.shard) < len(bucket.parameters) for bucket in buckets]
        self._overlap = overlap and any(self._sharded)
        self._under_way: dict[int, Pending] = {}
        self._called: set[str] = set()
        self._around = _modules_around(module, buckets) if self._overlap else {}
        self._waited_by: dict[str, set[int]] = {}  # by the name of a module, the buckets that it is to wait for
        modules = dict(module.named_modules(remove_duplicate=False))
        for name in sorted({name for around in self._around.values() for name in around}):
            modules[name].register_forward_pre_hook(self._hook(name))

    def start(self) -> None:
        """Begin to gather every bucket, the first of the forward pass first."""
        assert not self._under_way, "parameters were updated while they were being gathered"
        for index in reversed(range(len(self._buckets))):
            if self._sharded[index]:
                self._under_way[index] = start_fill_(self._buckets[index].parameters, self._replicas)
                if not self._overlap:
                    self.wait(index)
        if self._overlap:
            self._place_waits()

    def wait(self, index: int) -> None:
        """Bucket ``index`` has been gathered."""
        pending = self._under_way.pop(index, None)
        if pending is not None:
            pending.wait()

    def wait_all(self) -> None:
        """Every bucket has been gathered."""
        for index in list(self._under_way):
            self.wait(index)

    def check_gathered(self, index: int) -> None:
        """Raise RuntimeError for a bucket that gradients come from and that nobody has waited for."""
        if index in self._under_way:
            names = ", ".join(piece.name for piece in self._buckets[index].slices[:3])
            raise RuntimeError(f"parameters were used while they were being gathered: {names}")

    def _hook(self, name: str) -> Any:
        def before_forward(*_: Any) -> None:
            self._called.add(name)
            if self._under_way:
                for index in self._waited_by.get(name, ()):
                    self.wait(index)

        return before_forward

    def _place_waits(self) -> None:
        self._waited_by = {}
        for (index, _), around in self._around.items():
            nearest = next((name for name in around if name in self._called), None)
            if nearest is None:
                self.wait(index)
            else:
                self._waited_by.setdefault(nearest, set()).add(index)


def _modules_around(module: nn.Module, buckets: Sequence[Bucket]) -> dict[tuple[int, str], list[str]]:
    """For each (bucket, parameter) the names of the modules it is in, the innermost first.

    A parameter that several modules share is listed under each of its names: any of them may be the first to use it.
    """
    indices = {piece.name: index for index, bucket in enumerate(buckets) for piece in bucket.slices}
    by_parameter = {parameter: indices[name] for name, parameter in module.named_parameters() if name in indices}
    around: dict[tuple[int, str], list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if parameter in by_parameter:
            parts = name.split(".")[:-1]
            around[by_parameter[parameter], name] = [".".join(parts[:end]) for end in range(len(parts), -1, -1)]
    return around
