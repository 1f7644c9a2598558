"""The report's page and a grader's page: valid, self-contained, and complete."""

import re
from pathlib import Path

import pytest
import torch
from pages import outline

from common import page
from common.errors import InputError
from common.files import ROOT, check_files, write_json
from common.images import write_png
from common.page import Grade, Measure, Picture, write_grade, write_pdf
from common.report import Results
from common.report_page import report_page
from scripts import make_report

LARGEST = 12_000_000  # bytes of the report

DOCUMENT = """# The title

Text with <!-- = p1 accuracy percent -->98 %<!-- / --> and a [card](model/README.md#top), `a < b`.
<!-- claim: p1 accuracy >= 0.97 -->

![A figure & its words](figure.png)

<!-- frames: eta -->

## First: part

| measured | value |
| --- | --- |
| accuracy | <!-- = p1 accuracy percent -->98 %<!-- / --> |

<!-- table: sweep -->
| old |
| --- |
| 1 |
<!-- end -->

## First part

| ![small](figure.png) | text |
| --- | --- |

[above](#first-part) and [there](https://example.org/)
"""


@pytest.fixture
def document(tmp_path: Path) -> Path:
    write_json(tmp_path / "results" / "p1.json", {"accuracy": 0.976})
    write_json(tmp_path / "results" / "p2.json", {"command": "bash study.sh", "rows": [1]})
    figure = torch.arange(3 * 4 * 6, dtype=torch.uint8).view(3, 4, 6)
    write_png(tmp_path / "figure.png", figure)
    (tmp_path / "results" / "frames").mkdir()
    (tmp_path / "results" / "frames" / "eta.webp").write_bytes(b"RIFF")
    write_frames(tmp_path, ["0", "1"])
    (tmp_path / "report.md").write_text(DOCUMENT)
    return tmp_path / "report.md"


def write_frames(root: Path, values: list[str], **more: object) -> None:
    about = {"label": "eta", "values": values, "start": 1, "sides": None, "caption": 'As "eta"'}
    about |= {"command": "python3 -m frames", "width": 6, "height": 4, **more}
    write_json(root / "results" / "frames" / "eta.json", about)


def made(document: Path) -> str:
    tables = {"sweep": lambda results: str(results["p2"]["rows"])}
    return report_page(document, Results(document.parent / "results"), tables, {"p1": "bash p1.sh"})


def test_a_document_becomes_a_page(document: Path) -> None:
    text = made(document)
    found = outline(text)
    assert "<title>The title</title>" in text and "<code>a &lt; b</code>" in text
    assert "card <code>model/README.md</code>," in text and "<!--" not in text
    assert [link["href"] for link in found.all("a")] == [
        "#first-part",
        "#first-part-2",
        "#first-part",
        "https://example.org/",
    ]
    assert [image["alt"] for image in found.all("img")][:2] == ["A figure & its words", "small"]
    assert "<figcaption>A figure &amp; its words</figcaption></figure>" in text


def test_tables_name_their_commands(document: Path) -> None:
    """From the number slots of a table, from the table's function, and none for pictures."""
    text = made(document)
    captions = re.findall(r"</table></div>(.*?)</figure>", text, flags=re.DOTALL)
    assert captions == [
        "<figcaption>From <code>results/p1.json</code>, made by <code>bash p1.sh</code>."
        "</figcaption>",
        "<figcaption>From <code>results/p2.json</code>, made by <code>bash study.sh</code>."
        "</figcaption>",
        "",
    ]
    assert len(outline(text).all("table")) == 3 and len(outline(text).all("table", "sortable")) == 2


def test_frames_become_a_slider_or_a_comparison(document: Path) -> None:
    found = outline(made(document))
    (slider,) = [tag for tag in found.all("input") if "choice" in tag["class"]]
    assert (slider["max"], slider["value"]) == ("1", "1")
    assert found.all("figure", "film")[0]["data-values"] == '["0", "1"]'
    assert "--count:2;--start:1" in found.all("div", "frames")[0]["style"]
    write_frames(document.parent, ["a", "b"], sides=["before", "after"])
    found = outline(made(document))
    assert "--count:4" in found.all("div", "frames")[0]["style"]
    assert len(found.all("option")) == 2 and len(found.all("input", "split")) == 1


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("figure.png", "absent.png", "absent.png does not exist"),
        ("frames: eta", "frames: tau", "tau.json does not exist"),
    ],
)
def test_what_is_missing_is_named(old: str, new: str, reason: str, document: Path) -> None:
    document.write_text(DOCUMENT.replace(old, new))
    with pytest.raises(InputError, match=reason):
        made(document)


