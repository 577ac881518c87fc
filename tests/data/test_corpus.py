"""The increments made of this Python installation: kinds, sizes, determinism."""

from dataclasses import replace
from pathlib import Path

import pytest

from megalrps.data.corpus import MODULES, CorpusOptions, make_corpus
from megalrps.data.text import BadLines, read_records
from megalrps.data.text_increments import TextIncrement, read_increments
from megalrps.errors import InputError


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[TextIncrement, ...]]:
    folder = tmp_path_factory.mktemp("corpus")
    return folder, make_corpus(CorpusOptions(folder)).increments


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A tiny standard library: a module of each increment."""
    folder = tmp_path / "library"
    for name, module in (("language", "ast"), ("network", "http"), ("tools", "shlex")):
        (folder / module / "test").mkdir(parents=True)
        (folder / module / "__init__.py").write_text(
            "\n\n".join(f"def {name}_{n}():\n    return {n}" for n in range(2000))
        )
        (folder / module / "test" / "left_out.py").write_text("left out")
    return folder


def texts(folder: Path, file: str) -> list[str]:
    return [record.values[0] for record in read_records([folder / file], ("text",), BadLines("error"))]


def test_three_increments_of_about_equal_size(corpus: tuple[Path, tuple[TextIncrement, ...]]) -> None:
    _, increments = corpus
    assert [increment.name for increment in increments] == ["language", "network", "tools"]
    for increment in increments:
        assert 1_200_000 <= increment.train.text_bytes <= 1_600_000
        assert 40_000 <= increment.valid.text_bytes <= 130_000


def test_no_text_is_there_twice_and_each_is_of_bounded_length(
    corpus: tuple[Path, tuple[TextIncrement, ...]],
) -> None:
    folder, increments = corpus
    files = [part.file for increment in increments for part in (increment.train, increment.valid)]
    documents = [text for file in files for text in texts(folder, file)]
    assert len(set(documents)) == len(documents) > 1000
    assert max(len(text.encode()) for text in documents) <= 4096


def test_increments_differ_in_kind(corpus: tuple[Path, tuple[TextIncrement, ...]]) -> None:
    folder, increments = corpus
    words = {"language": "expression", "network": "socket", "tools": "logger"}
    counts = {
        word: {each.name: "".join(texts(folder, each.train.file)).count(word) for each in increments}
        for word in words.values()
    }
    for name, word in words.items():
        assert max(counts[word], key=lambda increment: counts[word][increment]) == name


def test_a_module_belongs_to_one_increment() -> None:
    modules = [module for group in MODULES.values() for module in group]
    assert len(set(modules)) == len(modules)


def test_the_same_installation_gives_the_same_files(
    corpus: tuple[Path, tuple[TextIncrement, ...]], tmp_path: Path
) -> None:
    folder, _ = corpus
    make_corpus(CorpusOptions(tmp_path / "again"))
    for path in folder.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_run_again_it_is_up_to_date_until_something_changes(library: Path, tmp_path: Path) -> None:
    options = CorpusOptions(tmp_path / "out", maximum_bytes=40_000, minimum_bytes=5000, held_out_modulo=2)
    first = make_corpus(options, library)
    again = make_corpus(options, library)
    assert (first.up_to_date, again.up_to_date) == (False, True)
    assert first.increments == again.increments == read_increments(tmp_path / "out")
    (library / "http" / "__init__.py").write_text("".join(f"changed_{n} = True\n\n" for n in range(4000)))
    with pytest.raises(InputError, match=r"different inputs; .*--overwrite"):
        make_corpus(options, library)
    assert not make_corpus(replace(options, overwrite=True), library).up_to_date


def test_tests_are_left_out_and_increments_are_cut_to_the_smallest(library: Path, tmp_path: Path) -> None:
    (library / "ast" / "more.py").write_text("".join(f"number_{n} = {n}\n\n" for n in range(9000)))
    options = CorpusOptions(tmp_path / "out", maximum_bytes=10**6, minimum_bytes=5000, held_out_modulo=2)
    increments = make_corpus(options, library).increments
    sizes = [increment.train.text_bytes + increment.valid.text_bytes for increment in increments]
    assert max(sizes) - min(sizes) <= 2048
    every = "".join(path.read_text() for path in (tmp_path / "out").glob("*.jsonl"))
    assert "left out" not in every


def test_an_installation_without_sources_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"0 bytes, fewer than --minimum-bytes 1,200,000; use a Python installed"):
        make_corpus(CorpusOptions(tmp_path / "out"), tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [({"minimum_bytes": 2_000_000}, "--minimum-bytes 2000000"), ({"held_out_modulo": 1}, "--held-out-modulo 1")],
)
def test_impossible_options_are_refused(tmp_path: Path, values: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_corpus(replace(CorpusOptions(tmp_path), **values))
