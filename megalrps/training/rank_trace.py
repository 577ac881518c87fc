"""One rank of a job, built and run for one micro-batch without memory: what each of its passes allocates and sends.

The process group is torch's fake one, of any size, whose collectives return at once; tensors are torch's fake ones,
which have shapes and types and no data. So this is the code that trains, layer by layer, on a machine that could never
hold it.

What is seen of our kernels are their operations, which take no memory within themselves on a GPU; a CPU's references
do. Attention is traced as torch's of the CPU, whatever computes it: a fused one of another device keeps its log-sum-exp
in another shape. Unless the job runs on a CPU, attention to a longer past, or within documents, is traced as a fused
kernel does it, which needs no mask.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megalrps.kernels import attention
from megalrps.kernels.documents import Documents
from megalrps.parallel.bucket import Bucket
from megalrps.parallel.group import Group
from megalrps.parallel.mesh import Mesh
from megalrps.parallel.ordered_sums import most_sums
from megalrps.training.assemble import assemble, exchanged, job_mesh
from megalrps.training.prepare import Job
from megalrps.training.state import TrainState
from megalrps.training.storage_tracker import StorageTracker, TrafficCounter, replaced


class PassCost(NamedTuple):
    """Bytes: what a pass leaves alive beyond what it found (less than 0: what it frees), and its most on the way."""

    kept: int
    peak: int


@dataclass(frozen=True)
class StageTrace:
    """The passes of one micro-batch through one stage.

    ``input_backward`` is the whole backward pass but for the weight products that the schedule defers, which are
    ``weight_backward``. What is received is not counted in them, nor the gradient that is sent on once it is there.
    """

    forward: PassCost
    input_backward: PassCost
    weight_backward: PassCost

    @property
    def backward(self) -> PassCost:
        """Both parts in one go."""
        first, second = self.input_backward, self.weight_backward
        return PassCost(first.kept + second.kept, max(first.peak, first.kept + second.peak))


@dataclass(frozen=True)
class RankTrace:
    """A rank: bytes that it always holds, the passes of its stages in order, and bytes that it sends by dimension.

    ``host`` are the bytes of ``--optimizer-cpu-offload`` and ``--async-save``, which its device does not hold.
    ``update`` is the most that the end of a step, from the last sums to the gathering of parameters, takes beside what
    is always there (the kernel of AdamW takes nothing). ``sent_by_pass`` are those of one micro-batch, ``sent_once``
    those of a step beside them.
    """

    elements: int
    parameters: int
    gradients: int
    optimizer: int
    host: int
    other: int
    stages: tuple[StageTrace, ...]
    update: int
    sent_by_pass: Counter[str]
    sent_once: Counter[str]


def trace_rank(job: Job, rank: int) -> RankTrace:
    """Build and run ``rank`` of the job's layout. The process must be in no process group."""
    if job.schedule is not None:
        import_module("torch.distributed.pipelining")  # what it makes when first imported is none of the rank's
    with _fake_launch(job.layout.world_size, rank) as everyone:
        mesh = job_mesh(job, everyone)
        mask = lower_right_mask if job.config.runtime.device == "cpu" else _no_mask
        with (
            replaced(attention, "causal_lower_right", mask),
            FakeTensorMode(),
            StorageTracker() as tracker,
        ):
            state = assemble(_traceable(job), mesh)
            return _traced(job, mesh, state, tracker)


@contextmanager
def _fake_launch(world_size: int, rank: int) -> Iterator[Group]:
    from torch.testing._internal.distributed.fake_pg import FakeStore  # it registers the backend

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield Group(rank, world_size, torch.device("cpu"), dist.group.WORLD if world_size > 1 else None)
    finally:
        dist.destroy_process_group()


def lower_right_mask(queries: int, keys: int) -> Tensor:
    """The mask that a CPU makes for the last ``queries`` of ``keys`` positions; torch's own makes no fake tensor."""
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


def _traceable(job: Job) -> Job:
    """The job with an attention that fake tensors of a CPU can have; the fused ones all keep the same."""
    config = job.config
    if config.kernels.attention_backend == "reference":
        return job
    kernels = replace(config.kernels, attention_backend="auto")
    masked = config.data.reset_attention_mask and config.runtime.device == "cpu"
    return replace(job, config=replace(config, kernels=kernels, data=replace(config.data, reset_attention_mask=masked)))


def _no_mask(queries: int, keys: int) -> None:
    """What other devices make: their fused kernels are told which positions there are."""


