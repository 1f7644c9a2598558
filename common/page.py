"""Self-contained HTML pages from the template page.html: what a grader saw, and printing to PDF.

Pictures are data URIs inside the file, and a page requests nothing. The report's page is in
report_page.py.
"""

import base64
import dataclasses
import functools
import io
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader
from torch import Tensor

from common.errors import InputError
from common.files import atomic_write, make_folder, shown
from common.images import resize, to_pil

TEMPLATE = Path(__file__).with_name("page.html")
SMALL = 64  # side, in pixels, up to which a grader's page enlarges pictures
LARGEST = 256  # largest side, in pixels, of a picture in a grader's page
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",  # with a sandbox it does not start as root; the page is the project's own
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-pdf-header-footer",
    "--generate-pdf-document-outline",
)
PRINT_SECONDS = 300


@functools.cache
def template() -> Any:
    """The macros of page.html: page, film, picture, source."""
    folder = FileSystemLoader(TEMPLATE.parent)
    return Environment(loader=folder, autoescape=True).get_template(TEMPLATE.name).module


def data_uri(image: Tensor, *, lossless: bool = True) -> str:
    """uint8 [3, H, W] as the data URI of a WebP file."""
    buffer = io.BytesIO()
    settings = {"lossless": True, "quality": 50, "method": 1} if lossless else {"quality": 90}
    to_pil(image).save(buffer, "WEBP", **settings)
    return webp_uri(buffer.getvalue())


def webp_uri(data: bytes) -> str:
    """The content of a WebP file as a data URI."""
    return f"data:image/webp;base64,{base64.b64encode(data).decode()}"


# ----------------------------------------------------------------------------
# What a grader saw.


class Measure(NamedTuple):
    """A line of the table of measures."""

    name: str
    value: str
    threshold: str = "-"
    passed: bool | None = None
    """Whether the value reaches the threshold; None if there is none."""


@dataclasses.dataclass(frozen=True)
class Picture:
    """A graded picture."""

    name: str
    images: Mapping[str, Tensor]
    """What is shown, side by side, by caption: uint8 [3, H, W]."""
    verdict: str
    passed: bool
    badness: float
    """Pictures with the highest badness come first."""


@dataclasses.dataclass(frozen=True)
class Grade:
    """The content of a grader's page."""

    title: str
    folder: Path
    passed: bool
    measures: Sequence[Measure]
    pictures: Sequence[Picture]
    confusion: Mapping[str, Sequence[Sequence[int]]] = dataclasses.field(default_factory=dict)
    """Confusion matrices by name: rows are what was asked for, columns what was recognised."""
    note: str = ""


def write_grade(path: Path, grade: Grade) -> None:
    """Writes the page of a grade and prints its path; pictures above `LARGEST` are scaled down."""
    pictures = [
        {
            "name": picture.name,
            "verdict": picture.verdict,
            "passed": picture.passed,
            "uris": {name: _shown_uri(image) for name, image in picture.images.items()},
        }
        for picture in sorted(grade.pictures, key=lambda picture: -picture.badness)
    ]
    sides = [max(image.shape) for picture in grade.pictures for image in picture.images.values()]
    page = template().page(
        title=f"{'PASS' if grade.passed else 'FAIL'}: {grade.title}",
        grade=grade,
        folder=shown(grade.folder),
        pictures=pictures,
        enlarged=max(sides, default=0) <= SMALL,
        abreast=max((len(picture.images) for picture in grade.pictures), default=1),
    )
    make_folder(path.parent)
    atomic_write(path, str(page).encode())
    print(f"wrote {path}")


def _shown_uri(image: Tensor) -> str:
    height, width = image.shape[-2:]
    longest = max(height, width)
    if longest <= LARGEST:
        return data_uri(image, lossless=longest <= SMALL)
    size = (round(height * LARGEST / longest), round(width * LARGEST / longest))
    return data_uri(resize(image, size, "area"), lossless=False)


# ----------------------------------------------------------------------------
# Printing.


def write_pdf(page: Path, pdf: Path) -> None:
    """Prints a page to a PDF file with an installed Chromium or Chrome.

    Raises InputError if there is none or if it fails.
    """
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise InputError(
            f"a PDF needs Chromium (apt-get install chromium) or Chrome on the PATH; {page} can"
            " also be printed from any browser"
        )
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        printed = Path(folder) / "page.pdf"
        command = [browser, *FLAGS, f"--user-data-dir={folder}/profile"]
        command += [f"--print-to-pdf={printed}", page.resolve().as_uri()]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=PRINT_SECONDS)
        except subprocess.TimeoutExpired:
            raise InputError(f"{browser} did not print {page} in {PRINT_SECONDS} s") from None
        if not printed.is_file():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise InputError(f"{browser} did not print {page}: {last}")
        atomic_write(pdf, printed.read_bytes())
