"""The settings of both personalisations."""

import dataclasses
from pathlib import Path
from typing import Annotated, ClassVar

import tyro

from common.cli import Preset
from common.data.concepts import DRAWN
from common.files import ROOT
from common.training import TrainingConfig
from p3_clip.personalisation.photos import Augmentation

WORDS = TrainingConfig(
    steps=3000,
    batch_size=8,
    lr=5e-3,
    warmup=100,
    ema_decay=0.99,
    validate_every=250,
    preview_every=500,
    checkpoint_every=250,
)
MATRICES = TrainingConfig(
    steps=500,
    batch_size=16,
    lr=8e-5,
    warmup=20,
    ema_decay=0.99,
    validate_every=100,
    preview_every=250,
    checkpoint_every=100,
)
SMOKE_STEPS = {"steps": 2, "batch_size": 2, "warmup": 1, "log_every": 1}
SMOKE = {"views": 2, "drawn": ("wine",), "training": dataclasses.replace(WORDS, **SMOKE_STEPS)}


@dataclasses.dataclass(frozen=True)
class _Common:
    run_dir: Path
    """Folder of the run: checkpoints, metrics, previews, and the photos' latents."""
    photos: tuple[Path, ...] = ()
    """A folder of photos for each concept; without any, the drawn concepts are learned
    (scripts/make_concepts.py)."""
    words: tuple[str, ...] = ()
    """A known word for each folder's concept that comes near, such as dog."""
    drawn: tuple[str, ...] = tuple(DRAWN)
    """Which drawn concepts."""
    tokens: tuple[str, ...] = ()
    """A placeholder for each concept; by default <new1>, <new2> and so on."""
    phrases: tuple[str, ...] = ()
    """How each folder's concept stands in a sentence, such as "{} circle"; by default "{}", for
    Custom Diffusion "{} WORD"."""
    styles: tuple[str, ...] = ()
    """The placeholders that are a style and no object: they are shown in other sentences."""
    vectors: int = 1
    """Vectors of each concept."""
    start: str | None = None
    """Word that the vectors start from; by default the concept's own, for Custom Diffusion on
    Stable Diffusion the rare word ktn."""
    init_from: Path | None = None
    """Result of textual inversion whose words to start from, by their placeholders, instead of
    known words."""
    base: Path = ROOT / "checkpoints" / "ldm_shapes"
    """The frozen model: a Stable Diffusion v1.4 file or folder, or the folder of a small model."""
    views: int = 24
    """Views of each photo that are encoded, where their augmentation is random."""
    cut_mix: int = 0
    """Views, for each two photos of two concepts and either order, that show them side by side
    (cut-mix); 0: none."""
    held_out: tuple[str, ...] = ()
    """Prompts with {} by which checkpoints are compared; by default two that no training shows."""
    clip: str | None = None
    """CLIP that compares them: a model folder, a name of open_clip, or none; by default OpenAI's
    ViT-B/32 if it is to be had."""


@dataclasses.dataclass(frozen=True)
class TextualInversion(_Common):
    """Learns words for concepts, and nothing else (textual inversion)."""

    augmentation: Augmentation = "flip"
    """What is done to photos."""
    training: Annotated[TrainingConfig, tyro.conf.arg(name="")] = WORDS
    PRESETS: ClassVar = {
        "small": Preset(
            "the defaults: the drawn concepts over the small model, about half an hour on two CPU"
            " cores; what to expect stands in docs/report.md",
            {},
        ),
        "sd14": Preset(
            "for Stable Diffusion v1.4: the learning rate and the 5,000 steps of the paper"
            " (arXiv:2208.01618) at a batch of 4, one GPU of 12 GB or more; never run here on real"
            " weights",
            {
                "training": dataclasses.replace(
                    WORDS,
                    steps=5000,
                    batch_size=4,
                    mixed_precision="bf16",
                    validate_every=500,
                    preview_every=500,
                )
            },
        ),
        "smoke": Preset(
            "is everything in place? Two steps, under a minute on a CPU; it learns nothing", SMOKE
        ),
    }


@dataclasses.dataclass(frozen=True)
class CustomDiffusion(_Common):
    """Learns words for concepts and the key and value matrices of the cross-attention (Custom
    Diffusion), jointly."""

    augmentation: Augmentation = "resize"
    """What is done to photos."""
    num_class_images: int = 200
    """Regularisation pictures, which the base model draws."""
    class_data_dir: Path | None = None
    """Folder in which they are kept; by default RUN_DIR/class_data."""
    training: Annotated[TrainingConfig, tyro.conf.arg(name="")] = MATRICES
    PRESETS: ClassVar = {
        "small": Preset(
            "the defaults: the drawn concepts over the small model, about half an hour on two CPU"
            " cores; what to expect stands in docs/report.md",
            {},
        ),
        "sd14": Preset(
            "for Stable Diffusion v1.4: learning rate, batch and steps of the authors' code for"
            " arXiv:2212.04488 and 200 class images, one GPU of 24 GB; never run here on real"
            " weights",
            {
                "training": dataclasses.replace(
                    MATRICES,
                    steps=500,
                    batch_size=8,
                    lr=8e-5,
                    mixed_precision="bf16",
                    ema_decay=0.99,
                )
            },
        ),
        "smoke": Preset(
            "is everything in place? Two steps, under a minute on a CPU; it learns nothing",
            SMOKE
            | {
                "num_class_images": 2,
                "training": dataclasses.replace(MATRICES, **SMOKE_STEPS),
            },
        ),
    }
