"""From options to a job: data opened, vocabulary found, plan built, everything checked before anything is spent."""

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from megalrps.config import Config
from megalrps.data.increment import OpenIncrement, open_increment
from megalrps.data.stream import SampleStream, sequential_windows
from megalrps.data.tokenizer import load_tokenizer
from megalrps.errors import InputError
from megalrps.model.config import ModelConfig, with_vocabulary
from megalrps.model.sharding import check_tensor_parallel
from megalrps.model.stage_cut import cut_model
from megalrps.parallel.layout import Layout
from megalrps.parallel.schedule import Schedule, check_stages, make_schedule
from megalrps.parallel.stages import Stage
from megalrps.paths.paradigms import build_plan
from megalrps.paths.plan import Increment, Plan
from megalrps.training.batching import micro_batch_size


@dataclass(frozen=True)
class Job:
    """A checked job: what will be trained, on what, in which order. Building one reads indices, never weights."""

    config: Config
    model: ModelConfig
    plan: Plan
    increments: tuple[OpenIncrement, ...]
    held_out: tuple[OpenIncrement, ...]
    layout: Layout
    stages: tuple[Stage, ...]
    schedule: Schedule | None
    """Of the pipeline's stages; None where there is one stage."""
    micro_batch_size: int
    """Samples of one pass on one rank."""

    def stream(self, names: tuple[str, ...]) -> SampleStream:
        """The sample stream over the union of the named increments."""
        chosen = [increment for increment in self.increments if increment.manifest.name in names]
        return SampleStream(chosen, self.config.data.seq_length, self.config.training.seed)

    def resolved(self) -> dict[str, Any]:
        """All options by section with the model's vocabulary filled in: what a checkpoint records."""
        return {**self.config.to_json(), "model": asdict(self.model)}

    def data_fingerprints(self) -> dict[str, str]:
        """Content fingerprint of each increment, by its name."""
        return {each.manifest.name: each.manifest.fingerprint for each in self.increments}

    def consumed(self, path: str, step: int) -> dict[str, int]:
        """Samples that the trajectory of ``path`` has drawn up to ``step``, by increment, repeats included."""
        counts: Counter[str] = Counter()
        while step > 0:
            window = self.plan.window_at(path, step)
            drawn = (step - window.start) * self.config.training.global_batch_size
            counts.update(self.stream(window.increments).consumed(drawn))
            step = window.start
        return dict(counts)


def prepare(config: Config, world_size: int) -> Job:
    """Open the data, build the plan and check every option; raises InputError naming the flag or file and the mend."""
    config.check(world_size)
    increments = tuple(open_increment(prefix) for prefix in config.data.increments)
    held_out = tuple(open_increment(prefix) for prefix in config.data.valid_data_path)
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
    for names in {window.increments for path in job.plan.paths for window in path.windows}:
        job.stream(names)
    for part in job.held_out:
        sequential_windows(part, job.config.data.seq_length)
        if part.manifest.text_bytes < 1:
            raise InputError(
                f"--valid-data-path: {part.dataset.prefix} does not say how many bytes of text it is, which bits "
                "per byte are counted on: preprocess it again, or adopt it with --text-bytes"
            )


def _check_names(increments: tuple[OpenIncrement, ...], held_out: tuple[OpenIncrement, ...]) -> None:
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
        if part.manifest.bin_digest in {each.manifest.bin_digest for each in increments}:
            raise InputError(
                f"--valid-data-path: {part.dataset.prefix} holds the tokens of an increment that is trained on: "
                "name its held-out part"
            )


def _common_vocabulary(config: Config, datasets: tuple[OpenIncrement, ...]) -> int:
    """Ids of the one tokenizer that made every dataset."""
    first = datasets[0]
    for other in datasets[1:]:
        if other.manifest.tokenizer != first.manifest.tokenizer:
            raise InputError(
                f"{other.dataset.prefix} was made with another tokenizer than {first.dataset.prefix} "
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
                f"that {first.dataset.prefix} was made with ({first.manifest.tokenizer.vocab_size} ids): name that "
                "one, or preprocess the increments again"
            )
    return first.manifest.tokenizer.vocab_size


def _identity(data: OpenIncrement) -> str:
    tokenizer = data.manifest.tokenizer
    return f"{tokenizer.kind} {tokenizer.fingerprint[:8]}, {tokenizer.vocab_size} ids, end of document {tokenizer.eod}"


def _planned_increments(config: Config, increments: tuple[OpenIncrement, ...]) -> tuple[Increment, ...]:
    """Name and steps of each increment: --increment-steps where given, else one pass over its samples."""
    given = config.plan.increment_steps
    if given and len(given) != len(increments):
        raise InputError(
            f"--increment-steps holds {len(given)} numbers for {len(increments)} increments: give one each, or none "
            "for one pass over each"
        )
    return tuple(
        Increment(increment.manifest.name, given[place] if given else _steps_of_one_pass(config, increment))
        for place, increment in enumerate(increments)
    )


def _steps_of_one_pass(config: Config, increment: OpenIncrement) -> int:
    stream = SampleStream([increment], config.data.seq_length, config.training.seed)
    steps = stream.samples_per_epoch // config.training.global_batch_size
    if steps < 1:
        raise InputError(
            f"{increment.dataset.prefix} holds {stream.samples_per_epoch} samples of {config.data.seq_length} tokens, "
            f"less than one --global-batch-size {config.training.global_batch_size}: lower one or add data"
        )
    return steps
