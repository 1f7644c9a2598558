"""The settings of both personalisations."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from common.data.concepts import DRAWN
from common.files import ROOT
from common.training import TrainingConfig
from p3_clip.personalisation.photos import Augmentation


@dataclasses.dataclass(frozen=True)
class _Common:
    run_dir: Path
    """Folder of the run: checkpoints, metrics, previews, and the photos' latents."""
    photos: tuple[Path, ...] = ()
    """A folder of photos for each concept; without any, the drawn concepts are learned (scripts/make_concepts.py)."""
    words: tuple[str, ...] = ()
    """A known word for each folder's concept that comes near, such as dog."""
    drawn: tuple[str, ...] = tuple(DRAWN)
    """Which drawn concepts."""
    tokens: tuple[str, ...] = ()
    """A placeholder for each concept; by default <new1>, <new2> and so on."""
    phrases: tuple[str, ...] = ()
    """How each folder's concept stands in a sentence, such as "{} circle"; by default "{}", for Custom Diffusion "{} WORD"."""
    styles: tuple[str, ...] = ()
    """The placeholders that are a style and no object: they are shown in other sentences."""
    vectors: int = 1
    """Vectors of each concept."""
    start: str | None = None
    """Word that the vectors start from; by default the concept's own, for Custom Diffusion on Stable Diffusion the rare word ktn."""
    init_from: Path | None = None
    """Result of textual inversion whose words to start from, by their placeholders, instead of known words."""
    base: Path = ROOT / "checkpoints" / "ldm_shapes"
    """The frozen model: a Stable Diffusion v1.4 file or folder, or the folder of a small model."""
    views: int = 24
    """Views of each photo that are encoded, where their augmentation is random."""
    cut_mix: int = 0
    """Views, for each two photos of two concepts and either order, that show them side by side (cut-mix); 0: none."""
    held_out: tuple[str, ...] = ()
    """Prompts with {} by which checkpoints are compared; by default two that no training shows."""
    clip: str | None = None
    """CLIP that compares them: a model folder, a name of open_clip, or none; by default OpenAI's ViT-B/32 if it is to be had."""


@dataclasses.dataclass(frozen=True)
class TextualInversion(_Common):
    """Learns words for concepts, and nothing else (textual inversion)."""

    augmentation: Augmentation = "flip"
    """What is done to photos."""
    training: Annotated[TrainingConfig, tyro.conf.arg(name="")] = TrainingConfig(
        steps=3000,
        batch_size=8,
        lr=5e-3,
        warmup=100,
        ema_decay=0.99,
        validate_every=250,
        preview_every=500,
        checkpoint_every=250,
    )


@dataclasses.dataclass(frozen=True)
class CustomDiffusion(_Common):
    """Learns words for concepts and the key and value matrices of the cross-attention (Custom Diffusion), jointly."""

    augmentation: Augmentation = "resize"
    """What is done to photos."""
    regular: int = 200
    """Regularisation pictures, which the base model draws."""
    regular_dir: Path | None = None
    """Folder in which they are kept; by default RUN_DIR/regular."""
    training: Annotated[TrainingConfig, tyro.conf.arg(name="")] = TrainingConfig(
        steps=500,
        batch_size=16,
        lr=8e-5,
        warmup=20,
        ema_decay=0.99,
        validate_every=100,
        preview_every=250,
        checkpoint_every=100,
    )
