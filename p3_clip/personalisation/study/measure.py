"""Measures from pixels whether a picture shows what a sentence asks for.

A `Sentence` asks for objects, each of a shape and perhaps a colour, and perhaps for a colour of the
background. A picture is in place if it shows exactly as many objects as asked for, if they can be
assigned one to one so that each has its shape and its colour, and if the background has its colour.
An object has the shape that fits it best (`common.metrics.shapes.recognise`), if that fits well,
and a ring counts only if the background shows through its hole. Two colours are equal within NEAR.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import ndimage
from skimage.color import deltaE_ciede2000
from torch import Tensor

from common.colour import colour_difference, to_lab
from common.images import resize
from common.metrics.segmentation import (
    NO_OBJECT_ERROR,
    SIZE,
    inner_region,
    median_colour,
    segment,
    separate,
)
from common.metrics.shapes import RING, recognise
from p3_clip.personalisation.sentences import Asked, Colour, Sentence

NEAR = 10.0  # CIEDE2000 within which two colours count as equal
ONE_COLOUR = 5.0  # CIEDE2000 within which two regions are parts of one object, or of the background
RIM = 1.5  # pixels of the image's own resolution: half the width of a region that is only an edge
MIN_AREA = 0.005  # least area of an object, as a fraction of the image's


@dataclasses.dataclass(frozen=True)
class Object:
    """One object of an image."""

    colour: Colour | None
    """Its median colour; None if it is too thin to measure."""
    mask: Tensor
    """Its pixels, with those of objects on it, bool [SIZE, SIZE]."""
    on_background: bool
    """Whether all that shows through holes in it has the background's colour."""

    @functools.cached_property
    def shape(self) -> str | None:
        """One of `common.data.shapes.KINDS`, or RING; None if no shape fits well."""
        fit = recognise(self.mask)
        good = fit.shows(fit.kind) and (fit.kind != RING or self.on_background)
        return fit.kind if good else None

    def is_as(self, asked: Asked) -> bool:
        """Whether it has the shape and the colour asked for."""
        return _equal(self.colour, asked.colour) and self.shape == asked.shape


class Seen(NamedTuple):
    """The objects and the background found in an image."""

    objects: list[Object]
    background: Colour | None
    """Its median colour; None if there is no background."""


class Judgement(NamedTuple):
    """How an image shows what a sentence asks for."""

    bound: bool
    """All is in place, and nothing else is there."""
    present: tuple[bool, ...]
    """Whether each object asked for is anywhere in the image, then the background if asked for."""
    swapped: bool
    """It is not, but with the colours asked for exchanged among objects and background it is."""
    blended: bool
    """An object or the background has a colour between two of those asked for."""


def look(picture: Tensor, colours: int) -> Seen:
    """Finds the objects, of up to `colours` colours, and the background of uint8 [3, S, S].

    One colour more is looked for, so that an object which was not asked for is found too.
    """
    large = resize(picture, SIZE, "nearest")
    side = picture.shape[-1]
    labels = _without_rims(segment(picture, colours + 1), side)
    labels = _one_label_per_colour(labels, large, side)
    background = median_colour(large, inner_region(labels == 0, side))
    objects = [
        _object(large, labels, part, background, side)
        for label in range(1, colours + 2)
        for part in separate(labels == label, MIN_AREA)
    ]
    return Seen(objects, background)


def judge(sentence: Sentence, seen: Seen) -> Judgement:
    """Judges what was found in an image by a sentence."""
    shapes, colours = [asked.shape for asked in sentence.objects], sentence.colours
    bound = in_place(shapes, colours, seen)
    others = {*itertools.permutations(colours)} - {colours}
    found = [each.colour for each in seen.objects] + [seen.background] * bool(seen.objects)
    present = [any(each.is_as(asked) for each in seen.objects) for asked in sentence.objects]
    if sentence.background is not None:
        present.append(bool(seen.objects) and _equal(seen.background, sentence.background))
    return Judgement(
        bound,
        tuple(present),
        not bound and any(in_place(shapes, exchanged, seen) for exchanged in others),
        any(
            is_between(colour, *two)
            for colour in found
            if colour is not None
            for two in itertools.combinations({*colours} - {None}, 2)
        ),
    )


def look_for(sentence: Sentence, picture: Tensor) -> Seen:
    """What is found in an image of a sentence; see `look`."""
    named = {asked.colour for asked in sentence.objects} - {None}
    return look(picture, len(named) + sum(asked.colour is None for asked in sentence.objects))


