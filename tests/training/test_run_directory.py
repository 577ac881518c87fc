"""A run directory is made whole, and nothing that others have made is taken for one."""

from pathlib import Path

import pytest

from megalrps.errors import InputError
from megalrps.training.run_directory import RunDirectory


def taken(root: Path) -> RunDirectory:
    directory = RunDirectory(root)
    directory.create()
    return directory


def test_it_is_made_with_its_parents_and_accepted_again(tmp_path: Path):
    directory = taken(tmp_path / "some" / "where")
    assert directory.checkpoints.is_dir() and directory.evaluations.is_dir()
    taken(directory.root)  # as a launch that died before it wrote its plan has left it
    directory.plan.write_text("{}")
    (directory.checkpoints / "main-00000004").mkdir()
    taken(directory.root)


@pytest.mark.parametrize("stranger", ["thesis.tex", "checkpoints/epoch-1.pt", "checkpoints", "evaluations/v1.json"])
def test_what_others_have_made_is_refused_and_left_alone(tmp_path: Path, stranger: str):
    file = tmp_path / stranger
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")
    with pytest.raises(InputError, match=f"not a run directory .it holds {stranger.partition('/')[0]}."):
        taken(tmp_path)
    assert [path for path in sorted(tmp_path.rglob("*")) if path.is_file()] == [file]


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/megalrps"])
def test_a_place_that_cannot_be_written_is_refused_by_its_name(tmp_path: Path, place: str):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=f"--save .*{place} cannot be written"):
        taken(tmp_path / place)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
