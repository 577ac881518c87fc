"""tools/lineage.py: what it shows, finds, keeps, gives up, collects and copies, and how it refuses."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from synthetic_tree import SHARD, add, age, elsewhere, flip_bit, leased, manifest_of, prepared, record
from tiny_job import MODEL

from megalrps.checkpoint.keeping import trained_again
from megalrps.checkpoint.leases import Leases
from megalrps.checkpoint.manifest import render
from megalrps.checkpoint.names import hidden_name
from megalrps.checkpoint.publication import Publisher
from megalrps.checkpoint.sealed import write_sealed
from megalrps.checkpoint.store import Store
from megalrps.commandline import run_tool
from megalrps.config import parse_config
from megalrps.errors import EXIT_DAMAGED, EXIT_HELD, EXIT_LOST, EXIT_UNKNOWN_FORMAT
from megalrps.model.config import with_vocabulary
from megalrps.model.parameters import parameter_specs
from megalrps.paths.options import PlanOptions
from megalrps.paths.paradigms import build_plan
from megalrps.paths.plan import Increment

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import lineage as tool

OLD = 99.0


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A main path with a fork at 4 and a version released from it, all of it old and referred to."""
    run = tmp_path / "run"
    references, checkpoints = prepared(run), run / "checkpoints"
    for value in (
        record("main", 2),
        record("main", 4, "fork"),
        *(record("main", step, parent="main-00000004") for step in (6, 8, 10)),
        record("v1", 10, "release", "main-00000004"),
    ):
        add(checkpoints, value, age_days=OLD)
    with Leases(references).acquire({"main": [], "v1": []}, seconds=30.0) as held:
        Publisher(references, held).reconcile(checkpoints)
    return run


class Tool:
    """Runs the tool in this process, as ``python tools/lineage.py ARGUMENTS`` would."""

    def __init__(self, capture: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capture, self._monkeypatch = capture, monkeypatch
        self.out = self.error = ""

    def __call__(self, run: Path, *arguments: str | Path) -> int:
        self._monkeypatch.setattr(sys, "argv", ["lineage.py", *map(str, arguments), "--run", str(run)])
        self._capture.readouterr()
        with pytest.raises(SystemExit) as end:
            run_tool(tool.main, tool.PROGRAM)
        self.out, self.error = self._capture.readouterr()
        assert "Traceback" not in self.error and self.error.count("\n") <= 1
        return int(end.value.code or 0)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Tool]:
    yield Tool(capsys, monkeypatch)


def names(run: Path) -> set[str]:
    return {place.name for place in (run / "checkpoints").iterdir() if not place.name.startswith(".")}


def test_the_tree_with_what_refers_to_it(run: Path, call: Tool):
    leased(prepared(run), "v2", place=elsewhere(), reads=["main-00000004"])
    assert call(run, "list") == 0
    assert call.out.splitlines() == [
        "main-00000002  periodic, step 2, 256 tokens",
        "main-00000004  fork, step 4, 512 tokens  [forks/main-00000004]",
        "├─ main-00000006  periodic, step 6, 768 tokens",
        "├─ main-00000008  periodic, step 8, 1,024 tokens",
        "├─ main-00000010  periodic, step 10, 1,280 tokens  [heads/main]",
        "└─ v1-00000010  release v1, step 10, 1,280 tokens  [heads/v1, releases/v1]",
        "path v2: not known to be free: held by process 7 on elsewhere, since 2026-01-01T00:00:00+00:00, "
        "reads main-00000004",
    ]
    assert call(run, "list", "--json") == 0
    told = json.loads(call.out)
    assert [each["name"] for each in told["checkpoints"] if each["references"]] == [
        *("main-00000004", "main-00000010", "v1-00000010")
    ]
    assert told["leases"][0]["is_over"] is None and told["refused"] == {}


def test_the_tree_of_a_damaged_run(run: Path, call: Tool):
    checkpoints = run / "checkpoints"
    flip_bit(checkpoints / "main-00000006" / "manifest.json", 200)
    shutil.rmtree(checkpoints / "main-00000004")
    (checkpoints / hidden_name("main-00000012", "refused")).mkdir()
    flip_bit(run / "lineage" / "releases" / "v1.json", 30)
    assert call(run, "list") == 0
    assert "its parent main-00000004 is missing" in call.out and "refused: " in call.out
    assert "lost: main-00000004 is not there  [forks/main-00000004]" in call.out
    assert "set aside: " in call.out and "releases/v1.json is damaged" in call.out


