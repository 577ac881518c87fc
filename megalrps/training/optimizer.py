"""AdamW over flat buffers: two moments and a count of updates; the learning rate is handed in at every step."""

from collections.abc import Iterator

import torch
from torch import Tensor

from megalrps.kernels.adamw import adamw_
from megalrps.parallel.buffers import FlatBuffers
from megalrps.training.loss_scale import LossScale
from megalrps.training.options import LossScaleOptions, MomentType, OptimizerOptions


class Optimizer:
    """Steps this rank's shards of ``buffers``; its state is ``updates``, ``exp_avg`` and ``exp_avg_sq``, laid out so.

    There is no scheduler and no stored learning rate: what a step uses is a pure function of (path, step). With
    ``scaling`` the gradients are those of a scaled loss (fp16); the scale is state too.
    """

    def __init__(
        self, buffers: FlatBuffers, options: OptimizerOptions, scaling: LossScaleOptions | None = None
    ) -> None:
        self.buffers = buffers
        self.options = options
        self.scale = None if scaling is None else LossScale(scaling)
        self.updates = torch.zeros((), dtype=torch.int64)  # on the host: it only scales the bias correction
        self.exp_avg = [_moment(bucket.master, options.exp_avg_dtype) for bucket in buffers.buckets]
        self.exp_avg_sq = [_moment(bucket.master, options.exp_avg_sq_dtype) for bucket in buffers.buckets]

    @property
    def loss_scale(self) -> float | None:
        """What the loss of the next backward pass is multiplied by; None: nothing, and no step is skipped."""
        return None if self.scale is None else self.scale.value

    def step(self, learning_rate: float) -> Tensor:
        """Clip, update every parameter once, and return the gradient norm before clipping (a scalar tensor).

        The norm is that of the unscaled gradients. Where it is no number, on all ranks alike, nothing is updated. The
        host waits for the norm: to decide that, which later work could not take back.
        """
        norm = self.buffers.gradient_norm()
        factor = torch.ones_like(norm)
        if self.scale is not None:
            factor /= self.scale.value
            norm = norm * factor
        finite = bool(torch.isfinite(norm))
        if self.scale is not None:
            self.scale.update(finite)
        if finite:
            if self.options.clip_grad > 0:
                factor *= (self.options.clip_grad / (norm + 1e-6)).clamp(max=1.0)
            self.updates += 1
            self.update(learning_rate, factor)
            self.buffers.publish()
        return norm

    def update(self, learning_rate: float, factor: Tensor) -> None:
        """Update the masters of this rank's shards with ``factor`` times the gradients (a scalar tensor)."""
        buckets = self.buffers.buckets
        for bucket, first, second in zip(buckets, self.exp_avg, self.exp_avg_sq, strict=True):
            device = bucket.master.device  # another one where the optimizer is offloaded
            adamw_(
                bucket.master,
                bucket.gradient_shard.to(device),
                first,
                second,
                learning_rate=learning_rate,
                beta1=self.options.adam_beta1,
                beta2=self.options.adam_beta2,
                epsilon=self.options.adam_eps,
                weight_decay=self.options.weight_decay if bucket.decays else 0.0,
                step=int(self.updates),
                gradient_scale=factor.to(device),
                narrow=bucket.narrow,
            )

    def reset(self) -> None:
        """Forget the moments: a branch with ``--branch-optimizer reset`` starts so. The loss scale starts anew too."""
        self.updates.zero_()
        for moment in (*self.exp_avg, *self.exp_avg_sq):
            moment.zero_()
        if self.scale is not None:
            self.scale.reset()

    def named_state(self) -> Iterator[tuple[str, Tensor]]:
        """("updates", count), then ("exp_avg.NAME" or "exp_avg_sq.NAME", view) for every parameter NAME.

        The views are global ones (:meth:`FlatBuffers.named`). With a loss scale, also what it keeps.
        """
        yield "updates", self.updates
        if self.scale is not None:
            yield from self.scale.named_state()
        for kind, moments in (("exp_avg", self.exp_avg), ("exp_avg_sq", self.exp_avg_sq)):
            for name, view in self.buffers.named(moments):
                yield f"{kind}.{name}", view


def _moment(master: Tensor, kept_as: MomentType) -> Tensor:
    """Zeros beside ``master``; "fp32" is the type of the masters, which in a model of fp64 is that."""
    return torch.zeros_like(master, dtype=torch.bfloat16 if kept_as == "bf16" else None)
