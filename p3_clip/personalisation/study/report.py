"""The documents' tables of learned concepts, made from results/p3_personalisation.json."""

import functools

from common.report import Results, Tables, table


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
        {"method": method, **part["pairs"][name]}
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
    }
    return table(rows, columns)


TABLES: Tables = {
    "concepts_single": single,
    "concepts_place": functools.partial(pair, "place"),
    "concepts_beside": functools.partial(pair, "beside"),
    "concepts_place_ring": functools.partial(pair, "place_ring"),
}