def in_place(shapes: Sequence[str], colours: Sequence[Colour | None], seen: Seen) -> bool:
    """Whether the image shows exactly objects of these shapes and colours on the background.

    The background's colour is the last of `colours`; a colour of None may be any.
    """
    asked = [Asked(*each) for each in zip(shapes, colours[:-1], strict=True)]
    return (
        len(seen.objects) == len(asked)
        and _equal(seen.background, colours[-1])
        and any(
            all(each.is_as(one) for each, one in zip(order, asked, strict=True))
            for order in itertools.permutations(seen.objects)
        )
    )


def colour_error(colour: Colour, seen: Seen, *, of_background: bool = False) -> float:
    """CIEDE2000 between a colour asked for and the nearest of the objects, or the background.

    It is NO_OBJECT_ERROR, 50, if the image shows no object.
    """
    colours = [seen.background] if of_background else [each.colour for each in seen.objects]
    found = [each for each in colours if each is not None and seen.objects]
    return min((float(colour_difference(each, colour)) for each in found), default=NO_OBJECT_ERROR)


# ----------------------------------------------------------------------------
# Colours and regions.


def is_between(colour: Colour, one: Colour, other: Colour) -> bool:
    """Whether a colour is a mixture of two others, all RGB in 0..255.

    It must lie within NEAR of the line between them in CIELAB, in the middle half of the line.
    """
    at, start, end = (to_lab(rgb) for rgb in (colour, one, other))
    along = float((at - start) @ (end - start) / ((end - start) @ (end - start)))
    return (
        0.25 <= along <= 0.75 and float(deltaE_ciede2000(at, start + along * (end - start))) <= NEAR
    )


def _equal(colour: Colour | None, asked: Colour | None, within: float = NEAR) -> bool:
    """Whether a colour was found and is the one asked for; None asks for any."""
    if colour is None or asked is None:
        return asked is None
    return float(colour_difference(colour, asked)) <= within


def _without_rims(labels: Tensor, side: int) -> Tensor:
    """The labels of `segment`, where thin regions get the label nearest to them.

    Where fewer colours are there than looked for, the blend along an edge becomes a region.
    """
    known, thick = labels.numpy(), np.zeros(labels.shape, dtype=bool)
    for label in np.unique(known):
        parts, count = ndimage.label(known == label)
        depth = ndimage.distance_transform_edt(parts > 0)
        deepest = ndimage.maximum(depth, parts, np.arange(count + 1))
        thick |= (deepest > RIM * SIZE / side)[parts] & (parts > 0)
    y, x = ndimage.distance_transform_edt(~thick, return_distances=False, return_indices=True)
    return torch.from_numpy(known[y, x]) if thick.any() else labels


def _one_label_per_colour(labels: Tensor, picture: Tensor, side: int) -> Tensor:
    """The labels of `segment`, where those of almost equal colours become one, the lowest."""
    merged, kept = labels.clone(), {}
    for label in labels.unique().tolist():
        colour = median_colour(picture, inner_region(labels == label, side))
        same = [k for k, other in kept.items() if other and _equal(colour, other, ONE_COLOUR)]
        if same:
            merged[labels == label] = same[0]
        else:
            kept[label] = colour
    return merged


def _object(
    picture: Tensor, labels: Tensor, part: Tensor, background: Colour | None, side: int
) -> Object:
    """The object with the pixels `part`, bool [SIZE, SIZE]; `side` is the model's own."""
    filled = torch.from_numpy(ndimage.binary_fill_holes(part.numpy()))
    mask = part | (filled & (labels != 0))
    through = median_colour(picture, inner_region(filled & ~mask, side))
    return Object(
        median_colour(picture, inner_region(part, side)),
        mask,
        background is not None and _equal(through, background),
    )


def rates(judgements: Sequence[Judgement]) -> dict[str, Any]:
    """Fraction of the images for which each field of `Judgement` is true.

    "present" is a list, and "bound_images" tells which images are in place.
    """
    bound, present, swapped, blended = zip(*judgements, strict=True)
    return {
        "bound": fmean(bound),
        "present": [fmean(part) for part in zip(*present, strict=True)],
        "swapped": fmean(swapped),
        "blended": fmean(blended),
        "bound_images": list(bound),
    }
