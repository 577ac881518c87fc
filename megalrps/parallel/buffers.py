"""Flat buffers: every parameter and gradient is a view into one contiguous fp32 tensor a group of its like.

Parameters are alike that share a weight decay and, under tensor parallelism, the ranks that hold them. One buffer makes
the data-parallel sum one collective, the global norm one reduction and the optimizer one kernel, whatever the number of
parameters; a sharded optimizer (ZeRO-1, arXiv 1910.02054) cuts the same buffer.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megalrps.parallel.group import Group
from megalrps.parallel.mesh import Mesh
from megalrps.parallel.placement import WHOLE, Placement


@dataclass(frozen=True)
class Slice:
    """Where one parameter lies in its group's buffer: elements ``[offset, offset + numel)``, row-major ``shape``."""

    name: str
    offset: int
    shape: torch.Size

    def of(self, flat: Tensor) -> Tensor:
        """The view of this parameter in ``flat``, a buffer laid out like the group's."""
        return flat[self.offset : self.offset + self.shape.numel()].view(self.shape)


@dataclass(frozen=True)
class BufferGroup:
    """The parameters that are alike: ``parameters`` and ``gradients`` are flat, of equal length.

    ``holders`` are the tensor-parallel ranks that hold these same parameters, None where this one does alone; ``sums``:
    each of them computes but a part of the gradient.
    """

    decays: bool
    parameters: Tensor
    gradients: Tensor
    slices: tuple[Slice, ...]
    holders: Group | None = None
    sums: bool = False

    def named(self, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(fully qualified parameter name, its view) over a buffer laid out like this group's."""
        return ((piece.name, piece.of(flat)) for piece in self.slices)


def decays_matrices(name: str, parameter: Tensor) -> bool:
    """The field's rule: weight decay for matrices, none for norms and biases (1-D parameters)."""
    return parameter.dim() >= 2


class FlatBuffers:
    """Moves a module's parameters and gradients into flat buffers and keeps the module working on the views.

    Parameters keep their names, shapes and values; ``parameter.grad`` is a view that autograd adds into. A
    parameter shared by two modules (a tied head) is held once. ``placements`` says which part of each parameter of the
    model the module holds, by name, on ``mesh``; without, it holds all of every one.
    """

    def __init__(
        self,
        module: nn.Module,
        decays: Callable[[str, Tensor], bool] = decays_matrices,
        *,
        mesh: Mesh | None = None,
        placements: Mapping[str, Placement] | None = None,
    ) -> None:
        self._mesh = mesh
        self.placements: Mapping[str, Placement] = placements or {}
        alike: dict[tuple[bool, int, bool], list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                placement = self._placement(name)
                key = (not decays(name, parameter), placement.copies, placement.sums)
                alike.setdefault(key, []).append((name, parameter))
        self.groups = tuple(self._flatten(alike[key], decays=not key[0]) for key in sorted(alike))

    def zero_gradients(self) -> None:
        """Set every gradient to zero, keeping the views."""
        for group in self.groups:
            group.gradients.zero_()

    def sum_gradients(self, data: Group) -> None:
        """Add the gradients up over the data-parallel ranks, and what holders computed in parts over the holders.

        One or two collectives a group.
        """
        for group in self.groups:
            if group.holders is not None and group.sums:
                group.holders.sum_(group.gradients)
            data.sum_(group.gradients)

    def gradient_norm(self) -> Tensor:
        """The L2 norm of all gradients of the model, a scalar tensor on their device.

        What several ranks hold is counted once: each of n holders adds 1 / n of its square.
        """
        norms = torch.stack([torch.linalg.vector_norm(group.gradients) for group in self.groups])
        if self._mesh is None or self._mesh.tensor.size == 1:
            return torch.linalg.vector_norm(norms)
        holders = [1 if group.holders is None else group.holders.size for group in self.groups]
        squares = norms.square() / torch.tensor(holders, dtype=norms.dtype, device=norms.device)
        return self._mesh.tensor.sum_(squares.sum()).sqrt()

    def scale_gradients(self, factor: Tensor) -> None:
        """Multiply every gradient by ``factor`` (a scalar tensor: no host synchronisation)."""
        for group in self.groups:
            group.gradients.mul_(factor)

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """(fully qualified name, view) of every parameter held."""
        for group in self.groups:
            yield from group.named(group.parameters)

    def as_global(self, name: str, local: Tensor) -> Tensor:
        """The tensor of the whole model that ``local``, which lies as the parameter ``name``, is a part of.

        A view of the same memory: for a checkpoint, which knows no ranks.
        """
        return local if self._mesh is None else self._mesh.view(local, self._placement(name))

    def _placement(self, name: str) -> Placement:
        return self.placements.get(name, WHOLE)

    def _flatten(self, named: list[tuple[str, nn.Parameter]], decays: bool) -> BufferGroup:
        first = named[0][1]
        total = sum(parameter.numel() for _, parameter in named)
        parameters = torch.empty(total, dtype=first.dtype, device=first.device)
        gradients = torch.zeros_like(parameters)
        slices: list[Slice] = []
        offset = 0
        for name, parameter in named:
            piece = Slice(name, offset, parameter.shape)
            piece.of(parameters).copy_(parameter.detach())
            parameter.data = piece.of(parameters)
            parameter.grad = piece.of(gradients)
            slices.append(piece)
            offset += parameter.numel()
        placement = self._placement(named[0][0])
        holders = None if self._mesh is None else self._mesh.sharing(placement)
        return BufferGroup(decays, parameters, gradients, tuple(slices), holders, placement.sums)
