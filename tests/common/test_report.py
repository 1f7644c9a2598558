"""Slots and claims of Markdown documents: filled, checked, and refused with a file and a line."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from common import cli
from common.errors import InputError
from common.files import write_json
from common.report import Results, check_claim, evaluate, fill, formatted, listing, select, table

ROWS = [
    {"steps": 50, "eta": 0.0, "name": "two words", "sampling": {"interval": [0, 999]}, "mse": 4.0},
    {"steps": 50, "eta": 1.0, "name": "b", "sampling": {"interval": [150, 700]}, "mse": 8.0},
    {"steps": 20, "eta": 0.0, "name": "c", "sampling": {"interval": [0, 999]}, "guess": True},
]
CONTENT = {
    "accuracy": 0.976,
    "label": "x0",
    "images": 2500,
    "none": None,
    "by name": {"a, b": {"value": 1.5}, "c": {"value": 2.5}},
    "matrix": [[1, 2], [3, 4]],
    "rows": ROWS,
}


@pytest.fixture
def results(tmp_path: Path) -> Results:
    write_json(tmp_path / "results" / "p1.json", CONTENT)
    return Results(tmp_path / "results")


# ----------------------------------------------------------------------------
# Paths, expressions and claims.


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("accuracy", [0.976]),
        ("matrix[1][0]", [3]),
        ("matrix.1.-1", [4]),
        ("matrix[*][0]", [1, 3]),
        ('"by name"."a, b".value', [1.5]),
        ('"by name"[*].value', [1.5, 2.5]),
        ('"by name"[value>2].value', [2.5]),
        ("rows[eta=0, steps=50].mse", [4.0]),
        ("rows[steps=50].mse", [4.0, 8.0]),
        ("rows[name=two words].mse", [4.0]),
        ('rows[name="two words"].mse', [4.0]),
        ("rows[sampling.interval.0=150].mse", [8.0]),
        ("rows[steps>=50,eta<0.5].mse", [4.0]),
        ("rows[steps!=50].guess", [True]),
        ("rows[guess=true].steps", [20]),
        ("rows[guess=1].steps", []),
        ("rows[absent=1].mse", []),
    ],
)
def test_a_path_selects(path: str, found: list[Any]) -> None:
    assert select(CONTENT, path) == found


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("acuracy", "there is no 'acuracy', only accuracy, label"),
        ("rows[7].mse", "there is no item 7 in a list of 3"),
        ("rows[*].mse", "there is no 'mse', only steps"),
        ("rows[eta].mse", r"\[eta\] is neither a number"),
        ("rows[eta=0,].mse", "neither a number"),
        ("rows[].mse", "neither a number"),
        ("label[a=1]", "needs a list or an object"),
        ("label.a", "there is no 'a'"),
        ("rows[eta=0", "is not a path"),
        ("rows..mse", "is not a path"),
        ("", "is not a path"),
    ],
)
def test_a_wrong_path_is_refused(path: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        select(CONTENT, path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3.0),
        ("-1e-3", -0.001),
        ("p1 accuracy", 0.976),
        ("p1 rows[eta=1].mse / p1 rows[eta=0, steps=50].mse", 2.0),
        ("1 - p1 accuracy", 1 - 0.976),
        ("min(p1 rows[steps=50].mse)", 4.0),
        ("max( p1 rows[steps=50].mse ) * 2", 16.0),
        ("count(p1 rows[*])", 3),
        ("count(p1 rows[steps=7])", 0),
    ],
)
def test_an_expression_has_a_value(text: str, value: float, results: Results) -> None:
    assert evaluate(text, results) == value


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("p1", "cannot read 'p1'"),
        ("p1 rows[eta=0", "cannot read"),
        ("p1 accuracy *2", "cannot read '\\*2'"),
        ("1 + 2 + 3", "cannot read '\\+ 3'"),
        ("mean(p1 matrix[*])", "cannot read"),
        ("p1 rows[steps=50].mse", "p1: rows.* selects 2 values, not one"),
        ("p1 rows[steps=7].mse", "selects 0 values, not one"),
        ("min(p1 rows[steps=7].mse)", "selects nothing"),
        ("p1 label / 2", "'x0' / 2.0 is not a number"),
        ("1 / 0", "is not a number"),
        ("absent accuracy", "absent: .*absent.json does not exist"),
    ],
)
def test_a_wrong_expression_is_refused(text: str, reason: str, results: Results) -> None:
    with pytest.raises(InputError, match=reason):
        evaluate(text, results)


@pytest.mark.parametrize(
    "claim",
    [
        "p1 accuracy >= 0.97",
        "0.9 < p1 accuracy <= 1",
        "p1 images == 2500; p1 label != 3",
        "p1 rows[eta=1].mse ==\n max(p1 rows[steps=50].mse)",
        "p1 rows[eta=1].mse > 1.5 * p1 rows[eta=0, steps=50].mse",
    ],
)
def test_a_true_claim_passes(claim: str, results: Results) -> None:
    check_claim(claim, results)


@pytest.mark.parametrize(
    ("claim", "reason"),
    [
        ("p1 accuracy >= 0.98", "the claim 'p1 accuracy >= 0.98' is false: 0.976 >= 0.98"),
        ("0.9 < p1 accuracy < 0.95", "is false: 0.976 < 0.95"),
        ("p1 images == 2500; p1 images < 3", "'p1 images < 3' is false"),
        ("p1 accuracy", "compares nothing"),
        ("p1 accuracy >= ", "cannot read '>='"),
        ("p1 accuracy => 1", "cannot read"),
        ("p1 accuracy ~ 1", "cannot read '~ 1'"),
        ("p1 label < 1", "cannot be compared"),
        ("p1 label < 1;", "cannot be compared"),
    ],
)
def test_a_false_or_unreadable_claim_is_refused(claim: str, reason: str, results: Results) -> None:
    with pytest.raises(InputError, match=reason):
        check_claim(claim, results)


def test_formats() -> None:
    values = {"percent": 0.976, "percent1": 0.976, "number2": 3.0, "number": 50, "thousands": 2500}
    assert [formatted(value, name) for name, value in values.items()] == [
        "98 %",
        "97.6 %",
        "3.00",
        "50",
        "2,500",
    ]
    assert formatted(33.96, "decibel") == "34.0 dB" and formatted(0.0012, "points") == "+0.1"
    assert formatted(7.96, "seconds") == "8.0 s" and formatted("x0", "text") == "x0"
    for value, name in (("x0", "number"), (True, "number"), (None, "number2"), (1.0, "text")):
        with pytest.raises(InputError, match="cannot be written as"):
            formatted(value, name)
    with pytest.raises(InputError, match="there is no format 'percents', only text, number"):
        formatted(1.0, "percents")


def test_a_table_has_a_line_for_each_row(results: Results) -> None:
    columns = {"eta": "eta number", "MSE": "mse number1?", "name": lambda row: row["name"].upper()}
    lines = ["| eta | MSE | name |", "| --- | --- | --- |", "| 0 | 4.0 | TWO WORDS |"]
    assert table(ROWS[:1], columns) == "\n".join(lines)
    assert listing("p1 rows[guess=true]", columns)(results).endswith("\n| 0 | - | C |")
    with pytest.raises(InputError, match="there is no 'mse'"):
        table(ROWS, {"MSE": "mse number1"})


# ----------------------------------------------------------------------------
# Documents.

TABLES = {"eta": lambda results: f"| {len(results['p1']['rows'])} |"}
DOCUMENT = """# Title

