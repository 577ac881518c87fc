"""From JSON lines to an indexed dataset: what ``tools/preprocess_data.py`` does.

Files and flags are those of Megatron-LM's ``tools/preprocess_data.py``: ``PREFIX_KEY_document.bin`` and ``.idx``, one
sequence for each document, and a document whose text has no tokens is a document without a sequence and without an
end-of-document token. Beside them lie the increment manifest (``.json``) and the record of how they were made.
"""

import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megalrps.data.assembly import Assembly, Tally
from megalrps.data.encode import EncoderSpec, PartEncoder
from megalrps.data.index_writer import locked_partial
from megalrps.data.indexed import IndexedDataset, IndexedDatasetWriter, bin_path, idx_path, manifest_path, token_dtype
from megalrps.data.input_files import FileState, FollowingDigests, check_unchanged, input_states
from megalrps.data.journal import Work, discard_work
from megalrps.data.manifest import (
    IncrementManifest,
    TokenizerIdentity,
    describe_written,
    read_manifest,
    write_manifest,
)
from megalrps.data.parts import PART_BYTES
from megalrps.data.preprocess_options import PreprocessOptions
from megalrps.data.progress import ProgressDisplay
from megalrps.data.recipe import is_ours, read_results, recorded_inputs, write_record
from megalrps.data.text import BadLines, expand_inputs
from megalrps.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_identity
from megalrps.data.workers import Crew, OwnProcess, WorkerProcesses
from megalrps.errors import InputError


@dataclass(frozen=True)
class PreprocessResult:
    """What a run made, or found made."""

    up_to_date: bool
    datasets: dict[Path, IncrementManifest]
    """Manifest of each dataset, by its prefix."""
    results: dict[str, Any]
    """What is recorded beside the datasets: bad lines, documents without tokens, dates."""
    tokenizer: str = ""
    """What tokenized, and why that; empty where nothing was to be done."""
    parts: int = 0
    parts_resumed: int = 0
    """Of these, the parts that an earlier, unfinished run had made."""
    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    """Of this process and its workers."""

    @property
    def bad_lines(self) -> int:
        """Lines skipped."""
        return int(self.results["bad_lines"])

    @property
    def bad_lines_summary(self) -> str:
        """The lines skipped, by what was wrong with them, with the first place of each kind."""
        return str(self.results["bad_lines_summary"])

    @property
    def empty_documents(self) -> dict[str, int]:
        """Documents whose text had no tokens, by key."""
        return dict(self.results["empty_documents"])


def preprocess(options: PreprocessOptions) -> PreprocessResult:
    """Make the datasets that ``options`` describe, unless they are there already.

    Raises InputError, before anything is replaced, for inputs that cannot be used and for a finished output that was
    made differently.
    """
    started = time.monotonic()
    options.check()
    paths = expand_inputs(options.text.input)
    job = _Job(options, paths, input_states(paths), *_load_tokenizer(options))
    manifests = job.find()
    if manifests is not None and not job.work_folder.exists():
        return job.result(manifests, up_to_date=True)
    _prepare_folder(job.work_folder)
    with locked_partial(job.work_folder):
        manifests = job.find()  # what another run may have made while this one came so far
        if manifests is not None:
            discard_work(job.work_folder)  # that run was killed at its very end
            return job.result(manifests, up_to_date=True)
        try:
            tally = job.make()
        except OSError as error:
            error.filename = error.filename or str(job.work_folder)  # a write to a full disk names no file
            raise
        manifests = {key: read_manifest(options.dataset_prefix(key)) for key in options.text.json_keys}
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return job.result(
        manifests,
        up_to_date=False,
        tokenizer=tally.tokenizer,
        parts=tally.parts,
        parts_resumed=tally.parts_resumed,
        wall_seconds=time.monotonic() - started,
        cpu_seconds=sum(each.ru_utime + each.ru_stime for each in usage),
    )


def _load_tokenizer(options: PreprocessOptions) -> tuple[Tokenizer, bool]:
    """The tokenizer that this process will use, and True; where it may well use none, the reference, loaded sooner.

    What a dataset records of them is the same.
    """
    chosen = options.tokenizer
    outputs = [idx_path(options.dataset_prefix(key)) for key in options.text.json_keys]
    is_used = options.work.workers == 1 and not any(path.exists() for path in outputs)
    tokenizer = load_tokenizer(
        chosen.tokenizer_type,
        chosen.tokenizer_model,
        eod_token=chosen.eod_token,
        special_tokens=not chosen.tokenizer_hf_no_include_special_tokens,
        backend=chosen.tokenizer_backend if is_used else "reference",
    )
    return tokenizer, is_used


