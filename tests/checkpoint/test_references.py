"""References are moved by whoever knows where they are, and nobody else; their files prove themselves."""

import random
import threading
from pathlib import Path

import pytest
from distributed_harness import processes
from synthetic_tree import flip_bit, prepared, refer

from megalrps.checkpoint.errors import (
    DamagedReferenceError,
    MissingCheckpointError,
    MovedReferenceError,
    UnknownFormatError,
)
from megalrps.checkpoint.references import KINDS, Reference, References
from megalrps.checkpoint.sealed import read_sealed, write_sealed
from megalrps.errors import EXIT_HELD, InputError, exit_status_of

SEED = 5
MOVERS = 8


@pytest.fixture
def references(tmp_path: Path) -> References:
    return prepared(tmp_path)


def test_what_is_made_is_read_back(references: References):
    with references.locked() as locked:
        made = locked.move("pins", "best", "main-00000004", "d" * 64, expected=None, fence=3, note="wörth it")
    assert references.read("pins", "best") == made
    assert (made.title, made.fence, made.note) == ("pins/best", 3, "wörth it")
    assert references.read("pins", "other") is None
    refer(references, "heads", "main", "main-00000009")
    assert [reference.title for reference in references.all()] == ["heads/main", "pins/best"]


def test_it_is_moved_only_from_where_its_mover_thinks_it_is(references: References):
    refer(references, "heads", "main", "main-00000004")
    file = references.directory / "heads" / "main.json"
    before = file.read_bytes()
    with references.locked() as locked:
        for expected in (None, "main-00000002"):
            with pytest.raises(MovedReferenceError, match="points to main-00000004, not to") as raised:
                locked.move("heads", "main", "main-00000006", "e" * 64, expected=expected)
            assert exit_status_of(raised.value) == EXIT_HELD
            with pytest.raises(MovedReferenceError):
                locked.drop("heads", "main", expected=str(expected))
        with pytest.raises(MissingCheckpointError):
            locked.move("heads", "v1", "v1-00000006", "e" * 64, expected="v1-00000004")
        assert file.read_bytes() == before
        locked.move("heads", "main", "main-00000006", "e" * 64, expected="main-00000004")
        locked.drop("heads", "main", expected="main-00000006")
    assert references.all() == ()


def _move(directory: Path, mover: int) -> bool:
    with References(directory).locked() as locked:
        try:
            locked.move("heads", "main", f"main-{mover:08d}", "e" * 64, expected="main-00000000")
        except MovedReferenceError:
            return False
    return True


