"""How the entry refuses bad input: status 2, one line that names it and the mend, and not a file touched."""

import itertools
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from distributed_harness import processes
from tiny_job import (
    TOKENIZER,
    TinyData,
    command,
    entry_process,
    files_of,
    launch,
    make_data,
    metrics,
    tokens_of,
    write_increment,
)

from megalrps.errors import EXIT_HELD
from megalrps.training import loop


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    """Two increments; at alpha 0.6 the forks are at 2 and 9, the releases at 6 and 13, 17 steps in all."""
    return make_data(tmp_path_factory.mktemp("data"), (6, 7))


Command = Callable[[TinyData, Path], list[str]]


def flags(*said: str) -> Command:
    """The usual command with these flags after it, {tmp} being the test's directory."""
    return lambda data, tmp: command(data, tmp / "run", *(flag.format(tmp=tmp) for flag in said))


def copied(data: TinyData, tmp: Path) -> TinyData:
    """The same data in files of its own."""
    target = shutil.copytree(Path(data.increments[0]).parent, tmp / "data")
    prefixes = [
        tuple(str(target / Path(prefix).name) for prefix in group) for group in (data.increments, data.held_out)
    ]
    return TinyData(*prefixes)


def damaged(suffix: str, damage: Callable[[Path], object]) -> Command:
    """The usual command on data of which the second increment's file has been damaged."""

    def make(data: TinyData, tmp: Path) -> list[str]:
        data = copied(data, tmp)
        damage(Path(f"{data.increments[1]}{suffix}"))
        return command(data, tmp / "run")

    return make


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def other_second(name: str = "b", steps: int = 7, *said: str, **identity: object) -> Command:
    """The usual command with another second increment."""

    def make(data: TinyData, tmp: Path) -> list[str]:
        tokenizer = replace(TOKENIZER, **identity)
        tokens = tokens_of(steps) if steps else tokens_of(1) - 1
        other = write_increment(tmp / "data" / "other", name, tokens, tokenizer=tokenizer)
        return command(TinyData((data.increments[0], other), ()), tmp / "run", *said)

    return make


