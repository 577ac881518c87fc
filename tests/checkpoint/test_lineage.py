"""The lineage is what the manifests say, whatever else lies in the directory."""

import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalrps.checkpoint.draw import draw_lineage
from megalrps.checkpoint.lineage import Lineage, read_lineage
from megalrps.checkpoint.manifest import Manifest, render
from megalrps.checkpoint.names import checkpoint_name
from megalrps.checkpoint.record import KINDS, CheckpointRecord

BASE = CheckpointRecord(
    path="main",
    version="v1",
    kind="periodic",
    step=1,
    parent=None,
    segment_fingerprint="",
    curve_fingerprint="c",
    plan_fingerprint="p",
    samples={"a": 3},
    tokens=0,
    train_seconds=1.5,
    config={"lr": 3e-4},
    data={"a": "d"},
)


def record(
    path: str, step: int, kind: str = "periodic", parent: str | None = None, segment: str = "s"
) -> CheckpointRecord:
    return replace(
        BASE,
        path=path,
        version=path,
        kind=kind,
        step=step,
        parent=parent,
        segment_fingerprint=segment,
        tokens=step * 1000,
    )


def commit(directory: Path, name: str, value: object) -> None:
    manifest = Manifest(name, "2026-01-01T00:00:00+00:00", {}, (), {}, value)  # type: ignore[arg-type]
    (directory / name).mkdir(parents=True)
    (directory / name / "manifest.json").write_text(render(manifest.to_json()))


def path_switching() -> dict[str, CheckpointRecord]:
    """Two versions: forks at 4 and 14, releases at 10 and 20, periodic checkpoints on the main path."""
    records = {"main-00000002": record("main", 2, segment="m1")}
    records["main-00000004"] = record("main", 4, "fork", segment="m1")
    records["v1-00000010"] = record("v1", 10, "release", "main-00000004", "b1")
    records |= {f"main-{step:08d}": record("main", step, "periodic", "main-00000004", "m2") for step in (6, 8, 10, 12)}
    records["main-00000014"] = record("main", 14, "fork", "main-00000004", "m2")
    records["v2-00000020"] = record("v2", 20, "release", "main-00000014", "b2")
    return records


@pytest.fixture
def lineage(tmp_path: Path) -> Lineage:
    for name, value in path_switching().items():
        commit(tmp_path, name, value.to_json())
    return read_lineage(tmp_path)


def test_records_come_back_as_they_were():
    for kind in KINDS:
        value = record("main", 5, kind, "main-00000001")
        assert CheckpointRecord.from_json(json.loads(json.dumps(value.to_json()))) == value
    assert BASE.to_json().keys() == {field.name for field in fields(BASE)} | {"record_version"}


@pytest.mark.parametrize("field", [field.name for field in fields(CheckpointRecord)])
def test_records_with_a_field_missing_or_mistyped_are_refused(field: str):
    value = BASE.to_json()
    with pytest.raises(ValueError, match=field):
        CheckpointRecord.from_json({key: member for key, member in value.items() if key != field})
    with pytest.raises(ValueError, match=field):
        CheckpointRecord.from_json(value | {field: True})


@pytest.mark.parametrize("change", [{"record_version": 3}, {"kind": "final"}, {"step": 0}, {"extra": 1}])
def test_records_of_another_version_or_content_are_refused(change: dict):
    with pytest.raises(ValueError, match=r".+"):
        CheckpointRecord.from_json(BASE.to_json() | change)


def test_a_scan_finds_what_was_committed(lineage: Lineage):
    assert lineage.records == path_switching()
    assert not lineage.refused
    assert lineage.all()[:4] == ("main-00000002", "main-00000004", "main-00000006", "main-00000008")
    assert lineage.releases() == ("v1-00000010", "v2-00000020")
    assert lineage.ancestors("v2-00000020") == ("main-00000014", "main-00000004")
    assert not lineage.orphans()


def test_finished_segments_are_those_with_their_last_checkpoint(lineage: Lineage):
    assert lineage.finished("main", 4, "m1") == "main-00000004"
    assert lineage.finished("main", 14, "m2") == "main-00000014"
    assert lineage.finished("v1", 10, "b1") == "v1-00000010"
    assert lineage.finished("main", 4, "changed") is None, "the plan of the segment has changed"
    assert lineage.finished("main", 12, "m2") is None, "a periodic checkpoint ends nothing"
    assert lineage.finished("v2", 10, "b1") is None


def test_a_segment_is_resumed_from_the_newest_checkpoint_inside_it(lineage: Lineage):
    without_end = Lineage({name: r for name, r in lineage.records.items() if name != "main-00000014"}, {})
    assert without_end.latest("main", "m2", 4, 14) == "main-00000012"
    assert without_end.latest("main", "m2", 4, 11) == "main-00000010"
    assert without_end.resumable("main", "m2", 4, 14) == tuple(f"main-{step:08d}" for step in (12, 10, 8, 6))
    assert without_end.latest("main", "m2", 12, 14) is None, "the start of a segment is not inside it"
    assert without_end.latest("main", "changed", 4, 14) is None


