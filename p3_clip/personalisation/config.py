"""The settings of textual inversion and of Custom Diffusion."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

from common.cli import Preset
from common.config import Count, NonNegative, Positive, bounds
from common.data.concepts import DRAWN, PHOTOS
from common.diffusion.loss import TimestepDistribution
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
SD14_WORDS = dataclasses.replace(
    WORDS,
    steps=5000,
    batch_size=8,
    lr=5e-3,
    lr_schedule="constant",
    warmup=0,
    beta2=0.999,
    mixed_precision="bf16",
    tf32=True,
    validate_every=1000,
    preview_every=1000,
)
SD14_MATRICES = dataclasses.replace(
    MATRICES,
    steps=500,
    batch_size=8,
    lr=8e-5,
    lr_schedule="constant",
    warmup=0,
    beta2=0.999,
    mixed_precision="bf16",
    tf32=True,
    validate_every=250,
    preview_every=250,
)
SMOKE_STEPS = {"steps": 2, "batch_size": 2, "warmup": 1, "log_every": 1}
SMOKE = {"views": 2, "drawn": ("wine",), "training": dataclasses.replace(WORDS, **SMOKE_STEPS)}


def _on_gpu(training: TrainingConfig, device_batch_size: int) -> dict[str, Any]:
    """The settings of the presets sd14 that depend on the GPU's memory; the results do not.

    Estimates for 512x512 pixels, in GiB: U-Net and text encoder in bf16 1.8, autoencoder 0.3, the
    matrices of Custom Diffusion with their moments 0.3, the CLIP of the scores 0.6, activations 0.9
    an image, CUDA and its workspaces 1. Together 11 for 8 images, 8 for 4, 6 for 2.
    """
    return {"training": dataclasses.replace(training, device_batch_size=device_batch_size)}


@dataclasses.dataclass(frozen=True)
class _Common:
    run_dir: Path
    """Folder of the run: checkpoints, metrics, previews, and the latents of the photos."""
    photos: tuple[Path, ...] = ()
    """Folders of photos, one for each concept. Default: the drawn concepts are learned instead
    (scripts/make_concepts.py)."""
    words: tuple[str, ...] = ()
    """A known word of similar meaning, such as dog, for each folder's concept."""
    drawn: tuple[str, ...] = tuple(DRAWN)
    """Names of the drawn concepts to learn; unused with --photos."""
    drawn_photos: Annotated[int, *bounds(at_least=1, at_most=10_000)] = PHOTOS
    """Photos drawn of each of them; the first 10 have different backgrounds."""
    tokens: tuple[str, ...] = ()
    """Placeholder of each concept. Default: <new1>, <new2> and so on."""
    phrases: tuple[str, ...] = ()
    """Noun phrase of each folder's concept, where {} stands for its placeholder, such as
    "{} circle". Default: "{}" for textual inversion, "{} WORD" for Custom Diffusion."""
    styles: tuple[str, ...] = ()
    """Placeholders of the concepts that are styles, not objects; their training prompts differ."""
    vectors: Annotated[int, *bounds(at_least=1, at_most=75)] = 1
    """Embedding vectors per concept; a text of Stable Diffusion has 77 places, of the small model
    32, two of which are its ends."""
    start: str | None = None
    """Word whose token embeddings initialise the vectors. Default: the concept's own word; for
    Custom Diffusion on Stable Diffusion, the rare words ktn, pll and ucd in turn."""
    init_from: Path | None = None
    """Result of textual inversion whose vectors, of the same placeholders, initialise the vectors;
    --start is then unused."""
    base: Path = ROOT / "checkpoints" / "ldm_shapes"
    """The frozen base model: a Stable Diffusion v1.4 file or folder, or a small model's folder."""
    views: Annotated[int, *bounds(at_least=1, at_most=10_000)] = 24
    """Random views per photo, each encoded once before training; only for --augmentation resize and
    shrink."""
    cut_mix: Annotated[int, *bounds(at_least=0)] = 0
    """Views per pair of photos of two concepts, side by side in either order (cut-mix; photos are
    paired by their position); 0: none."""
    collage: Annotated[int, *bounds(at_least=0)] = 0
    """Views of each object, and of each two objects side by side, cut out of photos and placed on
    learned backgrounds and on named colours in turn; objects need one colour and plain backgrounds.
    0: none."""
    known_shapes: bool = False
    """As many views, too, of each object beside a drawn shape that the small model knows, and of
    such shapes on learned backgrounds; needs --collage. Known words beside learned ones get better,
    all else is trained less."""
    object_weight: Positive = 1.0
    """Weight of the objects in the loss, relative to the rest of the photo; objects need one colour
    and plain backgrounds."""
    attention_weight: NonNegative = 0.0
    """Weight of a second loss, the fraction of a learned word's cross-attention that is not on its
    concept; objects need one colour and plain backgrounds. 0: none."""
    timesteps: TimestepDistribution = "uniform"
    """Distribution of the timesteps t in training. mixed: half uniform, half logit-normal; shifted:
    denser at high noise, where forms are decided. The papers' is uniform."""
    held_out: tuple[str, ...] = ()
    """Validation prompts with {} in the place of the concept. Default: two, never trained on."""
    held_out_pictures: Count = 4
    """Pictures drawn for each validation prompt, in validations and previews."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of storing them, to save memory."""
    clip: str | None = None
    """CLIP that scores the checkpoints: a file of weights of ViT-B/32, a model folder, a name of
    open_clip, or none. Default: OpenAI's ViT-B/32 if it is available."""


