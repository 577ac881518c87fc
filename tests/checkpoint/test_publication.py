"""References follow the checkpoints through deaths, damage, loss and older versions; and say so, or refuse."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from synthetic_tree import add, flip_bit, leased, prepared, record, refer

from megalrps.checkpoint.errors import CorruptCheckpointError, LostCheckpointError, MovedReferenceError
from megalrps.checkpoint.garbage import prune
from megalrps.checkpoint.leases import Leases
from megalrps.checkpoint.lineage import read_lineage
from megalrps.checkpoint.manifest import read_manifest
from megalrps.checkpoint.publication import Publisher
from megalrps.checkpoint.references import LockedReferences, References
from megalrps.errors import EXIT_DAMAGED, EXIT_HELD, EXIT_LOST, exit_status_of

PATHS = ("main", "v1")


@pytest.fixture
def references(tmp_path: Path) -> References:
    return prepared(tmp_path)


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


@pytest.fixture
def publisher(references: References) -> Iterator[Publisher]:
    """That of a launch which holds main and v1."""
    with Leases(references).acquire({path: [] for path in PATHS}, seconds=30.0) as held:
        yield Publisher(references, held)


def tree(checkpoints: Path) -> None:
    """A main path that forks at 4, the version that was released from it, and what came after on the main path."""
    add(checkpoints, record("main", 2))
    add(checkpoints, record("main", 4, "fork"))
    add(checkpoints, record("v1", 8, "periodic", "main-00000004"))
    add(checkpoints, record("v1", 10, "release", "main-00000004"))
    add(checkpoints, record("main", 6, "periodic", "main-00000004"))
    add(checkpoints, record("main", 8, "periodic", "main-00000004"))


WHOLE = {
    "heads/main": "main-00000008",
    "heads/v1": "v1-00000010",
    "forks/main-00000004": "main-00000004",
    "releases/v1": "v1-00000010",
}


def pointing(references: References) -> dict[str, str]:
    return {reference.title: reference.checkpoint for reference in references.all()}


def digest(checkpoints: Path, name: str) -> str:
    return read_manifest(checkpoints / name).digest


def test_a_run_of_an_older_version_gets_its_references(publisher: Publisher, references: References, checkpoints: Path):
    tree(checkpoints)
    assert publisher.reconcile(checkpoints) == [], "nothing has gone wrong"
    assert pointing(references) == WHOLE
    assert all(each.digest == digest(checkpoints, each.checkpoint) and each.fence == 1 for each in references.all())
    before = {file: file.read_bytes() for file in references.directory.rglob("*.json")}
    assert publisher.reconcile(checkpoints) == []
    assert {file: file.read_bytes() for file in references.directory.rglob("*.json")} == before, "it was done again"


def test_a_launch_makes_references_of_its_own_paths_alone(references: References, checkpoints: Path):
    tree(checkpoints)
    with Leases(references).acquire({"v1": []}, seconds=30.0) as held:
        Publisher(references, held).reconcile(checkpoints)
    assert pointing(references) == {name: to for name, to in WHOLE.items() if "v1" in name}


@pytest.mark.parametrize("with_the_fork", [False, True])
def test_a_death_between_the_rename_and_the_references_is_made_good(
    publisher: Publisher, references: References, checkpoints: Path, with_the_fork: bool
):
    add(checkpoints, record("main", 2))
    publisher.reconcile(checkpoints)
    add(checkpoints, record("main", 4, "fork"))  # renamed, and its launch died
    if with_the_fork:
        refer(references, "forks", "main-00000004", "main-00000004", digest(checkpoints, "main-00000004"))
    assert publisher.reconcile(checkpoints) == ["heads/main moved from main-00000002 to main-00000004"]
    assert pointing(references) == {"heads/main": "main-00000004", "forks/main-00000004": "main-00000004"}
    assert publisher.heads["main"] == "main-00000004"
    publisher.publish("main-00000006", record("main", 6, parent="main-00000004"))(lambda: None, "d" * 64)
    assert pointing(references)["heads/main"] == "main-00000006"


def test_a_head_goes_back_from_a_damaged_periodic_checkpoint(
    publisher: Publisher, references: References, checkpoints: Path
):
    tree(checkpoints)
    publisher.reconcile(checkpoints)
    flip_bit(checkpoints / "main-00000008" / "manifest.json", 200)
    assert publisher.reconcile(checkpoints) == ["heads/main moved from main-00000008 to main-00000006"]
    assert pointing(references) == WHOLE | {"heads/main": "main-00000006"}


def test_a_path_whose_only_checkpoint_is_damaged_is_begun_again(
    publisher: Publisher, references: References, checkpoints: Path
):
    add(checkpoints, record("main", 2))
    publisher.reconcile(checkpoints)
    flip_bit(checkpoints / "main-00000002" / "manifest.json", 200)
    (said,) = publisher.reconcile(checkpoints)
    assert "begun again" in said and pointing(references) == {} and publisher.heads["main"] is None


@pytest.mark.parametrize("path", PATHS)
def test_damaged_forks_and_releases_are_refused(
    publisher: Publisher, references: References, checkpoints: Path, path: str
):
    tree(checkpoints)
    publisher.reconcile(checkpoints)
    name, title = {"main": ("main-00000004", "forks/main-00000004"), "v1": ("v1-00000010", "releases/v1")}[path]
    flip_bit(checkpoints / name / "manifest.json", 200)
    with pytest.raises(CorruptCheckpointError, match=f"{title}.*forget {title} --run {checkpoints.parent}") as raised:
        publisher.reconcile(checkpoints)
    assert exit_status_of(raised.value) == EXIT_DAMAGED and "\n" not in str(raised.value)
    assert pointing(references) == WHOLE


@pytest.mark.parametrize("title", ["forks/main-00000004", "heads/main", "pins/best"])
def test_what_references_name_and_is_not_there_is_refused(
    publisher: Publisher, references: References, checkpoints: Path, title: str
):
    tree(checkpoints)
    refer(references, "pins", "best", "main-00000006", digest(checkpoints, "main-00000006"))
    publisher.reconcile(checkpoints)
    name = pointing(references)[title]
    (checkpoints / name).rename(checkpoints.parent / "elsewhere")
    with pytest.raises(LostCheckpointError, match=f"{title} points to {name}, which is not there") as raised:
        publisher.reconcile(checkpoints)
    assert exit_status_of(raised.value) == EXIT_LOST
    (checkpoints.parent / "elsewhere").rename(checkpoints / name)
    assert publisher.reconcile(checkpoints) == [], "restored from a copy, it is as good as ever"


@pytest.mark.parametrize("title", ["forks/main-00000004", "heads/main"])
def test_another_checkpoint_of_the_same_name_is_refused(publisher: Publisher, checkpoints: Path, title: str):
    tree(checkpoints)
    publisher.reconcile(checkpoints)
    name = WHOLE[title]
    value = read_lineage(checkpoints).records[name]
    (checkpoints / name).rename(checkpoints.parent / "elsewhere")
    add(checkpoints, value, age_days=1)
    with pytest.raises(CorruptCheckpointError, match=f"{title} points to {name} of digest") as raised:
        publisher.reconcile(checkpoints)
    assert exit_status_of(raised.value) == EXIT_DAMAGED


def test_damaged_heads_are_made_again(publisher: Publisher, references: References, checkpoints: Path):
    tree(checkpoints)
    publisher.reconcile(checkpoints)
    flip_bit(references.directory / "heads" / "main.json", 30)
    (said,) = publisher.reconcile(checkpoints)
    assert "heads/main.json is damaged" in said and "made again" in said
    assert pointing(references) == WHOLE
    assert len(list((references.directory / "heads").glob(".main.*.refused"))) == 1, "kept for a person"


def test_what_another_launch_commits_meanwhile_is_not_lost(
    publisher: Publisher, references: References, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
):
    """A fork that another launch makes until the last moment before the lock is there, and referred to."""
    tree(checkpoints)
    publisher.reconcile(checkpoints)
    locked = references.locked

    def commits_first() -> AbstractContextManager[LockedReferences]:
        monkeypatch.undo()
        name = add(checkpoints, record("v2", 12, "end", "main-00000004"))
        for kind, title in (("forks", name), ("heads", "v2")):
            refer(references, kind, title, name, digest(checkpoints, name))
        return locked()

    monkeypatch.setattr(references, "locked", commits_first)
    assert publisher.reconcile(checkpoints) == []
    assert pointing(references) == WHOLE | {"forks/v2-00000012": "v2-00000012", "heads/v2": "v2-00000012"}


def test_nothing_is_visible_where_the_head_is_not_where_it_was(
    publisher: Publisher, references: References, checkpoints: Path
):
    tree(checkpoints)
    publisher.reconcile(checkpoints)
    with references.locked() as locked:
        locked.move("heads", "main", "main-00000006", "d" * 64, expected="main-00000008")
    renamed: list[int] = []
    with pytest.raises(MovedReferenceError, match="points to main-00000006") as raised:
        publisher.publish("main-00000010", record("main", 10, "fork"))(lambda: renamed.append(1), "d" * 64)
    assert renamed == [] and references.read("forks", "main-00000010") is None
    assert exit_status_of(raised.value) == EXIT_HELD


def test_of_two_releases_of_a_version_the_reference_says_which_counts(
    publisher: Publisher, references: References, checkpoints: Path
):
    tree(checkpoints)
    publisher.reconcile(checkpoints)
    later = add(checkpoints, record("v1", 12, "release", "main-00000004"))
    assert publisher.reconcile(checkpoints) == [f"heads/v1 moved from v1-00000010 to {later}"]
    assert pointing(references)["releases/v1"] == "v1-00000010", "no launch has published the other"
    publisher.publish("v1-00000013", record("v1", 13, "release", "main-00000004"))(lambda: None, "d" * 64)
    assert pointing(references)["releases/v1"] == "v1-00000013"


def test_stepping_back(publisher: Publisher, references: References, checkpoints: Path):
    tree(checkpoints)
    publisher.reconcile(checkpoints)
    publisher.step_back("main", "main-00000006", digest(checkpoints, "main-00000006"))
    publisher.step_back("v1", None)
    assert pointing(references) == {
        name: to for name, to in (WHOLE | {"heads/main": "main-00000006"}).items() if name != "heads/v1"
    }
    publisher.publish("v1-00000009", record("v1", 9, parent="main-00000004"))(lambda: None, "d" * 64)
    assert pointing(references)["heads/v1"] == "v1-00000009"


def test_pruning_spares_what_is_named_and_what_others_read(
    publisher: Publisher, references: References, checkpoints: Path
):
    for step in range(2, 14, 2):
        add(checkpoints, record("main", step))
    add(checkpoints, record("v2", 2))
    add(checkpoints, record("v2", 4))
    publisher.reconcile(checkpoints)
    refer(references, "pins", "best", "main-00000004")
    leased(references, "v3", reads=["main-00000006"])
    lineage, removed, complaint = prune(checkpoints, references, 1, publisher.leases)
    assert removed == ("main-00000002", "main-00000008", "main-00000010") and complaint is None
    left = ["main-00000004", "main-00000006", "main-00000012", "v2-00000002", "v2-00000004"]
    assert sorted(lineage.records) == sorted(place.name for place in checkpoints.iterdir()) == left


def test_pruning_waits_while_a_reference_cannot_be_read(
    publisher: Publisher, references: References, checkpoints: Path
):
    tree(checkpoints)
    refer(references, "pins", "best", "main-00000002")
    flip_bit(references.directory / "pins" / "best.json", 30)
    before = sorted(checkpoints.iterdir())
    _, removed, complaint = prune(checkpoints, references, 1, publisher.leases)
    assert removed == () and sorted(checkpoints.iterdir()) == before
    assert complaint is not None and "pins/best.json is damaged" in complaint


def test_what_is_set_aside_is_kept_and_its_name_is_free(publisher: Publisher, checkpoints: Path):
    tree(checkpoints)
    place = publisher.set_aside("main-00000008", checkpoints)
    assert (place / "manifest.json").exists() and place.name.startswith(".main-00000008.")
    assert "main-00000008" not in read_lineage(checkpoints).records
    add(checkpoints, record("main", 8, "periodic", "main-00000004"))
