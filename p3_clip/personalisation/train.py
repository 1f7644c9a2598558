"""Learns concepts from a few photos each, over a frozen latent-diffusion model: by textual
inversion or by Custom Diffusion.

    python3 -m p3_clip.personalisation.train textual-inversion --run-dir runs/dog \
        --base sd-v1-4.ckpt --photos photos/dog --words dog
    python3 -m p3_clip.personalisation.train custom-diffusion --run-dir runs/both \
        --base sd-v1-4.ckpt \\
        --photos photos/dog photos/cat --tokens "<new1>" "<new2>" --words dog cat

Textual inversion (arXiv:2208.01618) learns words. Custom Diffusion (arXiv:2212.04488) learns words
and the key and value matrices of the cross-attention, and keeps the rest in memory by pictures that
the base model drew itself. The same command again resumes. RUN_DIR/last and RUN_DIR/best hold what
was learned, a few kilobytes or megabytes. The best checkpoint is the one with the largest image +
2.5 text: the 2024 grader's sum of CLIP scores, here of pictures for prompts that no training shows;
without a CLIP, the one with the least loss on fixed noise.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import tyro
from torch import Tensor
from torch.nn import Parameter

from common import cli
from common.devices import DeviceName, make_accelerator
from common.diffusion.loss import diffusion_loss
from common.errors import InputError
from common.grid import labelled_grid
from common.images import to_uint8, write_png
from common.latent.generate import GenerationConfig, Request, generate
from common.latent.load import base_hash, load_base
from common.latent.model import LatentCondition, LatentDiffusion
from common.metrics.clip_scores import FORMS, TEXT_WEIGHT, image_cosines, text_cosines
from common.seeds import Draws, derive_seeds, views_seed
from common.training import Batch, fit, settings_of
from common.validation import held_out_loss
from p3_clip.personalisation.base_kind import BaseKind, base_kind
from p3_clip.personalisation.concept_data import (
    ConceptData,
    _digest,
    held_out_prompts,
    pairs_to_mix,
    photos_hash,
    read_concept_data,
    sentences,
)
from p3_clip.personalisation.concepts import Concept, check_tokens, expand, initial_vectors, norms
from p3_clip.personalisation.config import CustomDiffusion, TextualInversion
from p3_clip.personalisation.custom_diffusion import CustomDiffusionResult, projections
from p3_clip.personalisation.model import load_learned, personalise, save_learned, usual_words
from p3_clip.personalisation.photos import (
    Encoded,
    Pool,
    View,
    cut_mix_views,
    encode_views,
    make_views,
)
from p3_clip.personalisation.regularisation import RegularizationImages, regularization_images

if TYPE_CHECKING:
    from common.clip.model import Clip

HELD_OUT_PICTURES, HELD_OUT_SEED, STEPS = 4, 1, 20
VALIDATION_ROWS = 64  # of the loss that stands in where there is no CLIP


Config = (
    Annotated[TextualInversion, tyro.conf.subcommand("textual-inversion")]
    | Annotated[CustomDiffusion, tyro.conf.subcommand("custom-diffusion")]
)


def main(config: TextualInversion | CustomDiffusion) -> None:
    """Trains, or resumes."""
    kind = base_kind(config.base)
    concept_data = read_concept_data(config)
    mixed = pairs_to_mix(config, concept_data)
    custom = isinstance(config, CustomDiffusion)
    torch.manual_seed(config.training.seed)
    device = make_accelerator(config.training.device, config.training.mixed_precision).device
    model = load_base(config.base).to(device)
    model.choose_attention(config.training.mixed_precision)
    base = base_hash(model)
    concepts = new_concepts(config, concept_data, model, kind)
    clip = clip_for_checkpoints(config.clip, config.training.device)

    # What the base model draws, before it learns anything.
    regularization = RegularizationImages([], [])
    if custom:
        prompts = kind.regularization_prompts(
            [x.described for x in concept_data], config.num_class_images, config.training.seed
        )
        sampling = GenerationConfig(steps=STEPS, seed=config.training.seed)
        regularization = regularization_images(
            model, prompts, config.class_data_dir or config.run_dir / "class_data", sampling
        )

    # The learned words become parameters of their own; every other row of the table is frozen.
    vocabulary = usual_words(model, kind)
    personalise(model, CustomDiffusionResult({}, concepts))
    embedding = model.text_encoder.get_input_embeddings()
    matrices: dict[str, Parameter] = projections(model.unet) if custom else {}
    params = {f"word/{token}": rows for token, rows in embedding.rows.items()} | matrices
    for param in params.values():
        param.requires_grad_(True)
    pool = make_pool(config, kind, concept_data, mixed, concepts, model, regularization, base)

    def get_batch(step: int, generator: torch.Generator) -> Batch:
        return pool.draw(
            config.training.batch_size, torch.Generator().manual_seed(generator.initial_seed())
        )

    def loss_fn(batch: Batch, draws: Draws) -> Tensor:
        return diffusion_loss(
            model.apply_model,
            model.schedule,
            batch["latent"].float(),
            LatentCondition(model.encode_tokens(batch["ids"])),
            draws,
            parameterization=model.parameterization,
            weight=batch["weight"].float(),
        )

    held_out = held_out_prompts(config, concept_data, kind)

    def sample_held_out() -> Tensor:
        """Pictures uint8 [K, 3, S, S], HELD_OUT_PICTURES for each prompt, from the same noise each
        time."""
        prompts = [
            expand(prompt.format(concept_data[k].phrase.format(concept_data[k].token)), concepts)
            for k, prompt in held_out
        ]
        seeds = derive_seeds(HELD_OUT_SEED, count=HELD_OUT_PICTURES)
        requests = [Request(prompt, seed) for prompt in prompts for seed in seeds]
        sampling = GenerationConfig(steps=STEPS)
        return to_uint8(
            torch.cat([x for _, x in generate(model, requests, sampling, show_progress=False)])
        )

    def validate() -> dict[str, float]:
        """The scores of pictures for held-out prompts, and each concept's norm over that of a usual
        word."""
        sizes = {
            f"norm {token}": value
            for token, value in norms(embedding.concepts(), vocabulary).items()
        }
        if clip is None:
            rows = pool.draw(VALIDATION_ROWS, torch.Generator().manual_seed(HELD_OUT_SEED))
            return {"loss": held_out_loss(model, loss_fn, rows), **sizes}
        texts = [(k, prompt.format(concept_data[k].described)) for k, prompt in held_out]
        image, text = scores(clip, sample_held_out(), texts, [data.photos for data in concept_data])
        return {"loss": -(image + TEXT_WEIGHT * text), "image": image, "text": text, **sizes}

    def preview(path: Path) -> None:
        labels = [
            prompt.format(concept_data[k].phrase.format(concept_data[k].token))
            for k, prompt in held_out
        ]
        write_png(path, labelled_grid(sample_held_out(), HELD_OUT_PICTURES, row_labels=labels))

    def save(folder: Path) -> None:
        weights = {name: value.detach().float().cpu().clone() for name, value in matrices.items()}
        save_learned(
            folder,
            CustomDiffusionResult(weights, embedding.concepts()),
            about(config, concept_data, base),
        )

    settings = settings_of(
        config, "photos", "base", "clip", "regular_dir", base=base, photos=photos_hash(concept_data)
    )
    fit(
        params,
        loss_fn,
        get_batch,
        config.training,
        config.run_dir,
        settings=settings | about(config, concept_data, base),
        save=save,
        validate=validate,
        preview=preview,
    )


# ----------------------------------------------------------------------------
# What is to be learned.


def new_concepts(
    config: TextualInversion | CustomDiffusion,
    concept_data: Sequence[ConceptData],
    model: LatentDiffusion,
    kind: BaseKind,
) -> list[Concept]:
    """The concepts with the vectors that they start from.

    Raises InputError if a token is a word already, or if `config.init_from` holds no words or not
    as many vectors for one.
    """
    check_tokens([data.token for data in concept_data], model.tokenizer)
    if config.init_from:
        return _learned_before(config, concept_data, model)
    usual = kind.rare_word if isinstance(config, CustomDiffusion) else None

    def start(data: ConceptData) -> Tensor:
        word = config.start if config.start is not None else usual or data.word
        return initial_vectors(word, config.vectors, model.text_encoder, model.tokenizer)

    return [Concept(data.token, start(data)) for data in concept_data]


def _learned_before(
    config: TextualInversion | CustomDiffusion,
    concept_data: Sequence[ConceptData],
    model: LatentDiffusion,
) -> list[Concept]:
    learned = load_learned([config.init_from], model)
    if learned.weights:
        raise InputError(
            f"{config.init_from} holds matrices too: training starts from a result of textual"
            " inversion"
        )
    known = {concept.token: concept for concept in learned.concepts}
    for data in concept_data:
        found = len(known[data.token].vectors) if data.token in known else 0
        if found != config.vectors:
            raise InputError(
                f"{config.init_from} has {found} vectors for {data.token}, not {config.vectors}"
            )
    return [known[data.token] for data in concept_data]


def make_pool(
    config: TextualInversion | CustomDiffusion,
    kind: BaseKind,
    concept_data: Sequence[ConceptData],
    mixed: Sequence[tuple[ConceptData, ConceptData]],
    concepts: Sequence[Concept],
    model: LatentDiffusion,
    regularization: RegularizationImages,
    base: str,
) -> Pool:
    """All views, encoded, with their prompts; those of each pair in `mixed`, side by side, count as
    one concept more."""
    random = torch.Generator().manual_seed(views_seed(config.training.seed))
    views: list[View] = []
    groups: list[int] = []
    prompts: list[list[str]] = []
    for k, data in enumerate(concept_data):
        for photo, caption in zip(data.photos, data.captions, strict=True):
            shown = [
                sentence.format(caption.format(data.token)) for sentence in sentences(data, kind)
            ]
            for view in make_views(photo, model.side, config.augmentation, config.views, random):
                views.append(view)
                groups.append(k)
                words = view.words if kind.knows_distance else ("",)
                prompts.append(
                    [expand(word + prompt, concepts) for prompt in shown for word in words]
                )
    for group, (one, other) in enumerate(mixed, len(concept_data)):
        for left, right in ((one, other), (other, one)):
            for i in range(max(len(left.photos), len(right.photos))):
                first, second = i % len(left.photos), i % len(right.photos)
                shown = [
                    sentence.format(
                        f"{left.phrase.format(left.token)} next to {caption.format(right.token)}"
                    )
                    for sentence in sentences(left, kind)
                    for caption in {right.phrase: None, right.captions[second]: None}
                ]
                own = cut_mix_views(
                    left.photos[first], right.photos[second], model.side, config.cut_mix, random
                )
                views += own
                groups += [group] * len(own)
                prompts += [[expand(prompt, concepts) for prompt in shown]] * len(own)
    for prompt, picture in zip(regularization.prompts, regularization.pictures, strict=True):
        views += make_views(picture, model.side, "none", 1, random)
        groups.append(-1)
        prompts.append([prompt])
    made_from: dict[str, Any] = {
        "base": base,
        "photos": photos_hash(concept_data),
        "regular": _digest(regularization.pictures),
        "augmentation": config.augmentation,
        "views": config.views,
        "cut_mix": config.cut_mix,
        "seed": config.training.seed,
    }
    encoded: Encoded = encode_views(model, views, config.run_dir / "latents.safetensors", made_from)
    return Pool.make(model, encoded, groups, prompts)


def about(
    config: TextualInversion | CustomDiffusion, concept_data: Sequence[ConceptData], base: str
) -> dict[str, Any]:
    """What the folder of a result says of itself."""
    method: Literal["textual inversion", "Custom Diffusion"] = (
        "textual inversion" if isinstance(config, TextualInversion) else "Custom Diffusion"
    )
    concepts = [{"token": x.token, "word": x.word, "phrase": x.phrase} for x in concept_data]
    return {"method": method, "base": base, "vectors": config.vectors, "concepts": concepts}


# ----------------------------------------------------------------------------
# Scores.


def clip_for_checkpoints(model: str | None, device: DeviceName) -> "Clip | None":
    """The CLIP that compares checkpoints, or None; prints which, or why none."""
    from common.clip.loading import load_judge

    clip, note = load_judge(model, device=device)
    print(
        f"checkpoints are compared by {note}"
        if clip
        else (
            "no CLIP compares checkpoints, so the best is the one with the least loss on fixed"
            f" noise: {note}"
        )
    )
    return clip


def scores(
    clip: "Clip",
    pictures: Tensor,
    texts: Sequence[tuple[int, str]],
    photos: Sequence[Sequence[Tensor]],
) -> tuple[float, float]:
    """The mean image and text scores (100 cos, as the 2024 grader's) of pictures uint8 [K, 3, S,
    S], HELD_OUT_PICTURES for each (number of a concept, text in known words)."""
    from common.clip.features import encode_pictures

    features = encode_pictures(clip, list(pictures)).view(len(texts), HELD_OUT_PICTURES, -1)
    references = [encode_pictures(clip, list(own)) for own in photos]
    image = [image_cosines(own, references[k]) for own, (k, _) in zip(features, texts, strict=True)]
    text = [text_cosines(clip, own, words) for own, (_, words) in zip(features, texts, strict=True)]
    return tuple(FORMS["dlcv2024"](torch.cat(values)).mean().item() for values in (image, text))


if __name__ == "__main__":
    cli.run(main, Config)
