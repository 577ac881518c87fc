"""What every rank of a job would hold and send, without any of them: each kind of rank is traced for one micro-batch.

Ranks with the same pipeline and context coordinate are alike. Their stages are the same; every cut over
tensor-parallel ranks is into equal pieces (what cannot be cut so is refused), and replicas own shards of equal length
(buckets are filled up to a multiple of them). The context coordinate tells how much of a sequence a rank attends to.
Pipeline ranks whose stages have the same shape share a trace; the schedule tells them apart.

A step's peak is found by playing the schedule's order through: what earlier passes keep, and beside it the most that
the running one takes. ``torch.distributed.pipelining`` (2.13) holds a buffer for every micro-batch of a step and every
stage's input and its output's gradient, and those sends that it does not wait for until the step ends.
"""

from collections import Counter
from collections.abc import Hashable
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from megalrps.model.stage_cut import stage_costs
from megalrps.parallel.layout import DIMENSIONS, Coordinates
from megalrps.parallel.schedule import Action, Schedule, Timeline
from megalrps.training.assemble import exchanged
from megalrps.training.prepare import Job
from megalrps.training.rank_trace import PassCost, RankTrace, trace_rank

_ALONE = (Action("F", 0, 0), Action("B", 0, 0))
"""The order of a model in one piece: the next micro-batch finds what this one found."""


@dataclass(frozen=True)
class RankBytes:
    """The most bytes that a rank holds at once, by what they are.

    parameters: what the passes compute with. gradients: sums and, where sharded, the shard of its own. optimizer: the
    moments, and the masters where parameters are narrower. activations: what passes keep for later ones, operands of
    deferred weight products too. exchange: buffers of the pipeline, and what is being sent. transient: what the pass at
    the peak takes beside all this, and the batch.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    exchange: int
    transient: int

    @property
    def total(self) -> int:
        """All of it together."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class RankReport:
    """One rank: where it stands, what it holds, and the bytes it sends in a step along each dimension, by name.

    ``host``: what ``--optimizer-cpu-offload`` and ``--async-save`` keep in the host's memory, beside ``bytes``.
    """

    rank: int
    coordinates: Coordinates
    parameters: int
    bytes: RankBytes
    host: int
    sent: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """An element of ``ranks``."""
        return {
            "rank": self.rank,
            "coordinates": asdict(self.coordinates),
            "parameters": self.parameters,
            "bytes_total": self.bytes.total,
            "bytes": asdict(self.bytes),
            "host_bytes": self.host,
            "bytes_sent_per_step": self.sent,
        }


def kinds_of_ranks(job: Job) -> tuple[RankReport, ...]:
    """The first rank of each kind, in the order of ranks."""
    layout = job.layout
    traces: dict[Hashable, RankTrace] = {}
    reports = []
    for place in (Coordinates(pp, 0, cp, 0) for pp in range(layout.pp) for cp in range(layout.cp)):
        rank, shape = layout.rank(place), _shape(job, place)
        if shape not in traces:
            traces[shape] = trace_rank(job, rank)
        reports.append(report_rank(job, rank, traces[shape]))
    return tuple(reports)


def report_ranks(job: Job) -> tuple[RankReport, ...]:
    """Every rank of the job's layout, in order; each kind is traced once."""
    kinds = {(kind.coordinates.pp, kind.coordinates.cp): kind for kind in kinds_of_ranks(job)}
    places = [job.layout.coordinates(rank) for rank in range(job.layout.world_size)]
    return tuple(replace(kinds[each.pp, each.cp], rank=rank, coordinates=each) for rank, each in enumerate(places))


def report_rank(job: Job, rank: int, trace: RankTrace | None = None) -> RankReport:
    """``rank`` of the job's layout; ``trace`` is one of its shape, or None to trace it now."""
    place = job.layout.coordinates(rank)
    trace = trace_rank(job, rank) if trace is None else trace
    pipeline = _Pipeline(job, place.pp)
    peak = pipeline.peak(trace)
    update = _Peak(0, pipeline.buffers, trace.update)
    most = max(peak, update, key=sum)
    held = RankBytes(
        parameters=trace.parameters,
        gradients=trace.gradients,
        optimizer=trace.optimizer,
        activations=most.activations,
        exchange=most.exchange,
        transient=most.transient + trace.other + _batch_bytes(job),
    )
    return RankReport(rank, place, trace.elements, held, trace.host, _sent(job, trace, pipeline))


def _shape(job: Job, place: Coordinates) -> Hashable:
    """All that a trace depends on: pipeline ranks in the middle often hold as many layers and nothing else."""
    where = (0,) if job.schedule is None else job.schedule.stage_ranks
    held = [(index, stage) for index, stage in enumerate(job.stages) if where[index] == place.pp]
    last = len(job.stages) - 1
    stages = tuple((len(stage.layers), stage.has_embedding, stage.has_head, i == 0, i == last) for i, stage in held)
    return stages, place.cp


