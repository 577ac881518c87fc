"""A copy of the state in the host's memory, from which a checkpoint is written while training goes on."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megalrps.checkpoint.background import BackgroundSave
from megalrps.checkpoint.lineage import Lineage
from megalrps.parallel.world import World
from megalrps.training.state import TrainState

Left = tuple[Lineage, str | None]
"""What there is once a checkpoint is saved and older ones are removed, and why none were where that is so."""


class Snapshot:
    """Room for one copy of ``state``'s tensors on the host: as much again as this rank's masters and moments.

    The memory is taken, and touched, here, and used again by every :meth:`take`: page-locked where the device is a GPU,
    which then copies into it on its own.
    """

    def __init__(self, state: TrainState) -> None:
        self._state = state
        self._devices = {flat.device for flats in state.flats().values() for flat in flats if flat.is_cuda}
        self._copies = {kind: [_room_for(flat) for flat in flats] for kind, flats in state.flats().items()}

    @torch.no_grad()
    def take(self) -> dict[str, Tensor]:
        """Name -> tensor as :meth:`TrainState.tensors` gives them, of the state as it is now; overwrites the last copy.

        When it returns, the live state may change. A GPU's copies are queued behind what computes the state, all of
        them, and waited for once.
        """
        counts = {name: count.clone() for name, count in self._state.counts().items()}
        for kind, flats in self._state.flats().items():
            for copy, flat in zip(self._copies[kind], flats, strict=True):
                copy.copy_(flat, non_blocking=True)
        for device in self._devices:
            torch.cuda.current_stream(device).synchronize()
        return self._state.named(self._copies, counts)


@dataclass(frozen=True)
class Background:
    """What ``--async-save`` has: ``saves`` write what ``snapshot`` has copied, and talk through the group of ``world``.

    That group is theirs alone; the ranks of ``world`` are those of the launch.
    """

    world: World
    saves: BackgroundSave[Left]
    snapshot: Snapshot


def _room_for(flat: Tensor) -> Tensor:
    # Touched: memory that no page stands behind yet would be fetched a page at a time in the first copy.
    return torch.empty(flat.shape, dtype=flat.dtype, pin_memory=flat.is_cuda).zero_()
