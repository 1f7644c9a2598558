"""Sentences with the drawn concepts, and what a picture of each must show.

Every sentence that the project offers (`scripts/make_concepts.py`, the web demo, the documents) is
in `SENTENCES`, so the study measures what users try.
"""

import dataclasses
from collections.abc import Mapping
from string import Formatter
from typing import NamedTuple

from common.colour import CSS_COLOURS
from common.data.concepts import DRAWN, MAUVE, SLATE, WINE
from common.metrics.shapes import RING

TOKENS = {name: f"<new{number}>" for number, name in enumerate(DRAWN, 1)}
"""The placeholders of the drawn concepts in the shipped weights."""


Colour = tuple[float, float, float]
"""RGB, each in 0..255."""


class Asked(NamedTuple):
    """An object that a sentence asks for."""

    shape: str
    """One of `common.data.shapes.KINDS`, or RING."""
    colour: Colour | None = None
    """Its colour; None: any."""


@dataclasses.dataclass(frozen=True)
class Sentence:
    """A sentence, and what a picture of it must show: these objects and no others."""

    text: str
    """The sentence, with the names of drawn concepts in braces: "a {wine} circle"."""
    objects: tuple[Asked, ...]
    """The objects asked for."""
    background: Colour | None = None
    """The background's colour; None: any."""

    @property
    def names(self) -> tuple[str, ...]:
        """The drawn concepts in the sentence, in order."""
        return tuple(name for _, name, *_ in Formatter().parse(self.text) if name)

    @property
    def colours(self) -> tuple[Colour | None, ...]:
        """The colours of the objects, then of the background."""
        return (*(each.colour for each in self.objects), self.background)

    def prompt(self, tokens: Mapping[str, str]) -> str:
        """The sentence with the placeholder of each concept."""
        return self.text.format(**tokens)

    @property
    def in_known_words(self) -> str:
        """The sentence with a known word of similar meaning for each concept."""
        return self.text.format(**{name: DRAWN[name].word for name in self.names})


def _named(shape: str, colour: str) -> Asked:
    return Asked(shape, CSS_COLOURS[colour])


_ANY_CIRCLE, _WINE_CIRCLE = Asked("circle"), Asked("circle", WINE)
_TRIANGLE, _ANY_RING = Asked("triangle", SLATE), Asked(RING)
_RED_SQUARE = _named("square", "red")
_WHITE, _PINK, _SKY_BLUE = (CSS_COLOURS[name] for name in ("white", "pink", "sky blue"))

SINGLES = {
    "wine": Sentence("a {wine} circle with white background", (_WINE_CIRCLE,), _WHITE),
    "mauve": Sentence(
        "a white circle with {mauve} background", (_named("circle", "white"),), MAUVE
    ),
    "slate_triangle": Sentence("a {slate_triangle} with white background", (_TRIANGLE,), _WHITE),
    "ring": Sentence("a {ring} with white background", (_ANY_RING,), _WHITE),
}
"""Each drawn concept by itself, like the caption of its first photo."""
ALONE = {
    "wine": Sentence("a {wine} circle", (_WINE_CIRCLE,)),
    "mauve": Sentence("a circle with {mauve} background", (_ANY_CIRCLE,), MAUVE),
    "slate_triangle": Sentence("a {slate_triangle}", (_TRIANGLE,)),
    "ring": Sentence("a {ring}", (_ANY_RING,)),
}
"""Each drawn concept and nothing else."""
BESIDE_SQUARE = {
    "wine": Sentence("red square next to {wine} circle", (_RED_SQUARE, _WINE_CIRCLE)),
    "mauve": Sentence(
        "red square next to circle with {mauve} background", (_RED_SQUARE, _ANY_CIRCLE), MAUVE
    ),
    "slate_triangle": Sentence("red square next to {slate_triangle}", (_RED_SQUARE, _TRIANGLE)),
    "ring": Sentence("red square next to {ring}", (_RED_SQUARE, _ANY_RING)),
}
"""Each drawn concept in the first validation prompt (`templates.HELD_OUT_SHAPES`)."""
MORE = {
    "wine_on_pink": Sentence("a {wine} circle with pink background", (_WINE_CIRCLE,), _PINK),
    "ring_on_sky_blue": Sentence("a {ring} with sky blue background", (_ANY_RING,), _SKY_BLUE),
    "violet_on_mauve": Sentence(
        "a violet circle with {mauve} background", (_named("circle", "violet"),), MAUVE
    ),
}
"""One drawn concept with a known colour."""
PAIRS = {
    "place": Sentence("a {wine} circle with {mauve} background", (_WINE_CIRCLE,), MAUVE),
    "beside": Sentence("a {slate_triangle} next to a {wine} circle", (_TRIANGLE, _WINE_CIRCLE)),
    "place_ring": Sentence("a {ring} with {mauve} background", (_ANY_RING,), MAUVE),
}
"""Two drawn concepts."""
HARDER = {
    "three": Sentence(
        "a {slate_triangle} next to a {wine} circle with {mauve} background",
        (_TRIANGLE, _WINE_CIRCLE),
        MAUVE,
    ),
    "ring_beside_circle": Sentence("a {ring} next to a {wine} circle", (_ANY_RING, _WINE_CIRCLE)),
    "ring_beside_triangle": Sentence("a {ring} next to a {slate_triangle}", (_ANY_RING, _TRIANGLE)),
    "three_with_ring": Sentence(
        "a {ring} next to a {slate_triangle} with {mauve} background",
        (_ANY_RING, _TRIANGLE),
        MAUVE,
    ),
    **{
        f"{colour.replace(' ', '_')}_ring": Sentence(
            f"a {colour} {{ring}}", (_named(RING, colour),)
        )
        for colour in ("navy", "red", "dark green", "chocolate")
    },
}
"""Three drawn concepts, the ring beside another, and the ring in colours that no photo shows."""
OFFERED = {
    **{f"{name}_alone": sentence for name, sentence in ALONE.items()},
    **{f"{name}_beside_square": sentence for name, sentence in BESIDE_SQUARE.items()},
    **MORE,
}
"""The sentences with one drawn concept besides SINGLES, by key."""
SENTENCES = SINGLES | OFFERED | PAIRS | HARDER
"""All sentences by key."""
EXAMPLES = tuple(
    SENTENCES[key].prompt(TOKENS)
    for key in ("wine_on_pink", "place", "ring_on_sky_blue", "violet_on_mauve")
)
"""Prompts of the shipped concepts in the web demo."""
