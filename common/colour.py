"""Colours: CSS names in words, CIELAB, and perceptual differences (CIEDE2000)."""

import re

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import ImageColor
from skimage.color import deltaE_ciede2000, rgb2lab

# The CSS Color Module Level 4 names (https://www.w3.org/TR/css-color-4/#named-colors) in words, as
# the fill50k prompts spell them. Of two names for one colour, one is kept: aqua (not cyan), fuchsia
# (not magenta), gray (not grey).
_NAMES = """
alice blue, antique white, aqua, aquamarine, azure, beige, bisque, black, blanched almond, blue,
blue violet, brown, burly wood, cadet blue, chartreuse, chocolate, coral, cornflower blue, cornsilk,
crimson, dark blue, dark cyan, dark golden rod, dark gray, dark green, dark khaki, dark magenta,
dark olive green, dark orange, dark orchid, dark red, dark salmon, dark sea green, dark slate blue,
dark slate gray, dark turquoise, dark violet, deep pink, deep sky blue, dim gray, dodger blue,
fire brick, floral white, forest green, fuchsia, gainsboro, ghost white, gold, golden rod, gray,
green, green yellow, honey dew, hot pink, indian red, indigo, ivory, khaki, lavender,
lavender blush, lawn green, lemon chiffon, light blue, light coral, light cyan,
light golden rod yellow, light gray, light green, light pink, light salmon, light sea green,
light sky blue, light slate gray, light steel blue, light yellow, lime, lime green, linen, maroon,
medium aqua marine, medium blue, medium orchid, medium purple, medium sea green, medium slate blue,
medium spring green, medium turquoise, medium violet red, midnight blue, mint cream, misty rose,
moccasin, navajo white, navy, old lace, olive, olive drab, orange, orange red, orchid,
pale golden rod, pale green, pale turquoise, pale violet red, papaya whip, peach puff, peru, pink,
plum, powder blue, purple, rebecca purple, red, rosy brown, royal blue, saddle brown, salmon,
sandy brown, sea green, sea shell, sienna, silver, sky blue, slate blue, slate gray, snow,
spring green, steel blue, tan, teal, thistle, tomato, turquoise, violet, wheat, white, white smoke,
yellow, yellow green
"""
NAMES = tuple(name.strip() for name in _NAMES.split(","))
CSS_COLOURS: dict[str, tuple[int, int, int]] = {
    name: ImageColor.getrgb(name.replace(" ", "")) for name in NAMES
}
"""Name in words -> (red, green, blue) in 0..255; 139 different colours."""
_BY_VALUE = {rgb: name for name, rgb in CSS_COLOURS.items()}
_SPELLINGS = {css: _BY_VALUE[ImageColor.getrgb(css)] for css in ImageColor.colormap}
"""Each of the 148 CSS names, in one lower-case word -> the name in `CSS_COLOURS` of its colour."""


def colour_name(text: str) -> str | None:
    """The name in `CSS_COLOURS` of a colour in any of the CSS spellings; None if it is no CSS name.

    The words may be joined, apart or hyphenated, in any letter case: "light sky blue" and
    "LightSkyBlue" are one colour, as are "grey" and "gray", "cyan" and "aqua", "magenta" and
    "fuchsia".
    """
    return _SPELLINGS.get(re.sub(r"[\s_-]", "", text).lower())


def to_lab(rgb: ArrayLike) -> NDArray[np.float64]:
    """sRGB in 0..255, [..., 3], to CIELAB (D65), [..., 3]."""
    return rgb2lab(np.asarray(rgb, dtype=np.float64) / 255.0)


def colour_difference(rgb: ArrayLike, other: ArrayLike) -> NDArray[np.float64]:
    """CIEDE2000 between sRGB colours in 0..255, [..., 3] each (broadcast) -> [...].

    A difference of about 1 is just visible.
    """
    # scikit-image silently gives wrong numbers for different shapes, so they are broadcast first.
    return deltaE_ciede2000(*np.broadcast_arrays(to_lab(rgb), to_lab(other)))


def nearest_name(rgb: ArrayLike) -> str:
    """The CSS colour name with the smallest CIEDE2000 to one sRGB colour in 0..255."""
    distances = colour_difference(np.asarray(rgb)[None], np.array(list(CSS_COLOURS.values())))
    return NAMES[int(distances.argmin())]