def _prepare_folder(output: Path) -> None:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{output.parent}: cannot be written ({error.strerror}); choose another output directory"
        ) from error


@dataclass
class _Job:
    """One run of the tool: what it is asked for, and what it is made from."""

    options: PreprocessOptions
    paths: tuple[Path, ...]
    states: tuple[FileState, ...]
    """Of the inputs when the run began."""
    tokenizer: Tokenizer
    tokenizer_is_used: bool
    """False where it is the reference, and says only what a dataset records."""

    @property
    def keys(self) -> tuple[str, ...]:
        return self.options.text.json_keys

    @property
    def identity(self) -> TokenizerIdentity:
        return tokenizer_identity(self.tokenizer)

    @property
    def work_folder(self) -> Path:
        return Path(f"{self.options.dataset_prefix(self.keys[0])}.work")

    def record_path(self, key: str) -> Path:
        return Path(f"{self.options.dataset_prefix(key)}.recipe.json")

    def spec(self) -> EncoderSpec:
        chosen = self.options.tokenizer
        return EncoderSpec(
            tokenizer_type=chosen.tokenizer_type,
            tokenizer_model=str(chosen.tokenizer_model),
            eod_token=chosen.eod_token,
            special_tokens=not chosen.tokenizer_hf_no_include_special_tokens,
            backend=chosen.tokenizer_backend,
            json_keys=self.keys,
            date_key=self.options.text.date_key,
            append_eod=self.options.output.append_eod,
            dtype=token_dtype(self.tokenizer.vocab_size).name,
            stop_at_bad=self.options.text.on_bad_line == "error",
        )

    def recipe(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """All that the datasets and their records depend on, and nothing else."""
        dates = {} if self.options.text.date_key is None else {"date_key": self.options.text.date_key}
        return {
            "tool": "preprocess_data",
            "inputs": inputs,
            "json_keys": list(self.keys),
            **dates,
            "on_bad_line": self.options.text.on_bad_line,
            "tokenizer": asdict(self.identity),
            "special_tokens": not self.options.tokenizer.tokenizer_hf_no_include_special_tokens,
            "append_eod": self.options.output.append_eod,
            "names": [self.options.increment_name(key) for key in self.keys],
        }

    def find(self) -> dict[str, IncrementManifest] | None:
        """Manifests by key if all datasets are there, whole, and made by our recipe; None if they are to be made."""
        prefixes = {key: self.options.dataset_prefix(key) for key in self.keys}
        outputs = {key: [bin_path(prefix), idx_path(prefix)] for key, prefix in prefixes.items()}
        present = [key for key in self.keys if any(path.exists() for path in outputs[key])]
        if not present:
            return None
        records = [record for key in present if (record := self.record_path(key)).exists()]
        inputs = recorded_inputs(records[0], self.paths, self.states) if records else []
        recipe, overwrite = self.recipe(inputs), self.options.output.overwrite
        ours = [is_ours(self.record_path(key), recipe, outputs[key], overwrite) for key in self.keys]
        if not all(ours):
            return None
        try:
            for prefix in prefixes.values():
                IndexedDataset(prefix)
            return {key: read_manifest(prefix) for key, prefix in prefixes.items()}
        except InputError:
            return None  # ours, but unfinished or damaged since: the very same is made again

    def make(self) -> Tally:
        """Make the datasets, their records and manifests."""
        spec, tally = self.spec(), Tally(BadLines(self.options.text.on_bad_line))
        with Work(self.work_folder, self._work_identity(spec)) as work:
            with ExitStack() as stack:
                crew = self._crew(spec, work, stack)
                digests = stack.enter_context(FollowingDigests(self.paths))
                writers = {
                    key: stack.enter_context(
                        IndexedDatasetWriter(self.options.dataset_prefix(key), spec.dtype, overwrite=True)
                    )
                    for key in spec.json_keys
                }
                total_bytes = sum(state[0] for state in self.states)
                log_interval = self.options.work.log_interval
                display = stack.enter_context(ProgressDisplay(sys.stderr, total_bytes, log_interval))
                tally.tokenizer = crew.describe()
                display.say(f"tokenizing with {tally.tokenizer}")
                Assembly(work, writers, tally, display, digests).run(self.paths, crew)
                self._check_not_empty(writers, tally, work)
                recipe = self.recipe(digests.finish())
                check_unchanged(self.paths, self.states)
                # The last moment before the writers put their files in place: from here on the files there are ours.
                for key in spec.json_keys:
                    seal = manifest_path(self.options.dataset_prefix(key))
                    write_record(self.record_path(key), recipe, self._results(tally), seal=seal)
            for key, writer in writers.items():
                self._describe(key, writer, tally)
            work.discard()
        return tally

    def _crew(self, spec: EncoderSpec, work: Work, stack: ExitStack) -> Crew:
        if self.options.work.workers == 1:
            tokenizer = self.tokenizer if self.tokenizer_is_used else None
            return OwnProcess(PartEncoder(spec, work.folder, work.run, tokenizer))
        return stack.enter_context(WorkerProcesses(self.options.work.workers, spec, work.folder, work.run))

    def _work_identity(self, spec: EncoderSpec) -> dict[str, Any]:
        """All that a part's files depend on; parts made before a bad line stopped a run are good when it is skipped."""
        return {
            **asdict(spec),
            "stop_at_bad": None,
            "tokenizer_model": asdict(self.identity),
            "inputs": [[str(path.resolve()), *state] for path, state in zip(self.paths, self.states, strict=True)],
            "part_bytes": PART_BYTES,
        }

    def _check_not_empty(self, writers: Mapping[str, IndexedDatasetWriter], tally: Tally, work: Work) -> None:
        for key, writer in writers.items():
            if writer.token_count == 0:
                work.discard()
                raise InputError(
                    f"--input: its {writer.document_count} documents hold no token under {key!r} "
                    f"({tally.bad_lines.describe()}); check --input and --json-keys"
                )

    def _results(self, tally: Tally) -> dict[str, Any]:
        dates = {"dates": tally.days, "undated_documents": tally.undated}
        return {
            "bad_lines": tally.bad_lines.counts.total(),
            "bad_lines_summary": tally.bad_lines.describe(),
            "empty_documents": {key: tally.empty_documents[key] for key in self.keys},
            **(dates if self.options.text.date_key is not None else {}),
            "input_states": self.states,
        }

    def _describe(self, key: str, writer: IndexedDatasetWriter, tally: Tally) -> None:
        manifest = describe_written(
            writer,
            name=self.options.increment_name(key),
            tokenizer=self.identity,
            text_bytes=tally.text_bytes[key],
            append_eod=self.options.output.append_eod,
            sources=tuple(str(path) for path in self.paths),
        )
        write_manifest(self.options.dataset_prefix(key), manifest)

    def result(self, manifests: dict[str, IncrementManifest], *, up_to_date: bool, **figures: Any) -> PreprocessResult:
        datasets = {self.options.dataset_prefix(key): manifest for key, manifest in manifests.items()}
        return PreprocessResult(up_to_date, datasets, read_results(self.record_path(self.keys[0])), **figures)


def describe_result(result: PreprocessResult) -> Iterator[str]:
    """The lines that tell a person what ``result`` is."""
    for (prefix, manifest), empty in zip(result.datasets.items(), result.empty_documents.values(), strict=True):
        per_byte = manifest.tokens / max(manifest.text_bytes, 1)
        yield f"{prefix}: {'up to date' if result.up_to_date else 'made'}, increment {manifest.name}"
        yield (
            f"  {manifest.documents:,} documents ({empty:,} empty), {manifest.text_bytes:,} bytes of text, "
            f"{manifest.tokens:,} tokens as {manifest.dtype}, {per_byte:.4f} tokens per byte"
        )
    if "dates" in result.results:
        first, last = result.results["dates"] or ("none", "none")
        yield f"  dates {first}..{last}, {result.results['undated_documents']:,} documents without one"
    yield f"  {result.bad_lines_summary}"
    if not result.up_to_date:
        resumed = f", {result.parts_resumed} from an earlier run" if result.parts_resumed else ""
        yield f"  tokenized by {result.tokenizer}"
        yield f"  {result.parts} parts{resumed}; {result.wall_seconds:.1f} s, {result.cpu_seconds:.1f} CPU seconds"
