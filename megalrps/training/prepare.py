"""From options to a job: data opened, vocabulary found, plan built, everything checked before anything is spent."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

from megalrps.checkpoint.record import CheckpointRecord
from megalrps.config import Config
from megalrps.data.apportionment import Apportionment
from megalrps.data.blend import OpenData, is_blend, leaves, open_data, prefix_of
from megalrps.data.blended_stream import BlendedSource, source_over
from megalrps.data.increment import OpenIncrement, open_increment
from megalrps.data.stream import Reading, SampleSource, sequential_windows
from megalrps.data.tokenizer import load_tokenizer
from megalrps.errors import InputError
from megalrps.model.config import ModelConfig, with_vocabulary
from megalrps.model.sharding import check_tensor_parallel
from megalrps.model.stage_cut import cut_model
from megalrps.parallel.layout import Layout
from megalrps.parallel.schedule import Schedule, check_stages, make_schedule
from megalrps.parallel.stages import Stage
from megalrps.paths.options import replay_shares
from megalrps.paths.paradigms import build_plan
from megalrps.paths.plan import Increment, Plan, Replay, Window
from megalrps.training.batching import micro_batch_size


@dataclass(frozen=True)
class Job:
    """A checked job: what will be trained, on what, in which order. Building one reads indices, never weights."""

    config: Config
    model: ModelConfig
    plan: Plan
    increments: tuple[OpenData, ...]
    held_out: tuple[OpenIncrement, ...]
    layout: Layout
    stages: tuple[Stage, ...]
    schedule: Schedule | None
    """Of the pipeline's stages; None where there is one stage."""
    micro_batch_size: int
    """Samples of one pass on one rank."""

    def stream(self, window: Window) -> SampleSource:
        """The samples that ``window`` draws from: its increments', and in their share those that it replays."""
        key = window.increments, window.replay
        if key not in self._sources:
            self._sources[key] = self._source(*key)
        return self._sources[key]

    def union(self, *names: str) -> SampleSource:
        """The samples of the union of the named increments."""
        return self.stream(Window(0, 0, names))

    @cached_property
    def _sources(self) -> dict[tuple[tuple[str, ...], Replay | None], SampleSource]:
        """What has been asked for: a blend's order takes seconds to find where its weights have many digits."""
        return {}

    def _source(self, names: tuple[str, ...], replay: Replay | None) -> SampleSource:
        if replay is not None:
            return BlendedSource([self.union(*names), self.union(*replay.increments)], [1 - replay.share, replay.share])
        chosen = [increment for increment in self.increments if increment.manifest.name in names]
        return _source_over(self.config, chosen)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of how the data were opened, each once."""
        return tuple(dict.fromkeys(note for source in self._sources.values() for note in source.notes))

    def resolved(self) -> dict[str, Any]:
        """All options by section with the model's vocabulary filled in: what a checkpoint records."""
        return {**self.config.to_json(), "model": asdict(self.model)}

    def data_fingerprints(self) -> dict[str, str]:
        """Content fingerprint of each increment, by its name."""
        return {each.manifest.name: each.manifest.fingerprint for each in self.increments}

    def consumed(self, path: str, step: int, records: Iterable[CheckpointRecord] = ()) -> dict[str, int]:
        """Samples that the trajectory of ``path`` has drawn up to ``step``, by increment, repeats included.

        A member of a blend counts as BLEND/MEMBER, and what is replayed under the increment it comes from. Of a union
        drawn in part, every sample has to be looked at; so the count goes on from the newest of the ``records``.
        """
        first, known = self._counted(path, step, list(records))
        counts = Counter(known)
        size = self.config.training.global_batch_size
        while step > first:
            window = self.plan.window_at(path, step)
            begin = max(window.start, first)
            drawn = self.stream(window).consumed((step - window.start) * size, (begin - window.start) * size)
            counts.update(drawn)
            step = begin
        return dict(counts)

    def _counted(self, path: str, step: int, records: list[CheckpointRecord]) -> tuple[int, Mapping[str, int]]:
        """The step of the newest record of the trajectory of ``path`` up to ``step``, and its counts."""
        own = [record for record in records if record.path == path and record.step <= step]
        if own:
            newest = max(own, key=lambda record: record.step)
            return newest.step, newest.samples
        parent = self.plan.path(path).parent
        return self._counted(parent.path, min(step, parent.step), records) if parent else (0, {})


def prepare(config: Config, world_size: int) -> Job:
    """Open the data, build the plan and check every option; raises InputError naming the flag or file and the mend."""
    config.check(world_size)
    cache = config.data.data_cache_path
    increments = tuple(open_data(prefix, cache=cache) for prefix in config.data.increments)
    held_out = tuple(_open_held_out(prefix, cache) for prefix in config.data.valid_data_path)
    _check_names(increments, held_out)
    vocabulary = _common_vocabulary(config, (*increments, *held_out))
    model = with_vocabulary(config.model, vocabulary)
    model.validate()
    layout = config.parallel.layout(world_size)
    check_tensor_parallel(model, layout.tp)
    micro_batch = micro_batch_size(config.training, config.parallel, layout)
    stages, schedule = _pipeline(config, model, layout, micro_batch)
    plan = build_plan(_planned_increments(config, increments), config.plan)
    job = Job(config, model, plan, increments, held_out, layout, stages, schedule, micro_batch)
    _check_every_window(job)
    return job


def _open_held_out(prefix: str, cache: str | None) -> OpenIncrement:
    if is_blend(prefix):
        raise InputError(
            f"--valid-data-path: {prefix} is a blend, and what is measured is one text read in order: preprocess the "
            "held-out texts of its members into one increment, and name that"
        )
    return open_increment(prefix, cache=cache)


