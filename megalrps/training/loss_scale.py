"""Loss scaling for fp16, whose smallest numbers are larger than many gradients (Micikevicius et al. 2018, arXiv
1710.03740, section 3.2)."""

from collections.abc import Iterator

import torch
from torch import Tensor

from megalrps.training.options import LossScaleOptions


class LossScale:
    """What the loss is multiplied by, and how that follows the gradients that come of it.

    With ``--loss-scale`` it is constant. Otherwise it is halved where gradients overflow, after ``hysteresis`` such
    updates or at once where that many have been since it last grew, and doubled after each ``loss_scale_window``
    updates in a row without one. Every rank sees the same norm, so every rank has the same scale.
    """

    def __init__(self, options: LossScaleOptions) -> None:
        self._options = options
        self._constant = options.loss_scale
        self._scale = torch.zeros((), dtype=torch.float64)  # on the host: all three decide what the host does
        self._good = torch.zeros((), dtype=torch.int64)
        self._hysteresis = torch.zeros((), dtype=torch.int64)
        self.reset()

    @property
    def value(self) -> float:
        """The scale of the next backward pass."""
        return self._scale.item()

    def update(self, finite: bool) -> None:
        """Take note of whether the gradients of one update were all numbers."""
        if self._constant is not None:
            return
        if not finite:
            self._good.zero_()
            self._hysteresis -= 1
            if self._hysteresis <= 0:
                self._scale.mul_(0.5).clamp_(min=self._options.min_loss_scale)
            return
        self._good += 1
        if self._good >= self._options.loss_scale_window:
            self._good.zero_()
            self._hysteresis.fill_(self._options.hysteresis)
            self._scale.mul_(2)

    def reset(self) -> None:
        """Begin again at the initial scale."""
        self._scale.fill_(self._options.initial_loss_scale if self._constant is None else self._constant)
        self._good.zero_()
        self._hysteresis.fill_(self._options.hysteresis)

    def named_state(self) -> Iterator[tuple[str, Tensor]]:
        """(name, live scalar) of what a checkpoint keeps."""
        yield "loss_scale", self._scale
        yield "loss_scale_good_updates", self._good
        yield "loss_scale_hysteresis", self._hysteresis