def timeline(job: Job) -> Timeline | None:
    """The job's schedule played through with what its stages cost in FLOPs; None for a model in one piece."""
    if job.schedule is None:
        return None
    costs = costs_of_stages(job)
    return job.schedule.timeline(stage_factors=[cost / max(costs) for cost in costs])


def costs_of_stages(job: Job) -> list[float]:
    """FLOPs of each stage's forward pass for one token."""
    layer, head = stage_costs(job.model, job.config.data.seq_length)
    return [len(stage.layers) * layer + (head if stage.has_head else 0.0) for stage in job.stages]


class _Peak(NamedTuple):
    activations: int
    exchange: int
    transient: int


class _Pipeline:
    """A pipeline rank's part of the schedule: its order of passes, and what goes between it and other ranks."""

    def __init__(self, job: Job, rank: int) -> None:
        schedule = job.schedule
        self._order = _ALONE if schedule is None else schedule.orders[rank]
        self._where = (rank,) if schedule is None else schedule.stage_ranks
        self._rank = rank
        self._waits = _waits(schedule)
        stream = exchanged(job)
        self._message = stream.dtype.itemsize
        for size in stream.shape:
            self._message *= size
        mine = [stage for stage, where in enumerate(self._where) if where == rank]
        edges = sum(stage > 0 for stage in mine) + sum(stage < len(self._where) - 1 for stage in mine)
        self.buffers = 0 if schedule is None else edges * schedule.micro_batches * self._message

    @property
    def sent(self) -> int:
        """Bytes that the rank sends to others in a step: outputs on, gradients back."""
        return self._message * sum(self._leaves(action) for action in self._order)

    def peak(self, trace: RankTrace) -> _Peak:
        """The fullest moment of the passes of a step."""
        kept, sends = 0, 0
        fullest = _Peak(0, self.buffers, 0)
        for action in self._order:
            cost, exchange = self._cost(trace, action), self.buffers + sends
            most = kept + cost.peak
            left = kept + cost.kept + self._kept_elsewhere(action)
            lasting = max(kept, left)
            fullest = max(fullest, _Peak(lasting, exchange, max(0, most - lasting)), key=sum)
            kept, sends = left, sends + self._held_send(action, sends)
        return max(fullest, _Peak(kept, self.buffers + sends, 0), key=sum)

    def _cost(self, trace: RankTrace, action: Action) -> PassCost:
        stage = trace.stages[self._where[: action.stage].count(self._rank)]
        costs = {"F": stage.forward, "B": stage.backward, "I": stage.input_backward, "W": stage.weight_backward}
        return costs[action.kind]

    def _kept_elsewhere(self, action: Action) -> int:
        """An output for a stage on this same rank takes the place of that one's buffer, and stays there."""
        if not self._neighbour(action.stage + 1, here=True):
            return 0
        return {"F": -self._message, "B": self._message, "I": self._message, "W": 0}[action.kind]

    def _leaves(self, action: Action) -> bool:
        """Whether the action's result goes to another rank."""
        if action.kind == "F":
            return self._neighbour(action.stage + 1, here=False)
        return action.kind in "BI" and self._neighbour(action.stage - 1, here=False)

    def _held_send(self, action: Action, sends: int) -> int:
        """Bytes that sends keep after a backward pass: its gradient, and the output, until then an activation."""
        if action.kind not in "BI":
            return 0
        output, gradient = (self._neighbour(action.stage + step, here=False) for step in (1, -1))
        if self._waits == "next":
            return self._message * (output + gradient) if sends == 0 else 0
        return self._message * (gradient + (output and self._waits == "end"))

    def _neighbour(self, stage: int, *, here: bool) -> bool:
        return 0 <= stage < len(self._where) and (self._where[stage] == self._rank) == here


def _waits(schedule: Schedule | None) -> str:
    """Until when torch's schedule classes hold what they send."""
    if schedule is None or schedule.name == "1f1b":
        return "next"  # the last one of each direction
    return "gradients at the end" if schedule.name == "gpipe" else "end"


def _batch_bytes(job: Job) -> int:
    """The tokens of a rank's share of the batch, int64; of documents two int32 a token, of labels that count a bool."""
    data, samples = job.config.data, job.config.training.global_batch_size // job.layout.dp
    told = 8 * data.knows_documents + data.masks_labels
    return samples * (8 * (data.seq_length + 1) + told * data.seq_length)


def _sent(job: Job, trace: RankTrace, pipeline: _Pipeline) -> dict[str, int]:
    samples = job.config.training.global_batch_size // job.layout.dp
    total = Counter({name: sent * (samples // job.micro_batch_size) for name, sent in trace.sent_by_pass.items()})
    total += trace.sent_once
    total["pp"] += pipeline.sent
    return {name: total[name] for name in DIMENSIONS}
