"""What personalisation has to know of a kind of base model: which sentences and words its text
encoder was trained on."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from common.data.examples import VOCABULARY, describe, described_scenes
from common.latent.load import kind_of
from p3_clip.personalisation import templates


@dataclasses.dataclass(frozen=True)
class BaseKind:
    """Sentences hold {} once, where the concept stands."""

    object_sentences: tuple[str, ...]
    """In which a thing is shown in training."""
    style_sentences: tuple[str, ...]
    """In which a style is shown in training."""
    held_out_object: tuple[str, ...]
    """By which checkpoints of a thing are compared; no training shows them."""
    held_out_style: tuple[str, ...]
    """The same of a style."""
    merge_sentences: tuple[str, ...]
    """In which the words of a concept keep their keys and values when results are merged."""
    regularization_prompts: Callable[[Sequence[str], int, int], list[str]]
    """(what the concepts are called in known words, count, seed) -> `count` prompts to regularise
    with."""
    vocabulary: tuple[str, ...] | None
    """The words that training moved; None: all."""
    rare_word: str | None
    """The word that Custom Diffusion starts from; None: each concept's own."""
    knows_distance: bool
    """Whether a view's "far away" and "close up" are words that it knows."""


def base_kind(checkpoint: Path) -> BaseKind:
    """The kind of the base model at `checkpoint`: `SMALL`, or `STABLE_DIFFUSION` for all else."""
    return SMALL if kind_of(checkpoint) == "small" else STABLE_DIFFUSION


def _photos(described: Sequence[str], count: int, seed: int) -> list[str]:
    """Photos of what the concepts are called, in turn (Section 3.2 of arXiv:2212.04488); nothing is
    drawn by the seed."""
    return [f"photo of a {described[number % len(described)]}" for number in range(count)]


def _scenes(described: Sequence[str], count: int, seed: int) -> list[str]:
    """Any of the scenes that the small model was trained on, whatever the concepts are."""
    return [describe(scene, wording) for scene, wording in described_scenes(count, seed)]


STABLE_DIFFUSION = BaseKind(
    object_sentences=templates.OBJECT,
    style_sentences=templates.STYLE,
    held_out_object=templates.HELD_OUT_OBJECT,
    held_out_style=templates.HELD_OUT_STYLE,
    merge_sentences=("photo of a {}",),  # Section 3.2 of arXiv:2212.04488
    regularization_prompts=_photos,
    vocabulary=None,
    rare_word="ktn",  # Custom Diffusion's authors'
    knows_distance=True,
)
SMALL = BaseKind(
    object_sentences=templates.SHAPES,
    style_sentences=templates.SHAPES,
    held_out_object=templates.HELD_OUT_SHAPES,
    held_out_style=templates.HELD_OUT_SHAPES,
    merge_sentences=templates.SHAPES,
    regularization_prompts=_scenes,
    vocabulary=VOCABULARY,
    rare_word=None,
    knows_distance=False,
)
