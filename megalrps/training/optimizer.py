"""AdamW over flat buffers: two moments and a count of updates; the learning rate is handed in at every step."""

from collections.abc import Iterator

import torch
from torch import Tensor

from megalrps.kernels.adamw import adamw_
from megalrps.kernels.options import OptimizerBackend
from megalrps.parallel.buffers import FlatBuffers
from megalrps.training.loss_scale import LossScale
from megalrps.training.options import LossScaleOptions, MomentType, OptimizerOptions


class Optimizer:
    """Steps this rank's shards of ``buffers``; its state is ``updates``, ``exp_avg`` and ``exp_avg_sq``, laid out so.

    There is no scheduler and no stored learning rate: what a step uses is a pure function of (path, step). With
    ``scaling`` the gradients are those of a scaled loss (fp16); the scale is state too. ``backend``: what updates; see
    :func:`megalrps.kernels.adamw.adamw_`.
    """

    def __init__(
        self,
        buffers: FlatBuffers,
        options: OptimizerOptions,
        scaling: LossScaleOptions | None = None,
        backend: OptimizerBackend = "auto",
    ) -> None:
        self.buffers = buffers
        self.options = options
        self.backend: OptimizerBackend = backend
        self.scale = None if scaling is None else LossScale(scaling)
        self._updates = torch.zeros((), dtype=torch.int64)  # on the host: it only scales the bias correction
        self._unsettled: Tensor | None = None
        self.exp_avg = [_moment(bucket.master, options.exp_avg_dtype) for bucket in buffers.buckets]
        self.exp_avg_sq = [_moment(bucket.master, options.exp_avg_sq_dtype) for bucket in buffers.buckets]

    @property
    def updates(self) -> Tensor:
        """How many updates were made, steps left out not counted. Who reads it settles the last step."""
        self.settle()
        return self._updates

    @property
    def loss_scale(self) -> float | None:
        """What the loss of the next backward pass is multiplied by; None: nothing, and no step is skipped.

        Who reads it settles the last step.
        """
        self.settle()
        return None if self.scale is None else self.scale.value

    def step(self, learning_rate: float, loss: Tensor | None = None) -> Tensor:
        """Clip, update every parameter once, and return the gradient norm before clipping (a scalar tensor).

        The norm is that of the unscaled gradients. Where it is no number, or ``loss`` (a scalar tensor on the device of
        the gradients) is none, on all ranks alike, everything keeps its bits. The host waits for nothing on a GPU, so
        it does not know whether this was an update until the two are read: see :meth:`settle`.
        """
        self.settle()
        norm = self.buffers.gradient_norm()
        factor = torch.ones_like(norm)
        if self.scale is not None:
            factor /= self.scale.value
            norm = norm * factor
        if self.options.clip_grad > 0:
            factor *= (self.options.clip_grad / (norm + 1e-6)).clamp(max=1.0)
        finite = torch.isfinite(norm) if loss is None else torch.isfinite(norm) & torch.isfinite(loss)
        self.update(learning_rate, torch.where(finite, factor, torch.nan))
        self._unsettled = finite
        self.buffers.publish()
        return norm

    def settle(self, finite: bool | None = None) -> None:
        """Count the last step if it was an update, and let the loss scale follow it; once, however often it is called.

        ``finite``: whether its figures are numbers, from who has read them; None: it is read here, and waited for.
        """
        if self._unsettled is None:
            return
        if finite is None:
            finite = bool(self._unsettled)
        self._unsettled = None
        self._updates += finite
        if self.scale is not None:
            self.scale.update(finite)

    def update(self, learning_rate: float, factor: Tensor) -> None:
        """Update the masters of this rank's shards with ``factor`` times the gradients (a scalar tensor).

        Where ``factor`` is no number, which is known where it lies, everything keeps its bits.
        """
        found_inf = (~torch.isfinite(factor)).float()
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
                step=int(self._updates) + 1,
                gradient_scale=factor.to(device),
                found_inf=found_inf.to(device),
                narrow=bucket.narrow,
                backend=self.backend,
            )

    def reset(self) -> None:
        """Forget the moments: a branch with ``--branch-optimizer reset`` starts so. The loss scale starts anew too."""
        self._unsettled = None
        self._updates.zero_()
        for moment in (*self.exp_avg, *self.exp_avg_sq):
            moment.zero_()
        if self.scale is not None:
            self.scale.reset()

    @property
    def moments(self) -> dict[str, list[Tensor]]:
        """The state that is laid out like the buckets' shards."""
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}

    def named_counts(self) -> Iterator[tuple[str, Tensor]]:
        """("updates", count), and with a loss scale what that keeps: live scalars."""
        yield "updates", self.updates
        if self.scale is not None:
            yield from self.scale.named_state()

    def named_state(self) -> Iterator[tuple[str, Tensor]]:
        """:meth:`named_counts`, then ("exp_avg.NAME" or "exp_avg_sq.NAME", view) for every parameter NAME.

        The views are global ones (:meth:`FlatBuffers.named`).
        """
        yield from self.named_counts()
        for kind, moments in self.moments.items():
            for name, view in self.buffers.named(moments):
                yield f"{kind}.{name}", view


def _moment(master: Tensor, kept_as: MomentType) -> Tensor:
    """Zeros beside ``master``; "fp32" is the type of the masters, which in a model of fp64 is that."""
    return torch.zeros_like(master, dtype=torch.bfloat16 if kept_as == "bf16" else None)