def test_of_threads_that_move_it_at_once_exactly_one_does(references: References):
    refer(references, "heads", "main", "main-00000000")
    start, moved = threading.Barrier(MOVERS), []

    def run(mover: int) -> None:
        start.wait()
        if _move(references.directory, mover):
            moved.append(mover)

    threads = [threading.Thread(target=run, args=(mover,)) for mover in range(1, MOVERS + 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(moved) == 1
    found = references.read("heads", "main")
    assert found is not None and found.checkpoint == f"main-{moved[0]:08d}"


def _move_in_turns(directory: Path, mover: int, wins: Path) -> None:
    """Compete for every one of 12 moves, each from where the one before left the reference."""
    for turn in range(12):
        references = References(directory)
        with references.locked() as locked:
            found = references.read("heads", "main")
            assert found is not None
            number = int(found.checkpoint.rpartition("-")[2])
            expected = f"main-{turn:08d}"
            try:
                locked.move("heads", "main", f"main-{turn + 1:08d}", f"{mover}", expected=expected)
            except MovedReferenceError:
                assert number != turn
                continue
        with open(wins, "a") as file:
            file.write(f"{turn}\n")


def test_of_processes_that_move_it_at_once_exactly_one_does(references: References, tmp_path: Path):
    refer(references, "heads", "main", "main-00000000")
    wins = tmp_path / "wins"
    movers = [processes().Process(target=_move_in_turns, args=(references.directory, m, wins)) for m in range(3)]
    for mover in movers:
        mover.start()
    for mover in movers:
        mover.join(60)
    assert [mover.exitcode for mover in movers] == [0] * 3
    assert sorted(map(int, wins.read_text().split())) == list(range(12))


def test_a_file_that_differs_in_one_bit_is_refused(references: References):
    refer(references, "forks", "main-00000004", "main-00000004")
    file = references.directory / "forks" / "main-00000004.json"
    written, chance = file.read_bytes(), random.Random(SEED)
    for position in sorted(chance.sample(range(len(written)), 60)):
        changed = bytearray(written)
        changed[position] ^= 1 << chance.randrange(8)
        file.write_bytes(changed)
        with pytest.raises((DamagedReferenceError, UnknownFormatError), match=r"main-00000004\.json"):
            references.read("forks", "main-00000004")
    for length in (0, 1, len(written) // 2, len(written) - 1):
        file.write_bytes(written[:length])
        with pytest.raises(DamagedReferenceError):
            references.read("forks", "main-00000004")
    file.write_bytes(written)
    assert references.read("forks", "main-00000004") is not None


def test_a_file_that_says_the_same_in_another_way_is_refused(references: References):
    refer(references, "pins", "a", "main-00000004")
    file = references.directory / "pins" / "a.json"
    file.write_text(file.read_text().replace("\n ", "\n  "))
    with pytest.raises(DamagedReferenceError, match="seal"):
        references.read("pins", "a")


def test_a_reference_under_another_name_and_a_strange_object_are_refused(references: References):
    refer(references, "pins", "a", "main-00000004")
    pins = references.directory / "pins"
    (pins / "b.json").write_bytes((pins / "a.json").read_bytes())
    with pytest.raises(DamagedReferenceError, match="belongs to pins/a"):
        references.read("pins", "b")
    write_sealed(pins / "b.json", {"format": 1, "colour": "red"})
    with pytest.raises(DamagedReferenceError, match="no reference"):
        references.read("pins", "b")
    write_sealed(pins / "b.json", {"format": 2, "colour": "red"})
    with pytest.raises(UnknownFormatError, match="format 2"):
        references.read("pins", "b")
    (pins / "b.json").unlink()
    (pins / "b.json").mkdir()
    with pytest.raises(DamagedReferenceError, match="cannot be read"):
        references.read("pins", "b")


def test_one_damaged_file_hides_no_other(references: References):
    for kind in KINDS:
        refer(references, kind, "x", "main-00000004")
    flip_bit(references.directory / "forks" / "x.json", 20)
    with pytest.raises(DamagedReferenceError):
        references.all()
    assert [reference.kind for reference in references.readable()] == ["heads", "releases", "pins"]
    (complaint,) = references.damaged()
    assert "forks/x" in complaint and "\n" not in complaint
    with references.locked() as locked:
        aside = locked.set_aside("forks", "x")
    assert aside.exists() and references.damaged() == () and references.read("forks", "x") is None


def test_the_mend_of_a_pin_is_not_that_of_what_training_makes_again(references: References):
    for kind, mend in (("pins", "pin the checkpoint again"), ("forks", "makes it again")):
        refer(references, kind, "x", "main-00000004")
        flip_bit(references.directory / kind / "x.json", 20)
        with pytest.raises(DamagedReferenceError, match=mend):
            references.read(kind, "x")


@pytest.mark.parametrize("name", ["../main", "", ".hidden", "a/b", "x" * 101])
def test_names_never_leave_the_directory(references: References, name: str):
    with references.locked() as locked:
        with pytest.raises(InputError):
            locked.move("pins", name, "main-00000004", "d", expected=None)
        with pytest.raises(InputError):
            locked.move("pins", "x", name, "d", expected=None)
    assert references.all() == ()


def test_a_sealed_file_of_any_size_is_refused_before_it_is_read_whole(tmp_path: Path):
    file = tmp_path / "x.json"
    file.write_text(" " * (1 << 20))
    with pytest.raises(DamagedReferenceError):
        read_sealed(file, 1, "mend")
    assert read_sealed(tmp_path / "none.json", 1, "mend") is None


def test_a_reference_names_itself():
    assert Reference("heads", "main", "main-00000004", "d", 1, "").title == "heads/main"
