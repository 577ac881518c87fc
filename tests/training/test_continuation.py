"""A new increment lengthens a run; whatever would change what has been trained is refused, and nothing is touched."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_job import (
    TinyData,
    checkpoints,
    command,
    differing,
    files_of,
    launch,
    metrics,
    opened,
    results,
    tensors,
    tokens_of,
    trained,
    world_of_harness,
    write_increment,
)

from megalrps.checkpoint.store import Store
from megalrps.config import parse_config
from megalrps.data.manifest import TokenizerIdentity
from megalrps.errors import InputError
from megalrps.training import loop
from megalrps.training.allowed import OF_DATA
from megalrps.training.decisive import FIXED
from megalrps.training.opening import open_run

OTHER_TOKENIZER = TokenizerIdentity("SentencePieceTokenizer", 64, 2, "1" * 64)


def digests(run: Path) -> dict[str, str]:
    store = Store(run / "checkpoints")
    return {name: store.manifest(name).digest for name in store.names()}


@pytest.mark.parametrize("paradigm", ["lrps", "ptfs", "cpt"])
def test_a_new_increment_lengthens_the_run_as_if_it_had_been_there_from_the_start(
    data: TinyData, tmp_path: Path, paradigm: str
):
    grown, at_once = tmp_path / "grown", tmp_path / "at_once"
    trained(command(data.first(2), grown, "--paradigm", paradigm))
    first_digests, first_metrics = digests(grown), metrics(grown)
    trained(command(data, grown, "--paradigm", paradigm))
    trained(command(data, at_once, "--paradigm", paradigm))
    assert first_digests.items() < digests(grown).items(), "a finished checkpoint was written again"
    assert metrics(grown)[: len(first_metrics)] == first_metrics, "a finished step was made again"
    assert results(grown) == results(at_once)
    for name in checkpoints(at_once):
        assert differing(tensors(grown, name), tensors(at_once, name)) == [], name


def _rank_trains(rank: int, arguments: list[str]) -> None:
    with opened(arguments, world_of_harness()) as run:
        loop.train(run)


def test_what_does_not_decide_the_numbers_may_change(data: TinyData, tmp_path: Path, run_ranks):
    run = tmp_path / "run"
    trained(command(data.first(1), run))
    finished = digests(run)
    flags = ("--micro-batch-size", "2", "--save-interval", "4", "--save-keep", "1", "--log-interval", "5")
    trained(command(data.first(2), run, *flags, "--alpha", "0.6", "0.25"))
    assert {"main-00000012", "main-00000016", "v2-00000018"} <= set(checkpoints(run))
    assert "main-00000008" not in checkpoints(run)
    run_ranks(2, _rank_trains, command(data, run, "--alpha", "0.6", "0.25", "0.6"))
    assert "v3-00000028" in checkpoints(run)
    assert finished.items() <= digests(run).items()
    steps = [(line["path"], line["step"]) for line in metrics(run)]
    assert len(set(steps)) == len(steps) == 39 - 5 + 2


@pytest.fixture(scope="module")
def finished(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run over the first two increments; what is refused must leave it as it is."""
    run = tmp_path_factory.mktemp("finished") / "run"
    with opened(command(data.first(2), run)) as held:
        loop.train(held)
    return run


CHANGES = {
    "lr": (("--lr", "2e-2"), "--lr was 0.01 and is 0.02"),
    "min-lr": (("--min-lr", "2e-3"), "--min-lr was 0.001 and is 0.002"),
    "decay style": (("--lr-decay-style", "knee"), "--lr-decay-style was cosine and is knee"),
    "warm-up": (("--lr-warmup-iters", "1"), "--lr-warmup-iters was unset and is 1"),
    "sequence length": (("--seq-length", "8"), "--seq-length was 16 and is 8"),
    "batch": (("--global-batch-size", "4"), "--global-batch-size was 8 and is 4"),
    "seed": (("--seed", "1"), "--seed was 1234 and is 1"),
    "precision": (("--bf16",), "--bf16 was False and is True"),
    "alpha of all": (("--alpha", "0.5"), "--alpha was 0.6 and is 0.5"),
    "alpha of the last finished": (("--alpha", "0.6", "0.5"), "--alpha was 0.6 and is 0.6 0.5"),
    "steps": (("--increment-steps", "10", "9"), "--increment-steps was unset and is 10 9"),
    "paradigm": (("--paradigm", "cpt"), "--paradigm was lrps and is cpt"),
    "branch optimizer": (("--branch-optimizer", "reset"), "--branch-optimizer was carry and is reset"),
    "weight decay": (("--weight-decay", "0.2"), "--weight-decay was 0.1 and is 0.2"),
    "clipping": (("--clip-grad", "0"), "--clip-grad was 1.0 and is 0.0"),
    "model": (("--hidden-size", "64"), "--hidden-size was 32 and is 64"),
    "vocabulary": (("--vocab-size", "256"), "--vocab-size was 128 and is 256"),
}


