"""The prompts and words that personalisation uses with each kind of base model."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from common.data.examples import (
    VOCABULARY,
    Examples,
    describe,
    described_scenes,
    drawn_examples,
)
from common.latent.load import kind_of
from p3_clip.personalisation import templates


@dataclasses.dataclass(frozen=True)
class BaseKind:
    """Prompts and words that suit the text encoder of a kind of base model.

    Each prompt template contains {} once, where the concept goes.
    """

    object_sentences: tuple[str, ...]
    """Training prompts of an object."""
    style_sentences: tuple[str, ...]
    """Training prompts of a style."""
    held_out_object: tuple[str, ...]
    """Validation prompts of an object, by which checkpoints are compared; never trained on."""
    held_out_style: tuple[str, ...]
    """Validation prompts of a style; never trained on."""
    merge_sentences: tuple[str, ...]
    """Prompts in which a concept must keep its own keys and values when results are merged."""
    regularization_prompts: Callable[[Sequence[str], int, int], list[str]]
    """(the concepts in known words, count, seed) -> `count` regularisation prompts."""
    drawn_scenes: Callable[[int, int, int], Examples] | None
    """(count, side, seed) -> `count` drawn pictures with captions, like those that the model was
    trained on; None if it was trained on photos."""
    merge_captions: Callable[[int, int], list[str]]
    """(count, seed) -> `count` captions of all kinds of things, whose keys and values should change
    least when results are merged."""
    vocabulary: tuple[str, ...] | None
    """The words whose token embeddings the base model's training changed; None: all words."""
    rare_words: tuple[str, ...]
    """The words whose embeddings initialise Custom Diffusion, in turn; if there are none, each
    concept's own word does."""
    knows_distance: bool
    """Whether it knows "far away", "close up" and the other words for the scale of a view."""


def base_kind(checkpoint: Path) -> BaseKind:
    """Returns `SMALL` if `checkpoint` is a small model of this project, else `STABLE_DIFFUSION`."""
    return SMALL if kind_of(checkpoint) == "small" else STABLE_DIFFUSION


def _photos(described: Sequence[str], count: int, seed: int) -> list[str]:
    """Returns "photo of a ..." for the concepts in turn (Section 3.2 of arXiv:2212.04488).

    `seed` is not used.
    """
    return [f"photo of a {described[number % len(described)]}" for number in range(count)]


def _captions(count: int, seed: int) -> list[str]:
    """Returns captions such as "a sketch of the goldfish." at random.

    They stand for the thousand captions of Section 3.2 of arXiv:2212.04488: classes of ImageNet in
    the sentences of CLIP's paper, from open_clip.
    """
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES

    random = np.random.default_rng(seed)
    names = random.choice(IMAGENET_CLASSNAMES, count, replace=count > len(IMAGENET_CLASSNAMES))
    sentences = random.integers(len(OPENAI_IMAGENET_TEMPLATES), size=count)
    return [
        OPENAI_IMAGENET_TEMPLATES[k](name)
        for k, name in zip(sentences, names.tolist(), strict=True)
    ]


def _scenes(count: int, seed: int) -> list[str]:
    """Returns captions of random scenes like those that the small model was trained on."""
    return [describe(scene, wording) for scene, wording in described_scenes(count, seed)]


STABLE_DIFFUSION = BaseKind(
    object_sentences=templates.OBJECT,
    style_sentences=templates.STYLE,
    held_out_object=templates.HELD_OUT_OBJECT,
    held_out_style=templates.HELD_OUT_STYLE,
    merge_sentences=("photo of a {}",),  # Section 3.2 of arXiv:2212.04488
    regularization_prompts=_photos,
    drawn_scenes=None,
    merge_captions=_captions,
    vocabulary=None,
    rare_words=("ktn", "pll", "ucd"),  # as in the code of Custom Diffusion's authors
    knows_distance=True,
)
SMALL = BaseKind(
    object_sentences=templates.SHAPES,
    style_sentences=templates.SHAPES,
    held_out_object=templates.HELD_OUT_SHAPES,
    held_out_style=templates.HELD_OUT_SHAPES,
    merge_sentences=templates.SHAPES,
    regularization_prompts=lambda described, count, seed: _scenes(count, seed),
    drawn_scenes=drawn_examples,
    merge_captions=_scenes,
    vocabulary=VOCABULARY,
    rare_words=(),
    knows_distance=False,
)
