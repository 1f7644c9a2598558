"""The views of photos that a training shows, with their prompts."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from common.colour import CSS_COLOURS, NAMES, colour_difference
from common.data.concepts import Rgb
from common.data.shapes import VISIBLE
from common.errors import InputError
from p3_clip.personalisation.base_kind import BaseKind
from p3_clip.personalisation.collage import CutOut, background_colour, collage_view, cut_out
from p3_clip.personalisation.concept_data import ConceptData, pairs_to_mix, sentences
from p3_clip.personalisation.config import CustomDiffusion, TextualInversion
from p3_clip.personalisation.photos import View, cut_mix_views, make_views, with_region


class TrainingView(NamedTuple):
    """A view with its prompts."""

    view: View
    group: int
    """Views are drawn from each group with equal probability."""
    prompts: list[str]
    """Prompts with placeholders, drawn with equal probability."""
    shown: tuple[int, ...] = ()
    """Index of the concept of each of the view's regions."""


def training_views(
    config: TextualInversion | CustomDiffusion,
    concept_data: Sequence[ConceptData],
    kind: BaseKind,
    side: int,
    random: torch.Generator,
) -> list[TrainingView]:
    """Returns all views: of single photos, then the cut-mix views, then the collages.

    Each concept is a group, each pair of the cut-mix, and each thing or pair of things of the
    collages. Raises InputError if an object is needed that is not found in its photo.
    """
    if config.object_weight != 1.0 or config.attention_weight:
        concept_data = [_with_regions(data) for data in concept_data]
    shown = list(_photo_views(config, concept_data, kind, side, random))
    shown += _cut_mix(config, concept_data, kind, len(concept_data), side, random)
    groups = 1 + max(each.group for each in shown)
    return shown + list(_collages(config, concept_data, kind, groups, side, random))


def _photo_views(
    config: TextualInversion | CustomDiffusion,
    concept_data: Sequence[ConceptData],
    kind: BaseKind,
    side: int,
    random: torch.Generator,
) -> Iterator[TrainingView]:
    for k, data in enumerate(concept_data):
        for photo, captions in zip(data.photos, data.captions, strict=True):
            prompts = [
                sentence.format(caption.format(data.token))
                for sentence in sentences(data, kind)
                for caption in captions
            ]
            for view in make_views(photo, side, config.augmentation, config.views, random):
                words = view.words if kind.knows_distance else ("",)
                yield TrainingView(
                    view, k, [word + prompt for prompt in prompts for word in words], (k,)
                )


def _cut_mix(
    config: TextualInversion | CustomDiffusion,
    concept_data: Sequence[ConceptData],
    kind: BaseKind,
    groups: int,
    side: int,
    random: torch.Generator,
) -> Iterator[TrainingView]:
    for group, pair in enumerate(pairs_to_mix(config, concept_data), groups):
        for k, other in (pair, pair[::-1]):
            left, right = concept_data[k], concept_data[other]
            for i in range(max(len(left.photos), len(right.photos))):
                first, second = i % len(left.photos), i % len(right.photos)
                long = right.captions[second][0].format(right.token)
                prompts = [
                    sentence.format(f"{phrase} next to {caption}")
                    for sentence in sentences(left, kind)
                    for phrase in _phrases(left, first)
                    for caption in _distinct((*_phrases(right, second), long))
                ]
                for view in cut_mix_views(
                    left.photos[first], right.photos[second], side, config.cut_mix, random
                ):
                    yield TrainingView(view, group, prompts, (k, other))


def _collages(
    config: TextualInversion | CustomDiffusion,
    concept_data: Sequence[ConceptData],
    kind: BaseKind,
    groups: int,
    side: int,
    random: torch.Generator,
) -> Iterator[TrainingView]:
    """Collages of one thing and of two, on learned backgrounds and on named colours in turn."""
    if not config.collage:
        return
    things = [k for k, data in enumerate(concept_data) if data.is_thing]
    backgrounds = [k for k, data in enumerate(concept_data) if not (data.is_thing or data.style)]
    objects = {k: _cut_outs(concept_data[k]) for k in things}
    grounds = {k: background_colour(concept_data[k].photos[0][:3]) for k in backgrounds}
    numbers = np.random.default_rng(int(torch.randint(2**31, (), generator=random)))
    asked = [(k,) for k in things] + list(itertools.combinations(things, 2))
    for group, chosen in enumerate(asked, groups):
        for i in range(config.collage):
            order = numbers.permutation(chosen).tolist()
            photos = [int(numbers.integers(len(objects[k]))) for k in order]
            cut_outs = [objects[k][photo] for k, photo in zip(order, photos, strict=True)]
            phrases = [
                _phrases(concept_data[k], photo) for k, photo in zip(order, photos, strict=True)
            ]
            named = [
                between.join(together)
                for together in itertools.product(*phrases)
                for between in (" next to ", " next to a ")
            ]
            if backgrounds and i % 2:
                ground = backgrounds[i // 2 % len(backgrounds)]
                view = collage_view(cut_outs, grounds[ground], side, numbers)
                names, shown = [concept_data[ground].token], (*order, ground)
            else:
                colour = _visible_colour(cut_outs, numbers)
                view = collage_view(cut_outs, CSS_COLOURS[colour], side, numbers)
                view = view._replace(regions=view.regions[:-1])
                names, shown = [colour, None], tuple(order)
            captions = [
                text if name is None else f"{text} with {name} background"
                for text in _distinct(named)
                for name in names
            ]
            prompts = [
                sentence.format(caption)
                for sentence in sentences(concept_data[order[0]], kind)
                for caption in captions
            ]
            yield TrainingView(view, group, prompts, shown)


def _phrases(data: ConceptData, photo: int) -> list[str]:
    """Noun phrases for a photo: with the name of its colour, if it has one, and without."""
    return _distinct(phrase.format(data.token) for phrase in (data.phrases[photo], data.phrase))


def _distinct(texts: Iterable[str]) -> list[str]:
    """The texts in order, each once."""
    return list(dict.fromkeys(texts))


def _visible_colour(things: Sequence[CutOut], random: np.random.Generator) -> str:
    """A random colour name that differs visibly from all things."""
    while True:
        name = NAMES[random.integers(len(NAMES))]
        colour: Rgb = CSS_COLOURS[name]
        if all(colour_difference(colour, thing.colour) >= VISIBLE for thing in things):
            return name


def _cut_outs(data: ConceptData) -> list[CutOut]:
    found = [cut_out(photo[:3]) for photo in data.photos]
    _check_found([each is not None for each in found], data)
    return found


def _with_regions(data: ConceptData) -> ConceptData:
    """The concept, whose photos have its region as a fourth channel."""
    if data.style:  # it covers the whole photo
        photos = [torch.cat([photo, torch.full_like(photo[:1], 255)]) for photo in data.photos]
    else:
        photos = [with_region(photo, of_background=not data.is_thing) for photo in data.photos]
    _check_found([bool(photo[3].any()) for photo in photos], data)
    return dataclasses.replace(data, photos=photos)


def _check_found(found: Sequence[bool], data: ConceptData) -> None:
    """Raises InputError if the object of a photo was not found."""
    if not all(found):
        raise InputError(
            f"no object stands out from the background of photo {found.index(False) + 1} of"
            f" {data.token}: --collage, --object-weight and --attention-weight need objects"
            " of one colour on plain backgrounds"
        )