def with_tokenizer(data: TinyData, tmp: Path) -> list[str]:
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 0, "word": 1}, unk_token="</s>"))
    tokenizer.save(str(tmp / "tokenizer.json"))
    return flags("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "{tmp}/tokenizer.json")(data, tmp)


def with_yaml(text: str) -> Command:
    def make(data: TinyData, tmp: Path) -> list[str]:
        (tmp / "options.yaml").write_text(text)
        return ["--config", str(tmp / "options.yaml"), *command(data, tmp / "run")]

    return make


def saved_at(place: str, *made: str) -> Command:
    """The usual command with --save at ``place``, where the files ``made`` are already."""

    def make(data: TinyData, tmp: Path) -> list[str]:
        for name in made:
            (tmp / name).parent.mkdir(exist_ok=True)
            (tmp / name).write_text("mine")
        return command(data, tmp / place)

    return make


def without(flag: str) -> Command:
    """The usual command without ``flag`` and its value."""

    def make(data: TinyData, tmp: Path) -> list[str]:
        arguments = command(data, tmp / "run")
        place = arguments.index(flag)
        return arguments[:place] + arguments[place + 2 :]

    return make


REMAKE = "run tools/preprocess_data.py again"
REFUSALS: dict[str, tuple[Command, tuple[str, ...]]] = {
    "missing .idx": (damaged(".idx", Path.unlink), ("b.train.idx: no such file", REMAKE)),
    "missing .bin": (damaged(".bin", Path.unlink), ("b.train.bin: no such file", REMAKE)),
    "missing manifest": (damaged(".json", Path.unlink), ("b.train.json: no such manifest", REMAKE)),
    "truncated .bin": (damaged(".bin", lambda file: os.truncate(file, 100)), ("b.train.bin: its 100 bytes", REMAKE)),
    "truncated .idx": (damaged(".idx", lambda file: os.truncate(file, 60)), ("b.train.idx: has 60 bytes", REMAKE)),
    "flipped .idx": (damaged(".idx", flip), ("b.train.idx: ", REMAKE)),
    "flipped manifest": (damaged(".json", flip), ("b.train.json: not a valid increment manifest", REMAKE)),
    "another tokenizer": (
        other_second(fingerprint="1" * 64),
        ("other was made with another tokenizer than", "a.train"),
    ),
    "another end of document": (other_second(eod=3), ("end of document 3", "end of document 2", "preprocess it again")),
    "two of a name": (other_second("a"), ("--increments holds two increments named a", "another --name")),
    "one prefix twice": (
        lambda data, tmp: command(TinyData((data.increments[0],) * 2, ()), tmp / "run"),
        ("--increments names the same prefix twice",),
    ),
    "less than a batch": (other_second(steps=0), ("other holds 7 samples", "--global-batch-size 8")),
    "less than a sample": (flags("--seq-length", "5000"), ("a.train.bin", "not one sample", "lower --seq-length")),
    "too short for its branch": (
        other_second("b", 1, "--alpha", "0.4", "--lr-warmup-iters", "0"),
        ("increment b of 1 steps is too short", "--alpha 0.4"),
    ),
    "wrong --tokenizer-model": (with_tokenizer, ("tokenizer.json (2 ids) is not the tokenizer", "a.train", "64 ids")),
    "missing --tokenizer-model": (
        flags("--tokenizer-model", "{tmp}/none"),
        ("--tokenizer-model", "none: no such file"),
    ),
    "small --vocab-size": (
        flags("--vocab-size", "32"),
        ("--vocab-size 32", "tokenizer's 64 entries", "--vocab-size 0"),
    ),
    "alpha 0": (flags("--alpha", "0"), ("--alpha 0 must lie in (0, 1]",)),
    "alpha 1.5": (flags("--alpha", "1.5"), ("--alpha 1.5 must lie in (0, 1]",)),
    "alpha nan": (flags("--alpha", "nan"), ("--alpha nan must lie in (0, 1]",)),
    "too few alphas": (
        lambda data, tmp: command(make_data(tmp / "data", (4, 4, 4)), tmp / "run", "--alpha", "0.5", "0.5"),
        ("--alpha has 2 values for 3 versions",),
    ),
    "long warm-up": (flags("--lr-warmup-iters", "3"), ("--lr-warmup-iters 3", "first fork at step 2", "at most 2")),
    "increment steps": (flags("--increment-steps", "6"), ("--increment-steps holds 1 numbers for 2 increments",)),
    "unknown paradigm": (flags("--paradigm", "lprs"), ("--paradigm lprs is unknown: did you mean lrps?",)),
    "unknown decay": (flags("--lr-decay-style", "cosin"), ("--lr-decay-style cosin is unknown: did you mean cosine?",)),
    "min-lr above lr": (flags("--min-lr", "1"), ("--min-lr 1 must lie between 0 and --lr 0.01",)),
    "file at --save": (saved_at("run", "run"), ("--save", "is a file: name a directory")),
    "file above --save": (saved_at("file/run", "file"), ("--save", "cannot be written (Not a directory)")),
    "read-only --save": (saved_at("/proc/megalrps"), ("--save /proc/megalrps cannot be written",)),
    "foreign --save": (saved_at("run", "run/thesis.tex"), ("is not empty and not a run directory", "thesis.tex")),
    "missing --save": (without("--save"), ("--save is missing: name the run directory",)),
    "missing --increments": (
        lambda data, tmp: command(TinyData((), ()), tmp / "run"),
        ("--increments is empty", "tools/preprocess_data.py"),
    ),
    "held-out parts": (
        lambda data, tmp: command(TinyData(data.increments, data.held_out[:1]), tmp / "run"),
        ("--valid-data-path holds 1 prefixes for 2 increments",),
    ),
    "missing held-out part": (
        lambda data, tmp: command(TinyData(data.increments, (data.held_out[0], str(tmp / "none"))), tmp / "run"),
        ("none.json: no such manifest",),
    ),
    "micro-batch": (flags("--micro-batch-size", "3"), ("--micro-batch-size 3 does not divide the 8 samples",)),
    "unknown YAML key": (with_yaml("num-layer: 3"), ("options.yaml: unknown option", "did you mean num-layers")),
    "unknown preset": (flags("--preset", "lama-tiny"), ("--preset lama-tiny is unknown; did you mean llama-tiny?",)),
    "save interval": (flags("--save-interval", "-1"), ("--save-interval -1: must not be negative",)),
    "save keep": (flags("--save-keep", "0"), ("--save-keep 0: must be at least 1",)),
    "log interval": (flags("--log-interval", "0"), ("--log-interval 0: must be at least 1",)),
    "clipping": (flags("--clip-grad", "nan"), ("--clip-grad nan: must be finite",)),
    "beta": (flags("--adam-beta2", "1"), ("--adam-beta2 1.0: must be in [0, 1)",)),
    "heads": (flags("--num-attention-heads", "5"), ("--num-attention-heads 5 does not divide --hidden-size 32",)),
}


def check_refused(
    arguments: list[str], place: Path, parts: tuple[str, ...], capsys: pytest.CaptureFixture[str], status: int = 2
) -> None:
    """The launch ends with ``status`` and one line that holds ``parts``, and leaves every file as it was."""
    before = files_of(place)
    assert launch(arguments) == status
    out, err = capsys.readouterr()
    assert err.startswith("pretrain_gpt.py: error: ") and err.endswith("\n") and err.count("\n") == 1
    assert [part for part in parts if part not in err] == [], err
    assert out == ""
    assert files_of(place) == before, "a refused launch has written something"


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_input_is_refused_in_one_line_before_anything_is_written(
    data: TinyData, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
):
    make, parts = REFUSALS[case]
    arguments = make(data, tmp_path)
    capsys.readouterr()
    check_refused(arguments, tmp_path, parts, capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_cuda_is_refused(data: TinyData, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = command(data, tmp_path / "run", "--device", "cuda")
    check_refused(arguments, tmp_path, ("--device cuda: no CUDA device is visible; use --device cpu",), capsys)


def test_a_batch_that_ranks_cannot_share_is_refused(
    data: TinyData, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WORLD_SIZE", "3")
    arguments = command(data, tmp_path / "run", "--dry-run")
    check_refused(
        arguments, tmp_path, ("--global-batch-size 8 is not a multiple of the 3 data-parallel ranks",), capsys
    )


def test_a_torchrun_environment_with_a_hole_is_refused(
    data: TinyData, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RANK", "0")
    check_refused(command(data, tmp_path / "run"), tmp_path, ("RANK is set but WORLD_SIZE,",), capsys)


def _launch_and_stop(arguments: list[str], update: int) -> None:
    """Train up to the given update and stand still before it."""
    train_step, calls = loop.train_step, itertools.count(1)

    def waiting(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == update:
            time.sleep(600)
        return train_step(*args, **kwargs)

    with mock.patch.object(loop, "train_step", waiting):
        launch(arguments)


def test_a_second_launch_is_kept_out_until_the_first_has_gone(
    data: TinyData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = tmp_path / "run"
    quiet = command(data, run, "--lease-seconds", "600")  # it does not beat, and so writes nothing, while it waits
    first = processes().Process(target=_launch_and_stop, args=(quiet, 5), daemon=True)
    first.start()
    try:
        deadline = time.monotonic() + 60
        while not ((run / "metrics.jsonl").exists() and len(metrics(run)) == 4):
            assert time.monotonic() < deadline and first.is_alive(), "the first launch does not train"
            time.sleep(0.01)
        complaint = f"is being trained by another launch (process {first.pid} on "
        check_refused(command(data, run), tmp_path, (complaint,), capsys, EXIT_HELD)
    finally:
        first.kill()
        first.join()
    assert launch(command(data, run)) == 0
    assert len(metrics(run)) == 17


def test_the_program_refuses_from_any_directory(data: TinyData, tmp_path: Path):
    cases = {
        "option": (with_yaml("num-layer: 3"), "options.yaml: unknown option 'num-layer'; did you mean num-layers?"),
        "data": (damaged(".bin", lambda file: os.truncate(file, 100)), "b.train.bin: its 100 bytes"),
    }
    for name, (make, complaint) in cases.items():
        place = tmp_path / name
        place.mkdir()
        arguments = make(data, place)
        before = files_of(place)
        ended = entry_process(arguments, place)
        assert ended.returncode == 2 and ended.stdout == ""
        assert ended.stderr.startswith("pretrain_gpt.py: error: ") and ended.stderr.count("\n") == 1
        assert complaint in ended.stderr
        assert files_of(place) == before
