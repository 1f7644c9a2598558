"""The documents' tables of CLIP zero-shot classification, made from results/p3_clip_*.json."""

from common.report import Results, Tables, listing, table


def speed(results: Results) -> str:
    """Table of the time that feature extraction and whole programs take."""
    found = results["p3_clip_speed"]
    plain = found["seconds"]["open_clip loop"]
    rows = [
        {
            "what": name,
            "seconds": seconds,
            "rate": found["images"] / seconds,
            "over": plain / seconds,
        }
        for name, seconds in found["seconds"].items()
    ]
    columns = {
        "measured": "what text",
        "seconds": "seconds number1",
        "images/s": "rate thousands",
        "speed over the loop": "over number1",
    }
    return table(rows, columns)


CONFUSED_COLUMNS = {
    "truth": "truth text",
    "taken for": "prediction text",
    "pictures": "count number",
}
CLASS_COLUMNS = {
    "CIEDE2000 to the nearest other class": '"nearest other class of the kind" text',
    "pictures": "images thousands",
    "top-1": "acc1 percent1",
}
COLOUR_COLUMNS = {
    "CIEDE2000 to the nearest CSS colour": '"nearest CSS colour" text',
    "pictures": "images thousands",
    "top-1": "acc1 percent1",
}
EVALUATION = "p3_clip_shapes_evaluation"
TABLES: Tables = {
    "clip_confused": listing(f"{EVALUATION} confused[*]", CONFUSED_COLUMNS),
    "clip_near_classes": listing(f"{EVALUATION} colours.by_distance[*]", CLASS_COLUMNS),
    "clip_near_colours": listing(f"{EVALUATION} colours.open.by_distance[*]", COLOUR_COLUMNS),
    "clip_speed": speed,
}