def test_a_foreign_file_of_frames_is_refused(document: Path) -> None:
    write_json(document.parent / "results" / "frames" / "eta.json", {"label": "eta"})
    with pytest.raises(InputError, match="eta.json is not a slider's: KeyError"):
        made(document)


def test_the_report_of_this_repository() -> None:
    """Every figure and slider of docs/report.md is there, and every table says what made it."""
    source = ROOT / "docs" / "report.md"
    results = Results(ROOT / "results")
    text = report_page(source, results, make_report.TABLES, make_report.COMMANDS)
    found, markdown = outline(text), source.read_text()
    assert len(text) < LARGEST
    assert len(found.all("button", "zoom")) == markdown.count("![") > 20
    assert len(found.all("figure", "film")) == markdown.count("<!-- frames: ") >= 9
    captions = re.findall(r"</table></div>(.*?)</figure>", text, flags=re.DOTALL)
    assert sum("made by <code>" in caption for caption in captions) == len(
        found.all("table", "sortable")
    )
    labels = ("t", "guidance w", "steps", "eta", "alpha", "control scale")
    assert all(f"<span>{label} = <output>" in text for label in labels)


def test_commands_of_results_exist() -> None:
    for name, command in make_report.COMMANDS.items():
        assert (ROOT / "results" / f"{name}.json").is_file()
        path = command.split()[-1]
        path = path if command.startswith("bash ") else f"{path.replace('.', '/')}.py"
        assert (ROOT / path).is_file()


# ----------------------------------------------------------------------------
# A grader's page.


def grade(side: int = 28) -> Grade:
    def picture(name: str, badness: float, passed: bool) -> Picture:
        shown = torch.full((3, side, 2 * side), 7, dtype=torch.uint8)
        return Picture(name, {"image": shown}, f"<{badness}>", passed, badness)

    return Grade(
        title="digits",
        folder=Path("OUT & more"),
        passed=False,
        measures=[Measure("accuracy", "90 %", ">= 95 %", False), Measure("spread", "0.9")],
        pictures=[picture("good", 0.1, True), picture("worst", 9.0, False), picture("b", 1, False)],
        confusion={"svhn": [[9, 1], [0, 5]]},
    )


def test_a_grade_is_shown_with_the_worst_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "page.html"
    write_grade(path, grade())
    assert capsys.readouterr().out == f"wrote {path}\n"
    text = path.read_text()
    found = outline(text)
    assert re.findall(r'<p class="name">(\w+)</p><p class="(\w+)">(.*?)</p>', text) == [
        ("worst", "bad", "&lt;9.0&gt;"),
        ("b", "bad", "&lt;1&gt;"),
        ("good", "good", "&lt;0.1&gt;"),
    ]
    assert "<title>FAIL: digits</title>" in text and 'class="verdict bad">FAIL<' in text
    assert "<td>90 %</td><td>&gt;= 95 %</td>" in text and "OUT &amp; more" in text
    assert len(found.all("article", "failed")) == 2 and len(found.all("td", "wrong")) == 1
    assert found.all("div", "enlarged")


def test_large_pictures_are_scaled_down(tmp_path: Path) -> None:
    small, large = tmp_path / "a.html", tmp_path / "b.html"
    write_grade(small, grade(256))
    write_grade(large, grade(2048))
    assert abs(len(large.read_text()) - len(small.read_text())) < 2000


def test_where_no_page_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a regular file"):
        check_files(tmp_path / "file" / "page.html")
    with pytest.raises(InputError, match="it is a folder"):
        check_files(tmp_path)
    check_files(None)


def test_results_and_pages_replace_their_like_only(tmp_path: Path) -> None:
    result, page, picture = tmp_path / "a.json", tmp_path / "a.html", tmp_path / "a.png"
    result.write_text('{"mean": 1}\n')
    page.write_text("<!doctype html>")
    check_files(result, page, inputs=[tmp_path / "none.json"])
    with pytest.raises(InputError, match="is read by this program"):
        check_files(result, inputs=[tmp_path / "none.json", result])
    write_png(picture, torch.zeros(3, 4, 4, dtype=torch.uint8))
    with pytest.raises(InputError, match="holds no result"):
        check_files(picture)


# ----------------------------------------------------------------------------
# The PDF.


def test_a_pdf_needs_a_browser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page.shutil, "which", lambda name: None)
    with pytest.raises(InputError, match="a PDF needs Chromium"):
        write_pdf(tmp_path / "page.html", tmp_path / "page.pdf")


def test_a_browser_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "BROWSERS", ("false",))
    with pytest.raises(InputError, match="false did not print .*page.html: no message"):
        write_pdf(tmp_path / "page.html", tmp_path / "page.pdf")
    assert not (tmp_path / "page.pdf").exists()