def test_one_checkpoint(run: Path, call: Tool):
    assert call(run, "show", "v1-00000010", "--json") == 0
    told = json.loads(call.out)
    assert told["parents"] == ["main-00000004"] and told["samples"] == {"a": 80} and told["files"] == 2
    assert [each["title"] for each in told["references"]] == ["heads/v1", "releases/v1"]
    assert told["digest"] == Store(run / "checkpoints").manifest("v1-00000010").digest
    assert told["bytes"] == sum(file.stat().st_size for file in (run / "checkpoints" / "v1-00000010").iterdir())
    assert call(run, "show", "v1-00000010") == 0
    assert told["digest"] in call.out and "config" not in call.out
    assert call(run, "show", "v1-00000011") == 2 and "no checkpoint v1-00000011" in call.error
    flip_bit(run / "checkpoints" / "v1-00000010" / "manifest.json", 200)
    assert call(run, "show", "v1-00000010") == EXIT_DAMAGED and "v1-00000010/manifest.json" in call.error


def test_a_whole_run_is_called_whole(run: Path, call: Tool):
    assert call(run, "verify") == 0
    assert call.out.startswith("6 checkpoints, 12 files, 0.00 MB") and call.out.endswith("no complaints\n")
    assert call(run, "verify", "main-00000006", "--json") == 0
    told = json.loads(call.out)
    assert (told["checkpoints"], told["files"], told["bytes"], told["complaints"]) == (1, 2, 64, [])
    assert call(run, "verify", "main-00000007") == 2


def test_every_bad_file_is_named(run: Path, call: Tool):
    checkpoints = run / "checkpoints"
    flip_bit(checkpoints / "main-00000002" / SHARD)
    (checkpoints / "main-00000006" / SHARD).unlink()
    flip_bit(checkpoints / "main-00000008" / "manifest.json", 200)
    (checkpoints / "main-00000010" / "notes.txt").write_text("mine")
    flip_bit(run / "lineage" / "heads" / "v1.json", 30)
    assert call(run, "verify") == EXIT_DAMAGED
    bad = [line for line in call.out.splitlines() if line.startswith("BAD ")]
    wanted = ["main-00000002/" + SHARD, "main-00000006/" + SHARD, "main-00000008/manifest.json"]
    wanted += ["main-00000010/notes.txt", "heads/v1.json"]
    assert len(bad) == 5 and all(sum(f"{name}: " in line for line in bad) == 1 for name in wanted)
    assert "5 complaints about 5 files" in call.error
    assert call(run, "verify", "main-00000004") == 0, "only what is asked for is looked at"


def test_what_is_lost_has_a_status_of_its_own(run: Path, call: Tool):
    shutil.rmtree(run / "checkpoints" / "v1-00000010")
    assert call(run, "verify") == EXIT_LOST
    assert call.out.count("which is not there") == 2


def test_a_branch_root_without_a_reference_is_found(run: Path, call: Tool):
    (run / "lineage" / "forks" / "main-00000004.json").unlink()
    assert call(run, "verify") == EXIT_LOST
    assert "v1-00000010 descends from main-00000004, which no reference keeps" in call.out


def test_a_reference_to_other_bytes_is_found(run: Path, call: Tool):
    value = record("main", 4, "fork")
    shutil.rmtree(run / "checkpoints" / "main-00000004")
    add(run / "checkpoints", value, age_days=1)
    assert call(run, "verify") == EXIT_DAMAGED and "forks/main-00000004 points to another" in call.out


def test_counts_that_go_backwards_and_names_that_lie_are_found(run: Path, call: Tool):
    checkpoints = run / "checkpoints"
    add(checkpoints, replace(record("v2", 12, "periodic", "main-00000004"), tokens=1, samples={"a": 3}))
    add(checkpoints, record("v3", 5))
    from synthetic_tree import manifest_of

    from megalrps.checkpoint.manifest import render

    lying = checkpoints / "v3-00000006"
    shutil.copytree(checkpoints / "v3-00000005", lying)
    (lying / "manifest.json").write_text(render(manifest_of("v3-00000006", record("v3", 5)).to_json()))
    assert call(run, "verify") == EXIT_DAMAGED
    for told in (
        "fewer tokens behind it",
        "fewer samples of a behind it",
        "as v3-00000005 would be",
        "is not the only",
    ):
        assert told in call.out


def test_formats_of_another_version_have_a_status_of_their_own(run: Path, call: Tool):
    write_sealed(run / "lineage" / "pins" / "x.json", {"format": 9})
    assert call(run, "verify") == EXIT_UNKNOWN_FORMAT
    assert call(run, "gc") == EXIT_UNKNOWN_FORMAT, "nothing is collected while a reference cannot be read"