Right: <!-- = p1 accuracy percent1 -->?<!-- / -->, not less. <!-- claim: p1 accuracy >= 0.97;
p1 images == 2500 --> On <!-- = p1 images thousands -->12<!-- / --> <!-- = 3 number --><!-- / -->.

<!-- table: eta -->
| old |
<!-- end -->

Text between, in `code <!-- = nothing here -->` and

```
<!-- claim: 1 > 2 -->
```

<!-- claim: 1 < 2 -->

<!-- table: eta -->
<!-- end -->

<!-- An ordinary comment. -->
![picture](picture.png) and [link](https://example.org/x) and [part](#title)
"""


@pytest.fixture
def document(tmp_path: Path) -> Path:
    (tmp_path / "picture.png").touch()
    path = tmp_path / "page.md"
    path.write_text(DOCUMENT)
    return path


def test_every_slot_is_filled_once_and_the_rest_is_kept(document: Path, results: Results) -> None:
    text, wrong, stale = fill(document, results, TABLES)
    assert wrong == []
    assert [line.split(":")[0] for line in stale] == ["3", "4", "4", "6", "18"]
    assert stale[0] == "3: = p1 accuracy percent1 is out of date"
    expected = DOCUMENT.replace("-->?<", "-->97.6 %<").replace("-->12<", "-->2,500<")
    expected = expected.replace("= 3 number --><", "= 3 number -->3<").replace("| old |", "| 3 |")
    assert text == expected.replace("eta -->\n<!-- end", "eta -->\n| 3 |\n<!-- end")
    document.write_text(text)
    assert fill(document, results, TABLES) == (text, [], [])


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("is <!-- = p1 acuracy percent -->1<!-- / -->", "p1: there is no 'acuracy'"),
        ("is <!-- = gone accuracy percent -->1<!-- / -->", "gone.json does not exist"),
        ("is <!-- = p1 accuracy -->1<!-- / -->", "cannot read 'p1'"),
        ("is <!-- = p1 accuracy percents -->1<!-- / -->", "there is no format 'percents'"),
        (
            "is <!-- = p1 accuracy percent -->1 and on",
            "is not a slot, or its opening or closing comment is missing",
        ),
        ("is 1<!-- / --> and on", "is not a slot, or its opening or closing comment is missing"),
        ("is <!-- clam: p1 accuracy > 2 --> so", "is not a slot"),
        ("is <!-- claim: p1 accuracy > 2 --> so", "is false: 0.976 > 2.0"),
        (
            "is <!-- claim: p1 accuracy > 2",
            "is not a slot, or its opening or closing comment is missing",
        ),
        ("<!-- = p1 accuracy percent -->1<!-- / -->", "must not begin a line"),
        ("<!-- claim: p1 accuracy < 2 --> so", "must not begin a line"),
        ("![](absent.png)", "the link points to absent.png, which does not exist"),
        ("<!-- frames: absent -->", "there are no frames 'absent' in "),
        ("[page](docs/absent.md#part)", "the link points to docs/absent.md"),
        ("<!-- table: none -->\n<!-- end -->", "there is no table 'none', only eta, broken"),
        (
            "<!-- table: eta -->\n| 1 |",
            "is not a slot, or its opening or closing comment is missing",
        ),
        ("<!-- table: broken -->\n<!-- end -->", "broken does not fit its results: KeyError"),
    ],
)
def test_what_is_wrong_is_said_with_its_line_and_left_alone(
    line: str, reason: str, tmp_path: Path, results: Results
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Title\n\nFirst\n{line}\nlast\n")
    tables = TABLES | {"broken": lambda results: results["p1"]["absent"]}
    text, wrong, stale = fill(page, results, tables)
    assert text == page.read_text() and stale == []
    assert len(wrong) == 1 and wrong[0].startswith("4: ") and reason in wrong[0]


# ----------------------------------------------------------------------------
# The program.


@pytest.fixture(scope="module")
def make_report() -> ModuleType:
    from scripts import make_report

    return make_report


@pytest.fixture
def checkout(
    make_report: ModuleType,
    document: Path,
    results: Results,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A checkout with a README, a document in docs/ and a model card, all of them stale."""
    root = document.parent
    for name in ("README.md", "docs/report.md", "checkpoints/model/README.md"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("# Title\n\nIt is <!-- = p1 accuracy percent -->?<!-- / -->.\n")
    document.unlink()
    monkeypatch.setattr(make_report, "ROOT", root)
    return root


def run(make_report: ModuleType, *argv: str) -> int:
    try:
        cli.run(make_report.main, make_report.Config, list(argv))
    except SystemExit as stop:
        return int(stop.code)
    return 0


def test_the_documents_of_this_repository_pass(make_report: ModuleType) -> None:
    make_report.main(make_report.Config(check=True))


def test_a_stale_number_fails_the_check_and_is_filled(
    make_report: ModuleType, checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (checkout / "README.md").read_text()
    assert run(make_report, "--check") == 2
    error = capsys.readouterr().err
    for name in ("README.md", "docs/report.md", "checkpoints/model/README.md"):
        assert (
            f"{name}:3: = p1 accuracy percent is out of date: run python3 -m scripts.make_" in error
        )
    assert "error: 3 slots of the documents are wrong" in error
    assert (checkout / "README.md").read_text() == before
    assert run(make_report) == 0 and "wrote docs/report.md: 1 slots" in capsys.readouterr().out
    assert (checkout / "README.md").read_text() == before.replace("?", "98 %")
    assert run(make_report, "--check") == 0 and run(make_report) == 0
    assert capsys.readouterr().out == f"wrote {checkout / 'report.html'}\n"
    assert "It is 98 %" in (checkout / "report.html").read_text()


def test_the_check_writes_no_page(
    make_report: ModuleType, checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(make_report, "--check", "--pdf") == 2
    assert "--check writes nothing" in capsys.readouterr().err
    assert run(make_report, "--html", str(checkout / "docs")) == 2
    assert "it is a folder" in capsys.readouterr().err
    assert run(make_report, "--html", str(checkout / "new" / "a.html")) == 0
    assert (checkout / "new" / "a.html").is_file() and not (checkout / "report.html").exists()


@pytest.mark.parametrize("argv", [(), ("--check",)])
@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("So. <!-- claim: p1 accuracy < 0.9 -->", "is false: 0.976 < 0.9"),
        ("![](figures/absent.png)", "the link points to figures/absent.png"),
        ("It is <!-- = gone x percent -->1<!-- / -->", "gone.json does not exist"),
        ("It is <!-- = p1 rows[eta=].mse number -->1<!-- / -->", "[eta=] is neither"),
    ],
)
def test_a_false_claim_a_missing_figure_or_result_ends_in_one_sentence(
    argv: tuple[str, ...],
    line: str,
    reason: str,
    make_report: ModuleType,
    checkout: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(make_report) == 0
    with open(checkout / "docs" / "report.md", "a") as file:
        file.write(f"\n{line}\n")
    capsys.readouterr()
    assert run(make_report, *argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: docs/report.md:5: ") and reason in error
    assert error.count("\n") == 1