def _pipeline(
    config: Config, model: ModelConfig, layout: Layout, micro_batch: int
) -> tuple[tuple[Stage, ...], Schedule | None]:
    """The stages of the model and the schedule that runs them."""
    parallel = config.parallel
    if layout.pp > 1:
        check_stages(parallel.pipeline_schedule, parallel.stages_per_rank)
    count = layout.pp * parallel.stages_per_rank if layout.pp > 1 else 1
    stages = cut_model(
        model, count, sequence_length=config.data.seq_length, layout=parallel.pipeline_model_parallel_layout
    )
    if layout.pp == 1:
        return stages, None
    micro_batches = config.training.global_batch_size // layout.dp // micro_batch
    return stages, make_schedule(parallel.pipeline_schedule, layout.pp, count, micro_batches)


def _check_every_window(job: Job) -> None:
    """Every stream that some step will ask for can be drawn from, and every held-out part predicted: found out now."""
    for window in dict.fromkeys(window for path in job.plan.paths for window in path.windows):
        job.stream(window)
    for part in job.held_out:
        sequential_windows(part, job.config.data.seq_length)
        if part.manifest.text_bytes < 1:
            raise InputError(
                f"--valid-data-path: {part.dataset.prefix} does not say how many bytes of text it is, which bits "
                "per byte are counted on: preprocess it again, or adopt it with --text-bytes"
            )


def _check_names(increments: tuple[OpenData, ...], held_out: tuple[OpenIncrement, ...]) -> None:
    counts = Counter(increment.manifest.name for increment in increments)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        raise InputError(
            f"--increments holds two increments named {twice[0]}: preprocess one of them again with another --name"
        )
    for increment, part in zip(increments, held_out, strict=bool(held_out)):
        if part.manifest.name != increment.manifest.name and part.manifest.name in counts:
            raise InputError(
                f"--valid-data-path: {part.dataset.prefix} is named {part.manifest.name} and stands where the held-out "
                f"part of {increment.manifest.name} is due: name the parts in the order of --increments"
            )
        if part.manifest.bin_digest in {leaf.manifest.bin_digest for each in increments for leaf in leaves(each)}:
            raise InputError(
                f"--valid-data-path: {part.dataset.prefix} holds the tokens of an increment that is trained on: "
                "name its held-out part"
            )


def _common_vocabulary(config: Config, datasets: tuple[OpenData, ...]) -> int:
    """Ids of the one tokenizer that made every dataset."""
    first = datasets[0]
    for other in datasets[1:]:
        if other.manifest.tokenizer != first.manifest.tokenizer:
            raise InputError(
                f"{prefix_of(other)} was made with another tokenizer than {prefix_of(first)} "
                f"({_identity(other)}; {_identity(first)}): "
                "preprocess it again with the tokenizer of the first increment"
            )
    if config.data.tokenizer_model is not None:
        tokenizer = load_tokenizer(
            config.data.tokenizer_type, config.data.tokenizer_model, eod_token=config.data.eod_token
        )
        if tokenizer.fingerprint != first.manifest.tokenizer.fingerprint:
            raise InputError(
                f"--tokenizer-model {config.data.tokenizer_model} ({tokenizer.vocab_size} ids) is not the tokenizer "
                f"that {prefix_of(first)} was made with ({first.manifest.tokenizer.vocab_size} ids): name that "
                "one, or preprocess the increments again"
            )
    return first.manifest.tokenizer.vocab_size


def _identity(data: OpenData) -> str:
    tokenizer = data.manifest.tokenizer
    return f"{tokenizer.kind} {tokenizer.fingerprint[:8]}, {tokenizer.vocab_size} ids, end of document {tokenizer.eod}"


def _source_over(config: Config, data: Sequence[OpenData]) -> SampleSource:
    options = config.data
    reading = Reading(
        documents=options.reset_attention_mask or options.reset_position_ids,
        mask_eod=options.eod_mask_loss,
        pack=options.pack_documents,
        cache=Path(options.data_cache_path) if options.data_cache_path else None,
    )
    return source_over(data, options.seq_length, config.training.seed, reading)


def _planned_increments(config: Config, increments: tuple[OpenData, ...]) -> tuple[Increment, ...]:
    """Name and steps of each increment: --increment-steps where given, else one pass over its samples.

    What is replayed beside them makes a pass longer.
    """
    given = config.plan.increment_steps
    if given and len(given) != len(increments):
        raise InputError(
            f"--increment-steps holds {len(given)} numbers for {len(increments)} increments: give one each, or none "
            "for one pass over each"
        )
    replayed = replay_shares(len(increments), config.plan)
    return tuple(
        Increment(increment.manifest.name, given[place] if given else _steps_of_one_pass(config, increment, share))
        for place, (increment, share) in enumerate(zip(increments, replayed, strict=True))
    )


def _steps_of_one_pass(config: Config, increment: OpenData, replayed: Fraction) -> int:
    """As many updates as draw no sample of the increment twice, the share ``replayed`` of theirs being older ones."""
    own = _source_over(config, [increment]).samples_per_epoch
    samples = Apportionment([1 - replayed, replayed]).longest(0, own) if replayed else own
    steps = samples // config.training.global_batch_size
    if steps < 1:
        raise InputError(
            f"{prefix_of(increment)} holds {own} samples of {config.data.seq_length} tokens, "
            f"less than one --global-batch-size {config.training.global_batch_size}: lower one or add data"
        )
    return steps