def test_a_record_of_a_later_version_is_neither_damaged_nor_garbage(run: Path, call: Tool):
    manifest = manifest_of("v9-00000020", record("v9", 20))
    later = replace(manifest, record={**manifest.record, "record_version": 99, "colour": "red"})
    add(run / "checkpoints", record("v9", 20), age_days=OLD)
    (run / "checkpoints" / "v9-00000020" / "manifest.json").write_text(render(later.to_json()))
    assert call(run, "verify") == EXIT_UNKNOWN_FORMAT and "v9-00000020" in call.out
    before = names(run)
    assert call(run, "gc", "--apply") == EXIT_UNKNOWN_FORMAT and names(run) == before


def test_pins(run: Path, call: Tool):
    assert call(run, "pin", "main-00000006", "--as", "best", "--note", "before the spike") == 0
    assert call(run, "pin", "main-00000006") == 0 and call.out == "pins/main-00000006 keeps main-00000006\n"
    assert call(run, "list") == 0 and "[pins/best (before the spike), pins/main-00000006]" in call.out
    assert call(run, "pin", "main-00000008", "--as", "best") == 2 and "unpin it first" in call.error
    assert call(run, "pin", "main-00000099") == 2 and call(run, "pin", "../x") == 2
    assert call(run, "unpin", "best") == 0 and call(run, "unpin", "best") == 2
    assert "there are main-00000006" in call.error
    assert call(run, "verify") == 0


def test_giving_up_a_damaged_fork(run: Path, call: Tool):
    plan = build_plan((Increment("a", 6), Increment("b", 5)), PlanOptions())
    (run / "plan.json").write_text(json.dumps(plan.to_json()))
    assert call(run, "forget", "forks/main-00000004") == 2 and "which is whole" in call.error
    flip_bit(run / "checkpoints" / "main-00000004" / SHARD)
    assert call(run, "forget", "forks/main-00000004") == 0
    assert call.out.startswith("forgotten: forks/main-00000004\nset aside: ")
    assert "main-00000004" not in names(run) and len(list((run / "checkpoints").glob(".main-*.refused"))) == 1
    assert call(run, "forget", "forks/main-00000004") == 2 and "there is no reference" in call.error


def test_giving_up_what_a_head_points_to_drops_the_head_too(run: Path, call: Tool):
    flip_bit(run / "checkpoints" / "v1-00000010" / SHARD)
    assert call(run, "forget", "releases/v1") == 0
    assert call.out.splitlines()[0] == "forgotten: releases/v1, heads/v1"
    assert "trained again by the next launch" in call.out


def test_giving_up_what_is_gone_or_unreadable_or_whole(run: Path, call: Tool):
    shutil.rmtree(run / "checkpoints" / "v1-00000010")
    assert call(run, "forget", "releases/v1") == 0 and call.out.startswith("forgotten: releases/v1\n")
    flip_bit(run / "lineage" / "heads" / "v1.json", 30)
    assert call(run, "forget", "heads/v1") == 0 and "set aside: " in call.out
    assert call(run, "forget", "heads/main", "--yes") == 0
    assert call(run, "forget", "tags/main") == 2 and call(run, "forget", "heads") == 2
    assert "main-00000010" in names(run)


def test_what_a_launch_trains_is_not_given_up_under_it(run: Path, call: Tool):
    leased(prepared(run), "main")
    flip_bit(run / "checkpoints" / "main-00000004" / SHARD)
    assert call(run, "forget", "forks/main-00000004") == EXIT_HELD
    assert "main-00000004" in names(run)


def test_what_is_trained_again(tmp_path: Path):
    plan = build_plan((Increment("a", 10), Increment("b", 8)), PlanOptions())
    first = plan.segments[0]
    end = f"{first.path}-{first.end:08d}"
    assert trained_again(plan, tmp_path, end) == (first, first.steps)
    fingerprint = plan.segment_fingerprint(first)
    add(tmp_path, replace(record(first.path, 1), segment_fingerprint=fingerprint))
    assert trained_again(plan, tmp_path, end) == (first, first.steps - 1)
    add(tmp_path, replace(record(first.path, first.end, first.kind), segment_fingerprint=fingerprint))
    assert trained_again(plan, tmp_path, end) is None
    assert trained_again(plan, tmp_path, "other-00000001") is None


