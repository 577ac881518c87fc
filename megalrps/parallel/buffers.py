"""Flat buffers: every parameter and gradient is a view into a bucket of its like, and so are masters and moments.

Parameters are alike that share a weight decay, a type and the ranks that hold them. Buckets make the sum over replicas
one collective each, the global norm one reduction and the optimizer one kernel, whatever the number of parameters;
and a replica may own a part of them: nothing (``no_shard``), masters and moments (``optim``: ZeRO-1), or gradients too
(``optim_grads``: ZeRO-2; Rajbhandari et al. 2019, arXiv 1910.02054, section 5).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from megalrps.kernels.norm import sum_of_squares
from megalrps.parallel.bucket import Bucket, Kind, Slice, cut_into_buckets, fill, kind_of, make_bucket
from megalrps.parallel.collectives import start_stack
from megalrps.parallel.gradient_sums import GradientSums
from megalrps.parallel.main_gradient import MainGradient, ProductQueue, set_main_gradient
from megalrps.parallel.mesh import Mesh, alone
from megalrps.parallel.ordered_sums import OrderedSums
from megalrps.parallel.parameter_gathers import ParameterGathers
from megalrps.parallel.placement import WHOLE, Placement
from megalrps.parallel.shard_view import ShardView

Sharding = Literal["no_shard", "optim", "optim_grads"]


def decays_matrices(name: str, parameter: Tensor) -> bool:
    """The field's rule: weight decay for matrices, none for norms and biases (1-D parameters)."""
    return parameter.dim() >= 2


def narrows_maps(name: str, parameter: Tensor) -> bool:
    """Matrices are held in the type they compute in; tables and norms, which are read in fp32, are not."""
    return parameter.dim() == 2 and name != "embedding.weight"


