"""Activations that are not kept on the device between the passes: computed again, or put on the host meanwhile.

Neither changes a number: what is computed again is computed by the same operations from the same inputs (Chen et al.
2016, arXiv 1604.06174, section 3), and the network draws no random numbers. Under tensor parallelism the exchanges of
a forward pass are repeated too, by all ranks in the same order, for all of them run the same layers backwards.

The head and the loss are never among it: the loss's backward pass writes over the logits, which it makes again itself
under ``--cross-entropy-fusion-impl linear`` (:mod:`megalrps.parallel.linear_loss`).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from megalrps.kernels.documents import Documents
from megalrps.model.activation_options import ActivationOptions

Treatment = Literal["kept", "recomputed", "offloaded"]


class Unit(NamedTuple):
    """Layers ``[first, end)`` of a stage and what becomes of their activations."""

    first: int
    end: int
    treatment: Treatment


def units(layers: int, options: ActivationOptions) -> list[Unit]:
    """The layers of a stage, all of them in their order, in runs that are treated as one."""
    full, number = options.recompute_granularity == "full", options.recompute_num_layers or 1
    if full and options.recompute_method == "uniform":
        return [Unit(first, min(first + number, layers), "recomputed") for first in range(0, layers, number)]
    treatment: Treatment = "recomputed" if full else "offloaded"
    treated = min(number if full else options.cpu_offloading_num_layers, layers)
    alone = [Unit(layer, layer + 1, treatment) for layer in range(treated)]
    return alone + [Unit(layer, layer + 1, "kept") for layer in range(treated, layers)]


def run_layers(
    blocks: Sequence[nn.Module],
    options: ActivationOptions,
    hidden_BSH: Tensor,
    cosine_SR: Tensor,
    sine_SR: Tensor,
    positions_BS: Tensor | None = None,
    documents: Documents | None = None,
) -> Tensor:
    """``hidden_BSH`` after the ``blocks``, whose activations are treated as the ``options`` say.

    The last four go to every block: see :meth:`megalrps.model.attention.Attention.forward`.
    """
    for first, end, treatment in units(len(blocks), options):

        def layers(hidden_BSH: Tensor, run: Sequence[nn.Module] = blocks[first:end]) -> Tensor:
            for block in run:
                hidden_BSH = block(hidden_BSH, cosine_SR, sine_SR, positions_BS, documents)
            return hidden_BSH

        if treatment == "recomputed":
            hidden_BSH = recomputed(layers, hidden_BSH)
        elif treatment == "offloaded":
            with offloaded(leaving=(cosine_SR, sine_SR, *blocks[first].parameters())):
                hidden_BSH = layers(hidden_BSH)
        else:
            hidden_BSH = layers(hidden_BSH)
    return hidden_BSH


def recomputed(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """``function(*arguments)``, of which only the arguments are kept for the backward pass.

    The backward pass repeats it up to the last tensor that it needs, under the autocast of the forward pass; torch
    raises CheckpointError where the repetition keeps other shapes or types than the first time.
    """
    if not torch.is_grad_enabled():
        return function(*arguments)
    result: Tensor = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    return result


class _HostCopy:
    """The memory of a device's tensor, on the host: all of its storage, so that every view of it finds its own."""

    def __init__(self, tensor: Tensor) -> None:
        self._device = tensor.device
        elements = tensor.untyped_storage().nbytes() // tensor.element_size()
        flat = tensor.detach().as_strided((elements,), (1,), 0)
        self._host = torch.empty_like(flat, device="cpu", pin_memory=flat.is_cuda)
        self._host.copy_(flat, non_blocking=True)  # torch's allocators keep both sides until the stream is past it

    def again(self, like: "_View") -> Tensor:
        """The view, on its device, of the memory brought back there."""
        return self._host.to(self._device, non_blocking=True).as_strided(*like)


class _View(NamedTuple):
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


@contextmanager
def offloaded(*, leaving: Iterable[Tensor]) -> Iterator[None]:
    """What autograd keeps of the forward pass inside goes to the host until the backward pass asks for it.

    All but integers and what shares memory with a tensor of ``leaving``: parameters and what other layers keep too.
    Memory that several operations keep is copied once. On the host itself the copies are made as well and save
    nothing.
    """
    left = {_memory(tensor) for tensor in leaving}
    copies: dict[object, tuple[Tensor, _HostCopy]] = {}  # with the tensor, so that no other one takes its memory

    def pack(tensor: Tensor) -> Tensor | tuple[_HostCopy, _View]:
        memory = _memory(tensor)
        if memory in left or not tensor.is_floating_point():
            return tensor
        key = (memory, tensor.dtype, tensor._version)
        if key not in copies:
            copies[key] = (tensor, _HostCopy(tensor))
        return copies[key][1], _View(tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def unpack(packed: Tensor | tuple[_HostCopy, _View]) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed[0].again(packed[1])

    with saved_tensors_hooks(pack, unpack):
        yield
    copies.clear()


def _memory(tensor: Tensor) -> int:
    """Which memory this is: an address of the storage's own record, which tensors without data have too."""
    identity: int = tensor.untyped_storage()._cdata
    return identity
