"""The page of a run: self-contained, accessible, and without a number that is not in the run's files."""

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from synthetic_run import Invented, make_run

from megalrps.errors import InputError
from megalrps.evaluation import report as report_module
from megalrps.evaluation.report import Report, write_report
from megalrps.evaluation.run_files import read_run
from megalrps.evaluation.run_tables import cost_table
from megalrps.paths.plan import Increment

VOID = {"meta", "img", "source"}


class Checked(HTMLParser):
    """A page read strictly: every element closed in order; keeps elements with their attributes, and the text."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page.read_text(encoding="utf-8"))
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data + "\n"

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def report_of(directory: Path) -> tuple[Report, Checked]:
    report = write_report(read_run(directory), directory / "report.html")
    return report, Checked(report.page)


@pytest.fixture
def unpainted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made and not turned into pixels, which takes a second of every page and says nothing of its words."""
    monkeypatch.setattr(report_module, "png", lambda figure: b"\x89PNG")


@pytest.fixture(scope="module", params=["lrps", "cpt", "ptfs"])
def each(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Checked]:
    directory = tmp_path_factory.mktemp("runs") / request.param
    make_run(directory, request.param)
    return report_of(directory)


def test_the_page_needs_nothing_but_itself(each: tuple[Report, Checked]) -> None:
    report, page = each
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.elements}
    addresses = [value for _, attributes in page.elements for key, value in attributes.items() if "src" in key]
    assert len(addresses) == 6
    assert all(value and value.startswith("data:image/png;base64,") for value in addresses)
    assert "url(" not in report.page.read_text()
    assert "http" not in report.page.read_text()


def test_the_drawings_lie_beside_the_page(each: tuple[Report, Checked]) -> None:
    report, _ = each
    assert [drawing.name for drawing in report.drawings] == ["tree.png", "learning_rate.png", "loss.png"]
    assert all(drawing.read_bytes().startswith(b"\x89PNG") for drawing in report.drawings)
    assert all(drawing.parent == report.page.parent for drawing in report.drawings)


def test_tables_and_pictures_can_be_read_without_seeing_them(each: tuple[Report, Checked]) -> None:
    _, page = each
    assert len(page.all("caption")) == len(page.all("table")) == 4
    assert all(header.get("scope") in ("col", "row") for header in page.all("th"))
    assert all(image["alt"] for image in page.all("img"))
    assert page.all("html")[0]["lang"] == "en"
    assert "width=device-width" in str(page.all("meta"))
    assert page.open == []


@pytest.mark.usefixtures("unpainted")
def test_the_perplexities_are_the_summarys_and_the_best_of_a_column_is_marked(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    file = tmp_path / "run" / "summary.json"
    value = json.loads(file.read_text())
    value["releases"][1]["perplexity"]["library"] = 1.2345
    value["releases"][2]["perplexity"]["tests"] = 77777.777
    file.write_text(json.dumps(value))
    page = report_of(tmp_path / "run")[0].page.read_text()
    assert '<td class="best">1.23&nbsp;' in page
    assert "<td>77,777.78</td>" in page


def test_the_cost_is_told_against_the_other_paradigms(tmp_path: Path) -> None:
    increments = tuple(Increment(f"i{i}", 100) for i in range(4))
    for paradigm in ("lrps", "ptfs"):
        make_run(tmp_path / paradigm, paradigm, Invented(increments=increments))
        table = cost_table(read_run(tmp_path / paradigm))
        costs = {row[0].text.split()[0]: (row[2].text, row[3].text, row[4].text) for row in table.rows}
        assert costs == {
            "ptfs": ("1,000", "2.05M", "100.0 %"),
            "lrps": ("580", "1.19M", "58.0 %"),
            "cpt": ("400", "819k", "40.0 %"),
        }
        assert [row[0].text for row in table.rows if "this run" in row[0].text] == [f"{paradigm} (this run)"]


def test_a_cost_that_the_files_do_not_determine_is_left_out(tmp_path: Path) -> None:
    make_run(tmp_path / "run", "cpt")
    (tmp_path / "run" / "config.yaml").unlink()
    table = cost_table(read_run(tmp_path / "run"))
    assert [row[0].text for row in table.rows] == ["ptfs", "cpt (this run)"]
    assert "depends on --alpha" in table.note


def test_each_path_tells_its_learning_rate_in_words_and_the_page_can_be_made_again(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    first, page = report_of(tmp_path / "run")
    written = first.page.read_bytes()
    assert report_of(tmp_path / "run")[0].page.read_bytes() == written
    assert "v1, from main at step 40" in page.text
    assert "Steps 41 to 100: cosine from 3e-3 to 3e-4, lr(t) = 3e-4 + (3e-3 - 3e-4)·½(1 + cos πx)" in page.text
    assert "logged at every step is the plan's, exactly" in page.text


def tear(run: Path) -> None:
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text()[:-20])


def spoil(run: Path) -> None:
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(re.sub(r'"loss": [\d.]+', '"loss": NaN', text, count=3))


def repeat(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join([*lines, *lines[-2:]]))


@pytest.mark.usefixtures("unpainted")
@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (tear, ["407 of the plan's 408 steps", "cut short, as a killed run leaves it"]),
        (spoil, ["3 steps have a loss that is not a finite number"]),
        (repeat, ["2 steps were trained again after a restart"]),
        (lambda run: (run / "summary.json").unlink(), ["no summary.json yet"]),
    ],
)
def test_what_is_wrong_with_the_files_is_said(tmp_path: Path, harm: Callable[[Path], None], said: list[str]) -> None:
    make_run(tmp_path / "run")
    harm(tmp_path / "run")
    report, page = report_of(tmp_path / "run")
    assert len(report.warnings) == len(said)
    assert all(words in warning for words, warning in zip(said, report.warnings, strict=True))
    assert all(warning in page.text for warning in report.warnings)


@pytest.mark.usefixtures("unpainted")
def test_an_unfinished_run_has_a_page_without_held_out_figures(tmp_path: Path) -> None:
    make_run(tmp_path / "run", invented=Invented(stop_after=150))
    report, page = report_of(tmp_path / "run")
    assert "150 of 408" in page.text
    assert "perplexity" not in page.text
    assert "summary.json" not in page.text.splitlines()[-2]
    assert len(report.tables) == 2


def test_names_are_escaped(tmp_path: Path) -> None:
    increments = (Increment("<script>alert(1)</script>", 100), Increment('a"b&c', 80))
    make_run(tmp_path / "run", invented=Invented(increments=increments, device="<b>"))
    _, page = report_of(tmp_path / "run")
    assert not page.all("script")
    assert "<script>alert(1)</script>" in page.text


@pytest.mark.usefixtures("unpainted")
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--output .*report\.html: cannot be written"):
        write_report(read_run(tmp_path / "run"), tmp_path / "file" / "report.html")
