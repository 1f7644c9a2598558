"""The report's page and a grader's page in a real browser: alive, quiet and readable."""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from web_page import DESKTOP, PHONE, SCREENSHOTS, Visit

from common.files import ROOT, make_folder
from common.page import Grade, Measure, Picture, write_grade, write_pdf
from common.report import Results
from common.report_page import report_page
from scripts import make_report

WINDOWS = [(DESKTOP, "light"), (DESKTOP, "dark"), (PHONE, "light"), (PHONE, "dark")]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of docs/report.md."""
    page = tmp_path_factory.mktemp("report") / "report.html"
    results = Results(ROOT / "results")
    source = ROOT / "docs" / "report.md"
    page.write_text(report_page(source, results, make_report.TABLES, make_report.COMMANDS))
    return page


@pytest.fixture(scope="module")
def graded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of twelve graded pictures, of which three are wrong."""
    pictures = [
        Picture(
            f"{k:02d}.png",
            {"image": torch.full((3, 28, 28), 20 * k, dtype=torch.uint8)},
            f"verdict {k}",
            k % 4 != 0,
            12.0 - k,
        )
        for k in range(12)
    ]
    page = tmp_path_factory.mktemp("graded") / "page.html"
    matrix = [[9 if i == j else int(i == 3 and j == 5) for j in range(10)] for i in range(10)]
    measures = [Measure("accuracy", "75 %", ">= 95 %", False)]
    write_grade(page, Grade("digits", Path("OUT"), False, measures, pictures, {"svhn": matrix}))
    return page


def quiet(seen: Visit, page: Path) -> None:
    """Asserts that nothing but the page itself was requested, and that no script failed."""
    assert seen.errors == []
    assert [url for url in seen.requests if not url.startswith("data:")] == [page.as_uri()]


@pytest.mark.parametrize(("size", "scheme"), WINDOWS)
def test_the_report_fits_every_window(
    size: tuple[int, int], scheme: str, report: Path, visit: Callable[..., Visit]
) -> None:
    seen = visit(report.as_uri(), size, color_scheme=scheme)
    width = seen.page.evaluate("document.documentElement.scrollWidth")
    assert width == size[0]  # tables and pictures scroll or shrink inside the window
    ground = seen.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(18, 21, 25)"}[scheme]
    folder = make_folder(SCREENSHOTS)
    for k, place in enumerate(("h1", "#guidance", "#interpolation-slerp-against-lerp", ".compare")):
        seen.page.locator(place).first.evaluate("e => e.scrollIntoView({behavior: 'instant'})")
        seen.page.screenshot(path=folder / f"report_{size[0]}_{scheme}_{k}.png")
    quiet(seen, report)


def test_every_slider_moves(report: Path, visit: Callable[..., Visit]) -> None:
    """Each position shows another frame; the number beside it follows."""
    seen = visit(report.as_uri())
    films = seen.page.locator("figure.film:not(.compare)")
    assert films.count() >= 7
    for film in films.all():
        slider = film.locator("input.choice")
        shown = []
        for position in ("0", slider.get_attribute("max")):
            slider.fill(position)
            shown.append(
                (film.locator(".frames").screenshot(), film.locator("output").inner_text())
            )
        assert shown[0][0] != shown[1][0] and shown[0][1] != shown[1][1]
    film = films.first
    film.locator("input.choice").fill("0")
    before = film.locator("output").inner_text()
    film.locator("button.play").click()
    seen.page.wait_for_function(
        "text => document.querySelector('.film output').value !== text", arg=before
    )
    quiet(seen, report)


def test_comparisons_uncover_the_other_picture(report: Path, visit: Callable[..., Visit]) -> None:
    seen = visit(report.as_uri())
    films = seen.page.locator("figure.film.compare")
    assert films.count() == 2
    for film in films.all():
        frames, choice = film.locator(".frames"), film.locator("select.choice")
        shown = []
        for split in ("0", "50", "100"):
            film.locator(".split").fill(split)
            shown.append(frames.screenshot())
        choice.select_option(index=1)
        shown.append(frames.screenshot())
        assert len({*shown}) == 4
    quiet(seen, report)


def test_tables_sort(report: Path, visit: Callable[..., Visit]) -> None:
    """Up, down, and back; a dash stays last."""
    seen = visit(report.as_uri())
    table = seen.page.locator("table.sortable", has_text="MSE to eta 0")

    def column(number: int) -> list[str]:
        return table.locator(f"tbody tr td:nth-child({number})").all_inner_texts()

    first = column(2)
    heading = table.locator("th:nth-child(2)")
    numbers = sorted(float(text) for text in first if text != "-")
    for order in ("ascending", "descending", None):
        heading.locator("button").click()
        assert heading.get_attribute("aria-sort") == order
        if order:
            assert column(2)[-1] == "-"
            assert [float(text) for text in column(2)[:-1]] == numbers
        numbers.reverse()
    assert column(2) == first


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_pictures_open_large(
    size: tuple[int, int], report: Path, visit: Callable[..., Visit]
) -> None:
    seen = visit(report.as_uri(), size)
    picture = seen.page.locator("button.zoom").nth(8)
    before = picture.locator("img").bounding_box()
    picture.click()
    dialog = seen.page.locator("dialog")
    assert dialog.is_visible()
    assert dialog.locator("img").bounding_box()["width"] > before["width"]
    seen.page.keyboard.press("Escape")
    assert not dialog.is_visible()


@pytest.mark.parametrize(("size", "scheme"), WINDOWS)
def test_a_graders_page(
    size: tuple[int, int], scheme: str, graded: Path, visit: Callable[..., Visit]
) -> None:
    seen = visit(graded.as_uri(), size, color_scheme=scheme)
    assert seen.page.locator("h1").inner_text() == "digits FAIL"
    assert seen.page.locator(".card .name").first.inner_text() == "00.png"
    assert seen.page.locator(".card:visible").count() == 12
    seen.screenshot(f"graded_{size[0]}_{scheme}")
    seen.page.locator("#only").check()
    assert seen.page.locator(".card:visible").count() == 3
    seen.page.locator(".card .zoom").first.click()
    assert seen.page.locator("dialog img").is_visible()
    assert seen.page.evaluate("document.documentElement.scrollWidth") == size[0]
    quiet(seen, graded)


def test_the_pdf_has_every_figure_whole(report: Path, browser: Any, tmp_path: Path) -> None:
    """No picture crosses the edge of a page of A4, and no address of this computer is inside."""
    context = browser.new_context(viewport={"width": 680, "height": 1000})
    page = context.new_page()
    page.goto(report.as_uri())
    page.emulate_media(media="print")
    width, height = 680, 990  # A4 without its margins, at 96 pixels to the inch
    boxes = page.locator("main .zoom img").evaluate_all(
        "images => images.map(i => [i.getBoundingClientRect().right, i.height])"
    )
    assert boxes and all(right <= width + 1 and tall <= height for right, tall in boxes)
    assert not page.locator("figure.film").first.is_visible()
    context.close()
    pdf = tmp_path / "report.pdf"
    write_pdf(report, pdf)
    content = pdf.read_bytes()
    assert content.startswith(b"%PDF") and b"file://" not in content
    assert 15 < len(re.findall(rb"/Type\s*/Page\b", content)) < 60
    if shutil.which("pdftoppm"):
        folder = make_folder(SCREENSHOTS)
        subprocess.run(["pdftoppm", "-r", "50", "-png", pdf, folder / "pdf"], check=True)