def test_collecting_is_dry_until_it_is_asked_for(run: Path, call: Tool):
    before = names(run)
    assert call(run, "gc", "--verbose") == 0
    goes = [line for line in call.out.splitlines() if line.startswith("goes")]
    assert [line.split()[1] for line in goes] == ["checkpoints/main-00000006", "checkpoints/main-00000002"]
    assert "99.0 days old" in goes[0] and "nothing was changed" in call.out and names(run) == before
    assert "stays checkpoints/main-00000004  checkpoint, 0.00 MB: forks/main-00000004" in call.out
    assert call(run, "gc", "--apply", "--keep", "1") == 0
    assert before - names(run) == {"main-00000002", "main-00000006", "main-00000008"}
    trash = sorted((run / "trash").iterdir())
    assert [place.name.split(".")[0] for place in trash] == ["main-00000002", "main-00000006", "main-00000008"]
    assert call(run, "gc", "--apply") == 0 and sorted((run / "trash").iterdir()) == trash, "its grace runs again"
    for place in trash:
        age(place, 15)
    assert call(run, "gc", "--apply") == 0 and not any((run / "trash").iterdir())
    assert call(run, "gc", "--keep", "-1") == 2 and call(run, "gc", "--grace", "nan") == 2


def test_a_run_without_references_is_not_collected(run: Path, call: Tool):
    shutil.rmtree(run / "lineage")
    assert call(run, "gc", "--apply", "--grace", "0") == 2 and "start its command once" in call.error
    assert call(run, "pin", "main-00000006") == 0
    before = names(run)
    assert call(run, "gc", "--apply", "--grace", "0", "--keep", "0") == 0 and names(run) == before


def test_a_copy_is_another_stores_checkpoint(run: Path, call: Tool, tmp_path: Path):
    assert call(run, "export", "v1-00000010", "--output", tmp_path / "other") == 0
    copy = Store(tmp_path / "other")
    assert copy.names() == ("v1-00000010",) and copy.verify("v1-00000010")
    assert copy.manifest("v1-00000010") == Store(run / "checkpoints").manifest("v1-00000010")
    assert call(run, "export", "v1-00000010", "--output", tmp_path / "other") == 2 and "exists" in call.error
    flip_bit(run / "checkpoints" / "main-00000004" / SHARD)
    assert call(run, "export", "main-00000004", "--output", tmp_path / "other") == EXIT_DAMAGED
    (run / "checkpoints" / "main-00000006" / SHARD).unlink()
    assert call(run, "export", "main-00000006", "--output", tmp_path / "other") == EXIT_DAMAGED
    assert [place.name for place in (tmp_path / "other").iterdir()] == ["v1-00000010"], "half a copy is left"
    (tmp_path / "file").touch()
    assert call(run, "export", "main-00000008", "--output", tmp_path / "file") == 2
    assert call(run, "export", "main-00000008", "--output", tmp_path / "x", "--dtype", "bf16") == 2
    assert call(run, "export", "main-00000008", "--output", tmp_path / "x", "--format", "huggingface") == 2


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_hugging_face_loads_what_is_exported(tmp_path: Path, call: Tool, dtype: str):
    from transformers import LlamaForCausalLM

    run, output, vocabulary = tmp_path / "run", tmp_path / "hf", tmp_path / "tokens.model"
    vocabulary.write_bytes(b"a model of SentencePiece")
    config = with_vocabulary(parse_config([*MODEL, "--save", "x", "--increments", "a"]).model, 64)
    generator = torch.Generator().manual_seed(3)
    weights = {name: torch.randn(spec.shape, generator=generator) for name, spec in parameter_specs(config).items()}
    of = {"model": asdict(config), "data": {"seq_length": 16, "tokenizer_model": str(vocabulary)}}
    (run / "checkpoints").mkdir(parents=True)
    Store(run / "checkpoints").save(
        "v1-00000010",
        {f"model.{name}": weight for name, weight in weights.items()},
        replace(record("v1", 10, "release"), config=of).to_json(),
    )
    assert call(run, "export", "v1-00000010", "--format", "huggingface", "--output", output, "--dtype", dtype) == 0
    assert "with tokenizer.model" in call.out and (output / "tokenizer.model").read_bytes() == vocabulary.read_bytes()
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    held = load_file(output / "model.safetensors")
    assert torch.equal(held["model.embed_tokens.weight"], weights["embedding.weight"].to(torch_dtype))
    model = LlamaForCausalLM.from_pretrained(output, dtype="auto")
    assert model.dtype == torch_dtype and model.config.max_position_embeddings == 16
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, held[name]), name
    assert model(torch.arange(5)[None]).logits.shape == (1, 5, 128)
    assert call(run, "export", "v1-00000010", "--format", "huggingface", "--output", output) == 2
    assert [place.name for place in tmp_path.glob(".*")] == []


def test_a_directory_that_is_no_run_is_refused(tmp_path: Path, call: Tool):
    for command in (["list"], ["verify"], ["gc"], ["pin", "x"], ["export", "x", "--output", "y"]):
        assert call(tmp_path, *command) == 2 and "is not the directory of a run" in call.error


def test_no_torch_but_for_hugging_face():
    code = "import sys; sys.path.insert(0, sys.argv[1]); import lineage; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, str(Path(tool.__file__).parent)], check=False).returncode == 0
