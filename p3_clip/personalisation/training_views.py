"""The views of photos that a training shows, with their prompts."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from common.colour import CSS_COLOURS, NAMES, colour_difference
from common.data.concepts import Rgb
from common.data.shapes import VISIBLE, draw_scene, held_out_classes
from common.errors import InputError
from p3_clip.personalisation.base_kind import BaseKind
from p3_clip.personalisation.collage import (
    CutOut,
    background_colour,
    collage_view,
    cut_out,
    known_shape,
)
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

    Each concept is a group, each pair of the cut-mix, and in the collages each thing, each pair of
    things, each thing with a known shape, and one known shape or two. Raises InputError if an
    object is needed that is not found in its photo.
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


class _Placed(NamedTuple):
    """An object of a collage."""

    cut_out: CutOut
    phrases: list[str]
    """Noun phrases for it, with a placeholder if it is learned."""
    concept: int | None
    """Index of the concept that it shows; None for a shape that the model knows."""


def _collages(
    config: TextualInversion | CustomDiffusion,
    concept_data: Sequence[ConceptData],
    kind: BaseKind,
    groups: int,
    side: int,
    random: torch.Generator,
) -> Iterator[TrainingView]:
    """Collages of one thing and of two, on learned backgrounds and on named colours in turn.

    With --known-shapes also a thing beside a drawn shape, and one and two drawn shapes on learned
    backgrounds: else the model often draws a known thing twice beside a learned one.
    """
    if not config.collage:
        return
    things = [k for k, data in enumerate(concept_data) if data.is_thing]
    backgrounds = [k for k, data in enumerate(concept_data) if not (data.is_thing or data.style)]
    objects = {k: _cut_outs(concept_data[k]) for k in things}
    grounds = {k: background_colour(concept_data[k].photos[0][:3]) for k in backgrounds}
    numbers = np.random.default_rng(int(torch.randint(2**31, (), generator=random)))
    asked: list[tuple[int | None, ...]] = [(k,) for k in things]
    asked += itertools.combinations(things, 2)
    if config.known_shapes:
        asked += [(k, None) for k in things]
        asked += [(None,), (None, None)] if backgrounds else []
    for group, chosen in enumerate(asked, groups):
        for i in range(config.collage):
            on_learned = bool(backgrounds) and (i % 2 == 1 or not any(k in objects for k in chosen))
            ground = backgrounds[i // 2 % len(backgrounds)] if on_learned else None
            taken = [] if ground is None else [grounds[ground]]
            placed: list[_Placed] = []
            for k in chosen:
                if k is None:
                    placed.append(_draw_known([*taken, *_colours(placed)], numbers))
                else:
                    photo = int(numbers.integers(len(objects[k])))
                    phrases = _phrases(concept_data[k], photo)
                    placed.append(_Placed(objects[k][photo], phrases, k))
            placed = [placed[int(j)] for j in numbers.permutation(len(placed))]
            if ground is None:
                colour = _visible_colour(_colours(placed), numbers)
                own, names = CSS_COLOURS[colour], [colour, None]
            else:
                own, names = grounds[ground], [concept_data[ground].token]
            view = collage_view([each.cut_out for each in placed], own, side, numbers)
            shows = [*(each.concept for each in placed), ground]  # of each region
            learned = [j for j, k in enumerate(shows) if k is not None]
            named = [
                between.join(together)
                for together in itertools.product(*(each.phrases for each in placed))
                for between in (" next to ", " next to a ")
            ]
            prompts = [
                sentence.format(text if name is None else f"{text} with {name} background")
                for sentence in sentences(concept_data[shows[learned[0]]], kind)
                for text in _distinct(named)
                for name in names
            ]
            yield TrainingView(
                view._replace(regions=view.regions[learned]),
                group,
                prompts,
                tuple(shows[j] for j in learned),
            )


def _draw_known(others: Sequence[Rgb], random: np.random.Generator) -> _Placed:
    """A random shape that the small model knows, in a colour visibly different from `others`.

    It is none of the shapes that are held out from all trainings.
    """
    while True:
        shape = draw_scene(random, forbidden=held_out_classes()).shapes[0]
        cut_out = known_shape(shape)
        if _differs(cut_out.colour, others):
            return _Placed(cut_out, [f"{shape.colour} {shape.kind}", shape.kind], None)


def _colours(placed: Sequence[_Placed]) -> list[Rgb]:
    return [each.cut_out.colour for each in placed]


def _phrases(data: ConceptData, photo: int) -> list[str]:
    """Noun phrases for a photo: with the name of its colour, if it has one, and without."""
    return _distinct(phrase.format(data.token) for phrase in (data.phrases[photo], data.phrase))


def _distinct(texts: Iterable[str]) -> list[str]:
    """The texts in order, each once."""
    return list(dict.fromkeys(texts))


def _visible_colour(others: Sequence[Rgb], random: np.random.Generator) -> str:
    """A random colour name that differs visibly from `others`."""
    while True:
        name = NAMES[random.integers(len(NAMES))]
        if _differs(CSS_COLOURS[name], others):
            return name


def _differs(colour: Rgb, others: Sequence[Rgb]) -> bool:
    return all(colour_difference(colour, other) >= VISIBLE for other in others)


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
