"""The documents' tables of learned concepts, made from results/p3_personalisation.json."""

import functools
from collections.abc import Mapping
from typing import Any, Literal

from common.report import Results, Tables, table

NOT_MEASURED = "*These sentences are not measured yet.*"
SCORES = {"image score": "image_score number1?", "text score": "text_score number1?"}


def single(results: Results) -> str:
    """Table of the images of single concepts, by method."""
    rows = [
        {"method": method, "concept": concept, **found}
        for method, part in results["p3_personalisation"]["methods"].items()
        for concept, found in part["singles"].items()
    ]
    columns = {
        "method": "method text",
        "concept": "concept text",
        "present": "presence percent",
        "colour error": "colour_error number1?",
        "image score": "image_score number1?",
        "text score, held out": "text_score number1?",
        "norm": "norm number2",
    }
    return table(rows, columns)


def pair(name: str, results: Results) -> str:
    """Table of the images of two concepts, by method; `name` is the pair's key in the results."""
    rows = [
        {"method": method, **_with_parts(part["pairs"][name])}
        for method, part in results["p3_personalisation"]["methods"].items()
        if name in part["pairs"]
    ]
    columns = {
        "method": "method text",
        "first present": "first percent",
        "second present": "second percent",
        "each in its place": "bound percent",
        "swapped": "swapped percent",
        "blended": "blended percent",
        **SCORES,
    }
    if not any("image_score" in row for row in rows):
        columns = {name: path for name, path in columns.items() if name not in SCORES}
    return table(rows, columns)


def _with_parts(found: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a pair, where "present" is given as "first" and "second"."""
    return {**found, **dict(zip(("first", "second"), found.get("present", ()), strict=False))}


def by_method(part: Literal["offered", "harder"], number: str, results: Results) -> str:
    """Table of one number of these sentences, given as "PATH FORMAT", with a column per method.

    Before they are measured it is a sentence that says so.
    """
    measured = {
        method: found[part]
        for method, found in results["p3_personalisation"]["methods"].items()
        if found.get(part)
    }
    rows = {}
    for method, found in measured.items():
        for key, numbers in found.items():
            row = rows.setdefault(key, {"sentence": f"`{numbers['prompt']}`"})
            row[method] = numbers
    columns = {"sentence": "sentence text"} | {
        method: f'"{method}".{number}?' for method in measured
    }
    return table(list(rows.values()), columns) if rows else NOT_MEASURED


TABLES: Tables = {
    "concepts_single": single,
    "concepts_place": functools.partial(pair, "place"),
    "concepts_beside": functools.partial(pair, "beside"),
    "concepts_place_ring": functools.partial(pair, "place_ring"),
    "concepts_offered": functools.partial(by_method, "offered", "bound percent"),
    "concepts_harder": functools.partial(by_method, "harder", "bound percent"),
    "concepts_harder_image": functools.partial(by_method, "harder", "image_score number1"),
    "concepts_harder_text": functools.partial(by_method, "harder", "text_score number1"),
}
