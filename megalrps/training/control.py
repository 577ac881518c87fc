"""What the ranks of a launch agree on once a step: to stop, to give way, to notice a save that has failed.

A signal reaches some ranks and not others, a disk fails on one node; acting on it alone would leave the others waiting
in a collective. So everything that a rank may come to know alone is put together in one small maximum after each step.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from megalrps.training.signals import STOP_REASONS


@dataclass(frozen=True)
class Agreed:
    """``stop``: why to save and leave, None to go on. ``fenced``: another launch has taken a path over.

    Of the save in the background: ``saving`` on some rank still, ``save_failed`` on some rank.
    """

    stop: str | None
    fenced: bool
    saving: bool
    save_failed: bool


class Control:
    """The agreement of the ranks of ``group`` (gloo), or of this process alone where it is None."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group

    def agree(self, *, stop: str | None, fenced: bool, saving: bool, save_failed: bool) -> Agreed:
        """What any rank knows, on all of them. Collective."""
        told = torch.tensor([STOP_REASONS.index(stop), fenced, saving, save_failed], dtype=torch.int32)
        if self._group is not None:
            dist.all_reduce(told, dist.ReduceOp.MAX, group=self._group)
        reason, fenced, saving, save_failed = told.tolist()
        return Agreed(STOP_REASONS[reason], bool(fenced), bool(saving), bool(save_failed))
