"""Some processes of a launch that do one thing together, as one of them sees it."""

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Group:
    """The place of this process among the ``size`` of ``group``; ``group`` is None for a process that is alone in it.

    The data-parallel group of a rank holds those with whom it shares out a batch; the tensor-parallel group those with
    whom it shares out every matrix. Only the whole launch, a :class:`megalrps.parallel.world.World`, also decides,
    writes and fails together.
    """

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add ``tensor`` up over the group, in place; returns it."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        return tensor