def _traced(job: Job, mesh: Mesh, state: TrainState, tracker: StorageTracker) -> RankTrace:
    buffers, moments = state.buffers, (*state.optimizer.exp_avg, *state.optimizer.exp_avg_sq)
    offload, frees = job.config.parallel.optimizer_cpu_offload, buffers.sharding == "optim_grads"
    computed = [bucket.parameters for bucket in buffers.buckets]
    gradients = [each for bucket in buffers.buckets for each in (bucket.gradients, bucket.gradient_shard)]
    masters = [bucket.master for bucket in buffers.buckets]
    parameter_bytes, optimizer_bytes = _bytes(computed), _bytes([*computed, *masters, *moments]) - _bytes(computed)
    other = tracker.alive - parameter_bytes - optimizer_bytes - _bytes(gradients)
    # What a single pass takes for gradients and gives up again it takes once activations have begun to go: it is
    # counted with the pass. Of several passes, a bucket may still be leaving while the next one fills up.
    single = job.schedule is None and job.config.training.global_batch_size == job.layout.dp * job.micro_batch_size
    tracker.set_apart(each for each in gradients if each.untyped_storage().size() or not single)

    label = traffic_labels(mesh, buffers.buckets)
    buffers.begin(1)
    with TrafficCounter(label) as passes:
        stages = tuple(_traced_stage(job, state, index, tracker) for index in sorted(state.engine.stages))
        buffers.end_micro_batch()
    before = tracker.mark()
    with TrafficCounter(label) as once:
        buffers.finish_gradients()
        buffers.gradient_norm()
        buffers.publish()
        buffers.wait_parameters()
    passed = job.config.training.global_batch_size // job.layout.dp // job.micro_batch_size
    kept = most_sums(passed) * _bytes([bucket.gradients for bucket in buffers.buckets]) if buffers.in_order else 0
    by_pass = Counter({name: sent for name, sent in passes.sent.items() if name != "dp" or frees})
    return RankTrace(
        elements=sum(piece.shape.numel() for bucket in buffers.buckets for piece in bucket.slices),
        parameters=parameter_bytes,
        gradients=tracker.peak_apart + kept,
        optimizer=0 if offload else optimizer_bytes,
        host=(offload + job.config.checkpoint.async_save) * sum(each.nbytes for each in (*masters, *moments)),
        other=other,
        stages=stages,
        update=tracker.peak - before,
        sent_by_pass=by_pass,
        sent_once=passes.sent - by_pass + once.sent,
    )


def _bytes(tensors: list[Tensor]) -> int:
    """Of the memory of ``tensors``, each piece of it once."""
    return sum({each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in tensors}.values())


def traffic_labels(mesh: Mesh, buckets: tuple[Bucket, ...]) -> Callable[[str, Tensor], str]:
    """Which dimension a transfer goes along.

    Parameters and gradients go along ``dp`` also where context-parallel ranks are the only replicas.
    """
    groups = [("pp", mesh.ends), ("pp", mesh.pipeline), ("dp", mesh.replicas), ("dp", mesh.data), ("cp", mesh.context)]
    groups += [("tp", group) for group in (mesh.tensor, *mesh.holders.values())]
    names: dict[str, str] = {
        group.group.group_name: name for name, group in groups if group is not None and group.group is not None
    }
    of_replicas = None if mesh.replicas.group is None else mesh.replicas.group.group_name
    flat = {each.untyped_storage()._cdata for bucket in buckets for each in (bucket.parameters, bucket.gradients)}

    def label(group: str, tensor: Tensor) -> str:
        if group == of_replicas and tensor.untyped_storage()._cdata in flat:
            return "dp"
        return names[group]

    return label


def _traced_stage(job: Job, state: TrainState, index: int, tracker: StorageTracker) -> StageTrace:
    engine, queue = state.engine, state.buffers.queue
    last = index == len(job.stages) - 1
    length = job.config.data.seq_length // job.layout.cp
    tokens_BS = torch.zeros(job.micro_batch_size, length, dtype=torch.int64)
    stream = exchanged(job)
    inputs = tokens_BS if index == 0 else torch.empty(stream.shape, dtype=stream.dtype, requires_grad=True)
    gradient = None if last else torch.empty(stream.shape, dtype=stream.dtype)
    documents = None
    if job.config.data.knows_documents:
        documents = Documents(*torch.zeros(2, job.micro_batch_size, length, dtype=torch.int32).unbind())

    start = tracker.mark()
    output = engine.passes[index](inputs, documents)
    target = engine.share_of_loss(output, tokens_BS) if last else output
    forward = PassCost(tracker.alive - start, tracker.peak - start)
    if job.schedule is None:
        del output  # a pipeline holds it until the end of the backward pass

    start = tracker.mark()
    torch.autograd.backward(target, gradient)
    output = target = None
    inputs.grad = None
    products = queue.take()
    input_backward = PassCost(tracker.alive - start, tracker.peak - start)

    start = tracker.mark()
    products()
    weight_backward = PassCost(tracker.alive - start, tracker.peak - start)
    return StageTrace(forward, input_backward, weight_backward)
