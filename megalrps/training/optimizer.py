"""AdamW over flat buffers: two moments and a count of updates; the learning rate is handed in at every step."""

from collections.abc import Iterator

import torch
from torch import Tensor

from megalrps.kernels.adamw import adamw_
from megalrps.parallel.buffers import FlatBuffers
from megalrps.training.options import OptimizerOptions


class Optimizer:
    """Steps the flat ``buffers``; its state is ``updates``, ``exp_avg`` and ``exp_avg_sq``, laid out like it.

    There is no scheduler and no stored learning rate: what a step uses is a pure function of (path, step).
    """

    def __init__(self, buffers: FlatBuffers, options: OptimizerOptions) -> None:
        self.buffers = buffers
        self.options = options
        self.updates = torch.zeros((), dtype=torch.int64)  # on the host: it only scales the bias correction
        self.exp_avg = [torch.zeros_like(group.parameters) for group in buffers.groups]
        self.exp_avg_sq = [torch.zeros_like(group.parameters) for group in buffers.groups]

    def step(self, learning_rate: float) -> Tensor:
        """Clip, update every parameter once, and return the gradient norm before clipping (a scalar tensor)."""
        norm = self.buffers.gradient_norm()
        if self.options.clip_grad > 0:
            self.buffers.scale_gradients((self.options.clip_grad / (norm + 1e-6)).clamp(max=1.0))
        self.updates += 1
        for group, first, second in zip(self.buffers.groups, self.exp_avg, self.exp_avg_sq, strict=True):
            adamw_(
                group.parameters,
                group.gradients,
                first,
                second,
                learning_rate=learning_rate,
                beta1=self.options.adam_beta1,
                beta2=self.options.adam_beta2,
                epsilon=self.options.adam_eps,
                weight_decay=self.options.weight_decay if group.decays else 0.0,
                step=int(self.updates),
            )
        return norm

    def reset(self) -> None:
        """Forget the moments: a branch with ``--branch-optimizer reset`` starts so."""
        self.updates.zero_()
        for moment in (*self.exp_avg, *self.exp_avg_sq):
            moment.zero_()

    def named_state(self) -> Iterator[tuple[str, Tensor]]:
        """("updates", count), then ("exp_avg.NAME" or "exp_avg_sq.NAME", view) for every parameter NAME.

        The views are global ones (:meth:`FlatBuffers.as_global`).
        """
        yield "updates", self.updates
        for kind, moments in (("exp_avg", self.exp_avg), ("exp_avg_sq", self.exp_avg_sq)):
            for group, moment in zip(self.buffers.groups, moments, strict=True):
                for name, view in group.named(moment):
                    yield f"{kind}.{name}", self.buffers.as_global(name, view)