@dataclasses.dataclass(frozen=True)
class TextualInversion(_Common):
    """Learns embedding vectors for new words, and changes no other weight (textual inversion)."""

    augmentation: Augmentation = "flip"
    """Views of a photo: itself (none); itself and its mirror image (flip); random size and place,
    mirrored or not (resize); whole or smaller, with a continued border, mirrored or not, for plain
    backgrounds (shrink)."""
    training: Annotated[TrainingConfig, tyro.conf.arg(name="")] = WORDS
    PRESETS: ClassVar = {
        "small": Preset(
            "the defaults: the drawn concepts on the small model, about half an hour on two CPU"
            " cores; docs/report.md has the results to expect",
            {},
        ),
        "sd14": Preset(
            "for Stable Diffusion v1.4 (--base is required) on one GPU of 24, 16 or 12 GB"
            " (--memory, by default what the GPU has; older ones than NVIDIA's Ampere need"
            " --mixed-precision fp16). As in the paper (arXiv:2208.01618): 5,000 steps, 8 images"
            " per step (2 GPUs of 4 there), one vector, AdamW at its base learning rate 5e-3,"
            " which the paper multiplies by the batch for LDM's text encoder; CLIP's embeddings"
            " are too small for that. Costs 13 TFLOP a step, 1 hour on a card that sustains 20"
            " TFLOP/s; validations and previews take 2 % for one concept (8 pictures of 35 TFLOP"
            " every 1,000 steps) and 2 % more for each further one. Expect the paper's results"
            " at the last step, cruder ones from step 1,000 on; never run here on the real"
            " weights",
            {"base": tyro.MISSING},
            by_memory={
                24: _on_gpu(SD14_WORDS, 8),
                16: _on_gpu(SD14_WORDS, 4),
                12: _on_gpu(SD14_WORDS, 2),
            },
        ),
        "smoke": Preset(
            "tests the installation: two steps, under a minute on a CPU; it learns nothing", SMOKE
        ),
    }


@dataclasses.dataclass(frozen=True)
class CustomDiffusion(_Common):
    """Learns new words and the cross-attention's key and value matrices (Custom Diffusion)."""

    augmentation: Augmentation = "resize"
    """Views of a photo: itself (none); itself and its mirror image (flip); random size and place,
    mirrored or not (resize); whole or smaller, with a continued border, mirrored or not, for plain
    backgrounds (shrink)."""
    num_class_images: Annotated[int, *bounds(at_least=0)] = 200
    """Regularisation images; 0: none."""
    class_images: Literal["generated", "drawn"] = "generated"
    """Where they come from: generated by the base model, with its mistakes, or drawn, of scenes
    like those that the small model was trained on. The paper's are real photos."""
    class_data_dir: Path | None = None
    """Folder of the generated ones. Default: RUN_DIR/class_data."""
    training: Annotated[TrainingConfig, tyro.conf.arg(name="")] = MATRICES
    PRESETS: ClassVar = {
        "small": Preset(
            "the defaults: the drawn concepts on the small model, about half an hour on two CPU"
            " cores; docs/report.md has the results to expect",
            {},
        ),
        "sd14": Preset(
            "for Stable Diffusion v1.4 (--base is required) on one GPU of 24, 16 or 12 GB"
            " (--memory, by default what the GPU has; older ones than NVIDIA's Ampere need"
            " --mixed-precision fp16). As in the paper (arXiv:2212.04488): 8 images per step,"
            " learning rate 8e-5, 500 steps (for two concepts; --steps 250 for one), 200 class"
            " images, photos at 0.4 to 1.4 times the size; the base model draws the class images."
            " Costs 13 TFLOP a step and 35 a class image: 11 minutes on a card that sustains 20"
            " TFLOP/s, half of them for the class images; validations and previews take 2 % for"
            " each concept (2 pictures at steps 250 and 500; best/ is the better step). Expect one"
            " concept at step 250, as in the paper; never run here on the real weights",
            {"base": tyro.MISSING, "held_out_pictures": 1},
            by_memory={
                24: _on_gpu(SD14_MATRICES, 8),
                16: _on_gpu(SD14_MATRICES, 4),
                12: _on_gpu(SD14_MATRICES, 2),
            },
        ),
        "smoke": Preset(
            "tests the installation: two steps, under a minute on a CPU; it learns nothing",
            SMOKE
            | {
                "num_class_images": 2,
                "training": dataclasses.replace(MATRICES, **SMOKE_STEPS),
            },
        ),
    }