def test_damaged_and_foreign_directories_are_named_and_not_used(tmp_path: Path, lineage: Lineage):
    (tmp_path / "main-00000012/manifest.json").write_text("{}")
    (tmp_path / "main-00000014/manifest.json").unlink()
    (tmp_path / "notes").mkdir()
    (tmp_path / "readme.txt").write_text("not a directory")
    (tmp_path / ".main-00000016.0123456789abcdef.partial").mkdir()
    commit(tmp_path, "other-00000001", {"a record": "of another program"})
    commit(tmp_path, "main-00000005", record("main", 5, parent="main-00000006").to_json())
    scanned = read_lineage(tmp_path)
    assert set(scanned.refused) == {"main-00000012", "main-00000014", "notes", "other-00000001", "main-00000005"}
    assert all(name in reason and "\n" not in reason for name, reason in scanned.refused.items())
    assert scanned.latest("main", "m2", 4, 14) == "main-00000010"
    assert scanned.finished("main", 14, "m2") is None
    assert scanned.orphans() == {"v2-00000020": "main-00000014"}
    assert scanned.ancestors("v2-00000020") == ()


def test_parents_that_come_later_never_make_a_circle(tmp_path: Path):
    commit(tmp_path, "a-00000001", record("a", 1, parent="b-00000001").to_json())
    commit(tmp_path, "b-00000001", record("b", 1, parent="a-00000001").to_json())
    assert set(read_lineage(tmp_path).refused) == {"a-00000001", "b-00000001"}


def test_an_absent_directory_is_an_empty_lineage(tmp_path: Path):
    assert read_lineage(tmp_path / "none") == Lineage({}, {})
    assert draw_lineage(read_lineage(tmp_path / "none")) == "no checkpoints"


def test_pruning_keeps_the_newest_of_each_path(lineage: Lineage):
    assert lineage.prunable(2) == ("main-00000002", "main-00000006", "main-00000008")
    assert lineage.prunable(0) == tuple(f"main-{step:08d}" for step in (2, 6, 8, 10, 12))
    assert lineage.prunable(100) == ()
    with pytest.raises(ValueError, match="keep -1"):
        lineage.prunable(-1)


@st.composite
def lineages(draw: st.DrawFn) -> Lineage:
    records: dict[str, CheckpointRecord] = {}
    for step in sorted(draw(st.lists(st.integers(1, 50), max_size=25))):
        path = draw(st.sampled_from(["main", "v1", "v2"]))
        before = [name for name, r in records.items() if r.step < step]
        parent = draw(st.sampled_from([None, *before])) if before else None
        records[checkpoint_name(path, step)] = record(path, step, draw(st.sampled_from(KINDS)), parent)
    return Lineage({name: r for name, r in records.items() if r.parent is None or r.parent in records}, {})


@settings(max_examples=200, deadline=None)
@given(lineages(), st.integers(0, 5))
def test_pruning_breaks_no_chain_and_ends_nothing(lineage: Lineage, keep: int):
    gone = set(lineage.prunable(keep))
    left = Lineage({name: r for name, r in lineage.records.items() if name not in gone}, {})
    assert all(lineage.records[name].kind == "periodic" for name in gone)
    assert left.orphans().keys() <= lineage.orphans().keys()
    assert all(left.ancestors(name) == lineage.ancestors(name) for name in left.records)
    for path in ("main", "v1", "v2"):
        periodic = [
            name for name in lineage.all() if lineage.records[name].path == path and not lineage.records[name].permanent
        ]
        assert not gone & set(periodic[len(periodic) - keep :] if keep else [])
    assert left.prunable(keep) == () or keep == 0 or len(left.records) < len(lineage.records)


@settings(max_examples=50, deadline=None)
@given(lineages())
def test_the_tree_shows_every_checkpoint_once(lineage: Lineage):
    text = draw_lineage(lineage)
    assert all(sum(f"{name}  " in line for line in text.splitlines()) == 1 for name in lineage.records)


def test_the_tree_as_text(tmp_path: Path, lineage: Lineage):
    (tmp_path / "main-00000014/manifest.json").unlink()
    pruned = read_lineage(tmp_path)
    keep = set(pruned.records) - set(pruned.prunable(0))
    text = draw_lineage(Lineage({name: pruned.records[name] for name in keep}, {"x": "x is damaged"}))
    assert text.splitlines() == [
        "main-00000004  fork, step 4, 4,000 tokens",
        "└─ v1-00000010  release v1, step 10, 10,000 tokens",
        "v2-00000020  release v2, step 20, 20,000 tokens  (its parent main-00000014 is missing)",
        "refused: x is damaged",
    ]
    tree = draw_lineage(Lineage({n: r for n, r in path_switching().items() if r.permanent}, {})).splitlines()
    assert [line.split("  ")[0] for line in tree[:2]] == ["main-00000004", "├─ v1-00000010"]
    assert tree[2].startswith("└─ main-00000014")
    assert tree[3].startswith("   └─ v2-00000020")


def test_the_lineage_is_read_without_torch():
    code = "import megalrps.checkpoint.draw, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