class FlatBuffers:
    """Moves a module's parameters and gradients into buckets and keeps the module working on the views.

    Parameters keep their names, shapes and values (to the rounding of ``compute_dtype``). Each has a
    :class:`megalrps.parallel.main_gradient.MainGradient`; what autograd gives beside it is added too, by way of
    ``parameter.grad``, which is None where the parameter is narrower than its gradient. A parameter shared by two
    modules (a tied head) is held once.

    ``module`` names its parameters as the model does, in the order of the forward pass. ``placements`` says which part
    of each parameter of the model the module holds, by name, on ``mesh``; without, it holds all of every one.
    ``compute_dtype`` is the type of those that ``narrows``; their masters keep the type that they were built in.
    ``bucket_size`` is in elements. ``uses``: how often a parameter contributes in a micro-batch, where it is not once.
    ``offload`` keeps masters, and the optimizer's state with them, on the host. ``in_order``: gradients add up in an
    order that does not depend on the number of replicas, a power of two (:mod:`megalrps.parallel.ordered_sums`): the
    end of each micro-batch has to be told then, and gradients are not sharded.
    """

    def __init__(
        self,
        module: nn.Module,
        decays: Callable[[str, Tensor], bool] = decays_matrices,
        *,
        mesh: Mesh | None = None,
        placements: Mapping[str, Placement] | None = None,
        compute_dtype: torch.dtype | None = None,
        narrows: Callable[[str, Tensor], bool] = narrows_maps,
        sharding: Sharding = "optim",
        bucket_size: int = 40_000_000,
        overlap_grad_reduce: bool = True,
        overlap_param_gather: bool = True,
        shared_with_ends: frozenset[str] = frozenset(),
        uses: Mapping[str, int] | None = None,
        offload: bool = False,
        in_order: bool = False,
    ) -> None:
        named = [(name, each) for name, each in module.named_parameters() if each.requires_grad]
        self._mesh = mesh or alone(named[0][1].device if named else torch.device("cpu"))
        self.placements: Mapping[str, Placement] = placements or {}
        self.queue = ProductQueue()
        replicas = self._mesh.replicas
        self.sharding: Sharding = sharding if replicas.size > 1 else "no_shard"
        kinds = {
            name: kind_of(
                name,
                each,
                self._placement(name),
                decays=decays(name, each),
                narrow=compute_dtype if narrows(name, each) else None,
                shared=name in shared_with_ends,
            )
            for name, each in named
        }
        cut = cut_into_buckets(named, kinds, bucket_size)
        self.buckets = tuple(self._bucket(kind, members, offload) for kind, members in cut)
        self.in_order = in_order
        frees = self.sharding == "optim_grads"
        assert not (in_order and frees), "options.py refuses it"
        self._sums: GradientSums | OrderedSums = (
            OrderedSums(self.buckets, replicas)
            if in_order
            else GradientSums(
                self.buckets, replicas, frees=frees, overlap=overlap_grad_reduce, uses=Counter(uses or {})
            )
        )
        self._gathers = ParameterGathers(module, self.buckets, replicas, overlap=overlap_param_gather)
        for index, (bucket, (_, members)) in enumerate(zip(self.buckets, cut, strict=True)):
            for member, (_, parameter) in enumerate(members):
                self._watch(index, member, parameter, bucket.gradient_views[member])
        self._where = {piece.name: (bucket, piece) for bucket in self.buckets for piece in bucket.slices}

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the parameters held, in no order that matters."""
        return tuple(self._where)

    def begin(self, micro_batches: int) -> None:
        """Set every gradient to zero and expect the contributions of ``micro_batches`` passes."""
        self._sums.begin(micro_batches)

    def end_micro_batch(self) -> None:
        """All that one micro-batch adds to gradients has been added; of no effect but where they add up in order."""
        if isinstance(self._sums, OrderedSums):
            self._sums.end_micro_batch()

    def finish_gradients(self) -> None:
        """Leave the sums over all that compute a part of a gradient in the buckets' ``gradient_shard``.

        Replicas, and holders and ends of a parameter. Nothing has to leave the queue of products any more.
        """
        assert not len(self.queue), "weight products were put aside and never done"
        self._sums.finish()

    def gradient_norm(self) -> Tensor:
        """The L2 norm of all gradients of the model, a scalar tensor on their device, the same bits on every rank.

        What several ranks hold is counted once: each of n holders adds 1 / n of its square. No number where any rank's
        is none. Squares add up in fp64, in the order of ranks: a sum by the network may come in another on each rank.
        Where gradients add up in order, so do squares: parameter by parameter, of which every replica has all.
        """
        total = torch.stack(self._squares_in_order() if self.in_order else self._squares()).sum()
        mesh, whole = self._mesh, self.in_order or self.sharding == "no_shard"
        for group in (mesh.tensor, mesh.pipeline, *([] if whole else [mesh.replicas])):
            if group.size > 1:
                total = start_stack(total.view(1), group).wait().sum()
        return total.sqrt().to(self.buckets[0].gradient_shard.dtype)

    def named(self, flats: Iterable[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor of the global shape) of every parameter, over tensors laid out like each bucket's shard.

        On the same memory, for a checkpoint, which knows no ranks: a plain tensor where this rank holds all of it, else
        a :class:`megalrps.parallel.shard_view.ShardView`.
        """
        for bucket, flat in zip(self.buckets, flats, strict=True):
            for piece, start, run in bucket.runs(flat):
                yield piece.name, self._as_global(piece, start, run)

    def named_masters(self) -> Iterator[tuple[str, Tensor]]:
        """What this rank holds of every parameter in full precision; see :meth:`named`."""
        return self.named(bucket.master for bucket in self.buckets)

    def named_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """What this rank holds of every gradient, once :meth:`finish_gradients` has summed them; see :meth:`named`."""
        return self.named(bucket.gradient_shard for bucket in self.buckets)

    def holds(self, name: str) -> bool:
        """Whether any element of the parameter's master lies in this rank's shard."""
        bucket, piece = self._where[name]
        return piece.offset < bucket.shard.stop and piece.offset + piece.shape.numel() > bucket.shard.start

    @torch.no_grad()
    def assign(self, name: str, value: Tensor) -> None:
        """Set the master of the parameter to ``value``, this rank's part of the model's; :meth:`refresh` does the rest.

        ``value`` has the shape of the part, and any type and device.
        """
        fill(self._where[name][0], name, value)

    @torch.no_grad()
    def refresh(self) -> None:
        """Make what the module computes with from the masters, on all replicas: after anything was put into those."""
        self.wait_parameters()
        for bucket in self.buckets:
            bucket.settle()
        self._gathers.start()
        self.wait_parameters()

    @torch.no_grad()
    def publish(self) -> None:
        """Begin to make what the module computes with from the masters, which the optimizer has updated.

        What it was to leave in ``Bucket.narrow`` is there.
        """
        for bucket in self.buckets:
            if bucket.narrow is None:
                bucket.settle()
        self._gathers.start()

    def wait_parameters(self) -> None:
        """All that :meth:`publish` began is done."""
        self._gathers.wait_all()

    def _squares(self) -> list[Tensor]:
        return [sum_of_squares(bucket.gradient_shard).double() / bucket.times_held for bucket in self.buckets]

    def _squares_in_order(self) -> list[Tensor]:
        """By name: shards end elsewhere with other replicas, and buckets with another --ddp-bucket-size."""
        squares = {
            piece.name: sum_of_squares(view).double() / bucket.times_held
            for bucket in self.buckets
            for piece, view in zip(bucket.slices, bucket.gradient_views, strict=True)
        }
        return [squares[name] for name in sorted(squares)]

    def _placement(self, name: str) -> Placement:
        return self.placements.get(name, WHOLE)

    def _bucket(self, kind: Kind, members: list[tuple[str, nn.Parameter]], offload: bool) -> Bucket:
        return make_bucket(
            kind,
            members,
            self._mesh.replicas,
            shards=self.sharding != "no_shard",
            separate_gradients=self.sharding == "optim_grads",
            offload=offload,
            holders=self._mesh.sharing(self._placement(members[0][0])),
            ends=self._mesh.ends if kind.shared else None,
        )

    def _as_global(self, piece: Slice, start: int, run: Tensor) -> Tensor:
        placement = self._placement(piece.name)
        if placement.pieces == 1 and run.numel() == piece.shape.numel():
            return run.view(piece.shape)
        return ShardView(run, start, piece.shape, placement)

    def _watch(self, index: int, member: int, parameter: nn.Parameter, gradient: Tensor) -> None:
        """Learn of every contribution to the gradient of ``parameter``, from a map or from autograd."""
        main = MainGradient(gradient, self.queue)
        set_main_gradient(parameter, main)
        narrow = parameter.grad is None
        if self._mesh.replicas.size > 1:
            main.ensure = partial(self._ensure, index)
            main.contributed = partial(self._sums.contributed, index, member)
        elif not narrow:
            return
        # Autograd runs its hooks also for a leaf whose gradient a map has taken; only the first hook is told so.
        given = False

        def before(of_autograd: Tensor | None) -> None:
            nonlocal given
            given = of_autograd is not None
            if given:
                main.ensure()

        def after(leaf: Tensor) -> None:
            if given:
                if narrow and leaf.grad is not None:
                    main.gradient.add_(leaf.grad)
                    leaf.grad = None
                main.contributed()

        parameter.register_hook(before)
        parameter.register_post_accumulate_grad_hook(after)

    def _ensure(self, index: int) -> None:
        self._gathers.check_gathered(index)
        self._sums.ensure(index)