def check_refused(run: Path, arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    """``complaint`` is told, and --allow where that would help."""
    before = files_of(run)
    assert launch(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"pretrain_gpt.py: error: --save {run} holds ") and error.count("\n") == 1
    assert f"{complaint}. Give the old options to go on, " in error
    changes = re.findall(r"--([a-z0-9-]+) was|increment (\w+) has other", complaint)
    allow = " ".join(f"{option or OF_DATA + name}=REASON" for option, name in changes)
    fixed = any(option.replace("-", "_") in FIXED for option, _ in changes) or not changes
    assert error.endswith(" or name another directory\n" if fixed else f" or say why: --allow {allow}\n")
    assert files_of(run) == before, "a refused launch has changed the run"


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_option_is_refused_by_its_flag_and_both_values(
    data: TinyData, finished: Path, capsys: pytest.CaptureFixture[str], change: str
):
    flags, complaint = CHANGES[change]
    check_refused(finished, command(data.first(2), finished, *flags), complaint, capsys)


def without_the_second(data: TinyData, place: Path) -> TinyData:
    return data.first(1)


def in_another_order(data: TinyData, place: Path) -> TinyData:
    return TinyData(data.increments[1::-1], data.held_out[1::-1])


def with_other_content(data: TinyData, place: Path) -> TinyData:
    changed = write_increment(place / "b.train", "b", tokens_of(8), content="other")
    return TinyData((data.increments[0], changed), data.held_out[:2])


def with_another_tokenizer(data: TinyData, place: Path) -> TinyData:
    prefixes = [
        write_increment(place / f"{name}.train", name, tokens_of(steps), tokenizer=OTHER_TOKENIZER)
        for name, steps in (("a", 10), ("b", 8))
    ]
    return TinyData(tuple(prefixes), ())


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (without_the_second, "increment b is missing from --increments"),
        (in_another_order, "--increments was {a} {b} and is {b} {a}"),
        (with_other_content, "increment b has other content than the one trained on"),
        (
            with_another_tokenizer,
            "increment a has other content than the one trained on; increment b has other content",
        ),
    ],
)
def test_changed_data_is_refused_by_the_increment(
    data: TinyData,
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[TinyData, Path], TinyData],
    complaint: str,
):
    told = complaint.format(a=data.increments[0], b=data.increments[1])
    told += " than the one trained on" if told.endswith("other content") else ""
    check_refused(finished, command(change(data, tmp_path), finished), told, capsys)


def test_a_longer_run_is_refused_for_its_options_too(
    data: TinyData, finished: Path, capsys: pytest.CaptureFixture[str]
):
    check_refused(finished, command(data, finished, "--lr", "2e-2"), "--lr was 0.01 and is 0.02", capsys)


def test_data_that_moved_is_the_same_data(data: TinyData, finished: Path, tmp_path: Path):
    moved = [tmp_path / f"elsewhere{place}" for place in range(2)]
    for prefix, target in zip(data.increments, moved, strict=False):
        for suffix in (".bin", ".idx", ".blocks", ".json"):
            Path(f"{target}{suffix}").write_bytes(Path(f"{prefix}{suffix}").read_bytes())
    with opened(command(TinyData(tuple(map(str, moved)), ()), finished)) as run:
        assert all(run.finished(segment) for segment in run.job.plan.segments)


def _rank_is_refused(rank: int, arguments: list[str]) -> str:
    try:
        with open_run(parse_config(arguments), world_of_harness()):
            return "opened"
    except InputError as error:
        return str(error)


def test_every_rank_is_refused_with_the_same_words(run_ranks, data: TinyData, finished: Path):
    before = files_of(finished)
    first, second = run_ranks(2, _rank_is_refused, command(data.first(2), finished, "--lr", "2e-2"))
    assert first == second and "--lr was 0.01 and is 0.02" in first
    assert files_of(finished) == before


def test_what_only_the_first_rank_reads_stops_them_all(run_ranks, data: TinyData, tmp_path: Path):
    run = tmp_path / "run"
    with opened(command(data.first(1), run)) as held:
        loop.train(held)
    (run / "metrics.jsonl").write_text("nonsense\n" + (run / "metrics.jsonl").read_text())
    first, second = run_ranks(2, _rank_is_refused, command(data.first(1), run))
    assert first == second and "metrics.jsonl:1 is not a line of metrics" in first
