"""Flat buffers: every parameter and every gradient is a view into one contiguous fp32 tensor a weight-decay group.

One buffer makes the data-parallel sum one collective, the global norm one reduction and the optimizer one kernel,
whatever the number of parameters; a sharded optimizer (ZeRO-1, arXiv 1910.02054) cuts the same buffer.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megalrps.parallel.world import World


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
    """The parameters that share a weight decay: ``parameters`` and ``gradients`` are flat, of equal length."""

    decays: bool
    parameters: Tensor
    gradients: Tensor
    slices: tuple[Slice, ...]

    def named(self, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(fully qualified parameter name, its view) over a buffer laid out like this group's."""
        return ((piece.name, piece.of(flat)) for piece in self.slices)


def decays_matrices(name: str, parameter: Tensor) -> bool:
    """The field's rule: weight decay for matrices, none for norms and biases (1-D parameters)."""
    return parameter.dim() >= 2


class FlatBuffers:
    """Moves a module's parameters and gradients into flat buffers and keeps the module working on the views.

    Parameters keep their names, shapes and values; ``parameter.grad`` is a view that autograd adds into. A
    parameter shared by two modules (a tied head) is held once.
    """

    def __init__(self, module: nn.Module, decays: Callable[[str, Tensor], bool] = decays_matrices) -> None:
        named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
        self.groups = tuple(
            _flatten(chosen, flag)
            for flag in (True, False)
            if (chosen := [(name, parameter) for name, parameter in named if decays(name, parameter) is flag])
        )

    def zero_gradients(self) -> None:
        """Set every gradient to zero, keeping the views."""
        for group in self.groups:
            group.gradients.zero_()

    def sum_gradients(self, world: World) -> None:
        """Add the gradients up over the data-parallel ranks: one collective a group."""
        for group in self.groups:
            world.sum_(group.gradients)

    def gradient_norm(self) -> Tensor:
        """The global L2 norm of all gradients, a scalar tensor on their device."""
        norms = [torch.linalg.vector_norm(group.gradients) for group in self.groups]
        return torch.linalg.vector_norm(torch.stack(norms))

    def scale_gradients(self, factor: Tensor) -> None:
        """Multiply every gradient by ``factor`` (a scalar tensor: no host synchronisation)."""
        for group in self.groups:
            group.gradients.mul_(factor)

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """(fully qualified name, view) of every parameter held."""
        for group in self.groups:
            yield from group.named(group.parameters)


def _flatten(named: list[tuple[str, nn.Parameter]], decays: bool) -> BufferGroup:
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
    return BufferGroup(decays, parameters, gradients, tuple(slices))
