"""Learns concepts from a few photos each: textual inversion or Custom Diffusion on a frozen model.

    python3 -m p3_clip.personalisation.train textual-inversion --run-dir runs/dog \
        --base sd-v1-4.ckpt --photos photos/dog --words dog
    python3 -m p3_clip.personalisation.train custom-diffusion --run-dir runs/both \
        --base sd-v1-4.ckpt --photos photos/dog photos/cat \
        --tokens "<new1>" "<new2>" --words dog cat

Textual inversion (arXiv:2208.01618) learns the embedding vectors of new words. Custom Diffusion
(arXiv:2212.04488) learns these and the key and value matrices of the cross-attention; it also
trains on regularisation images, which the base model generates, to reduce forgetting. Running the
same command again resumes. RUN_DIR/last and RUN_DIR/best hold what was learned, a few kilobytes or
megabytes.

The best checkpoint has the largest image score + 2.5 text score, the 2024 grader's sum of CLIP
scores, on images generated for validation prompts. Without a CLIP, it has the lowest loss on fixed
timesteps and noise.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import tyro
from torch import Tensor
from torch.nn import Parameter

from common import cli
from common.devices import DTYPES, DeviceName, make_accelerator
from common.diffusion.loss import diffusion_loss
from common.errors import InputError
from common.grid import labelled_grid
from common.images import to_uint8, write_png
from common.latent.generate import GenerationConfig, Request, generate
from common.latent.load import base_hash, load_base
from common.latent.model import LatentCondition, LatentDiffusion
from common.metrics.clip_scores import FORMS, TEXT_WEIGHT, image_cosines, text_cosines
from common.seeds import Draws, derive_seeds, views_seed
from common.training import Batch, fit, micro_batches_of, refuse_compile, settings_of
from common.validation import held_out_loss
from p3_clip.personalisation.attention_maps import attention_outside, keep_maps
from p3_clip.personalisation.base_kind import BaseKind, base_kind
from p3_clip.personalisation.concept_data import (
    ConceptData,
    _digest,
    held_out_prompts,
    pairs_to_mix,
    photos_hash,
    read_concept_data,
)
from p3_clip.personalisation.concepts import Concept, check_tokens, expand, initial_vectors, norms
from p3_clip.personalisation.config import CustomDiffusion, TextualInversion
from p3_clip.personalisation.custom_diffusion import (
    CustomDiffusionResult,
    keep_start,
    projections,
)
from p3_clip.personalisation.model import load_learned, personalise, save_learned, usual_words
from p3_clip.personalisation.photos import Encoded, Pool, encode_views, make_views
from p3_clip.personalisation.regularisation import RegularizationImages, regularization_images
from p3_clip.personalisation.training_views import training_views

if TYPE_CHECKING:
    from common.clip.model import Clip

HELD_OUT_SEED = 1  # of the pictures for validation prompts
STEPS = 20  # of sampling, for validation and regularisation images
VALIDATION_ROWS = 64  # views in the validation loss, which is used without a CLIP


Config = (
    Annotated[TextualInversion, tyro.conf.subcommand("textual-inversion")]
    | Annotated[CustomDiffusion, tyro.conf.subcommand("custom-diffusion")]
)


def main(config: TextualInversion | CustomDiffusion) -> None:
    """Trains, or resumes the run in `config.run_dir`."""
    kind = base_kind(config.base)
    concept_data = read_concept_data(config)
    pairs_to_mix(config, concept_data)  # refuses concepts that cannot be mixed
    custom = isinstance(config, CustomDiffusion)
    refuse_compile(config.training)
    torch.manual_seed(config.training.seed)
    accelerator = make_accelerator(config.training.device, config.training.mixed_precision)
    micro_batches_of(config.training, accelerator)  # refuses what would not divide, before encoding
    model = load_base(config.base).to(accelerator.device)
    model.choose_attention(config.training.mixed_precision)
    model.enable_gradient_checkpointing(config.gradient_checkpointing)
    base = base_hash(model)
    concepts = new_concepts(config, concept_data, model, kind)
    clip = clip_for_checkpoints(config.clip, config.training.device)

    # What is trained stays in float32; the vocabulary is read before the rest is converted.
    matrices: dict[str, Parameter] = projections(model.unet) if custom else {}
    for param in matrices.values():
        param.requires_grad_(True)
    vocabulary = usual_words(model, kind)
    model.cast(DTYPES[config.training.mixed_precision])

    # The base model generates the regularisation images before any weight changes.
    regularization = RegularizationImages([], [])
    if custom:
        prompts = kind.regularization_prompts(
            [x.described for x in concept_data], config.num_class_images, config.training.seed
        )
        sampling = GenerationConfig(steps=STEPS, seed=config.training.seed)
        folder = config.class_data_dir or config.run_dir / "class_data"
        with accelerator.autocast():
            regularization = regularization_images(model, prompts, folder, sampling)

        keep_start(model.unet)

    # The vectors of the new words become separate parameters; every other row stays frozen.
    personalise(model, CustomDiffusionResult({}, concepts))
    embedding = model.text_encoder.get_input_embeddings()
    params = {f"word/{token}": rows for token, rows in embedding.rows.items()} | matrices
    pool = make_pool(config, kind, concept_data, concepts, model, regularization, base)
    maps = keep_maps(model.unet) if config.attention_weight else []
    word_ids = [model.tokenizer.convert_tokens_to_ids(concept.words) for concept in concepts]

    def get_batch(step: int, generator: torch.Generator) -> Batch:
        return pool.draw(
            config.training.batch_size, torch.Generator().manual_seed(generator.initial_seed())
        )

    def loss_fn(batch: Batch, draws: Draws) -> Tensor:
        validated.clear()
        loss = diffusion_loss(
            model.apply_model,
            model.schedule,
            batch["latent"].float(),
            LatentCondition(model.encode_tokens(batch["ids"])),
            draws,
            parameterization=model.parameterization,
            weight=batch["weight"].float(),
            timesteps=config.timesteps,
        )
        if config.attention_weight:
            places = torch.stack([isin(batch["ids"], ids) for ids in word_ids], 1)
            kept = [each.map for each in maps if each.map is not None]
            outside = attention_outside(kept, places, batch["regions"].float())
            loss = loss + config.attention_weight * outside
        return loss

    held_out = held_out_prompts(config, concept_data, kind)
    validated: list[Tensor] = []  # pictures of the last validation, until the weights change

    def sample_held_out() -> Tensor:
        """Images uint8 [K, 3, S, S], a few per validation prompt, from fixed noise."""
        prompts = [
            expand(prompt.format(concept_data[k].phrase.format(concept_data[k].token)), concepts)
            for k, prompt in held_out
        ]
        seeds = derive_seeds(HELD_OUT_SEED, count=config.held_out_pictures)
        requests = [Request(prompt, seed) for prompt in prompts for seed in seeds]
        sampling = GenerationConfig(steps=STEPS)
        sampling = dataclasses.replace(sampling, chunk_size=min(sampling.chunk_size, len(requests)))
        with accelerator.autocast():
            drawn = generate(model, requests, sampling, show_progress=False)
            return to_uint8(torch.cat([x for _, x in drawn]))

    def validate() -> dict[str, float]:
        """CLIP scores on the validation prompts, or else the loss; and each concept's `norms`."""
        relative_norms = {
            f"norm {token}": value
            for token, value in norms(embedding.concepts(), vocabulary).items()
        }
        if clip is None:
            rows = pool.draw(VALIDATION_ROWS, torch.Generator().manual_seed(HELD_OUT_SEED))
            size = min(VALIDATION_ROWS, config.training.device_batch_size or VALIDATION_ROWS)
            with accelerator.autocast():
                return {"loss": held_out_loss(model, loss_fn, rows, size), **relative_norms}
        validated[:] = sample_held_out()
        texts = [(k, prompt.format(concept_data[k].described)) for k, prompt in held_out]
        photos = [data.photos for data in concept_data]
        image, text = scores(clip, torch.stack(validated), texts, photos)
        loss = -(image + TEXT_WEIGHT * text)
        return {"loss": loss, "image": image, "text": text, **relative_norms}

    def preview(path: Path) -> None:
        labels = [
            prompt.format(concept_data[k].phrase.format(concept_data[k].token))
            for k, prompt in held_out
        ]
        pictures = torch.stack(validated) if validated else sample_held_out()
        grid = labelled_grid(
            pictures,
            config.held_out_pictures,
            row_labels=labels,
            title=f"step {int(path.stem)}",
        )
        write_png(path, grid)

    def save(folder: Path) -> None:
        weights = {name: value.detach().float().cpu().clone() for name, value in matrices.items()}
        save_learned(
            folder,
            CustomDiffusionResult(weights, embedding.concepts()),
            about(config, concept_data, base),
        )

    settings = settings_of(
        config,
        "photos",
        "base",
        "clip",
        "class_data_dir",
        "held_out_pictures",
        "gradient_checkpointing",
        base=base,
        photos=photos_hash(concept_data),
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
        next_command=f"bash hw2_3.sh input.json OUT {config.base} --concepts LAST",
    )


# ----------------------------------------------------------------------------
# Initial vectors and training data.


def new_concepts(
    config: TextualInversion | CustomDiffusion,
    concept_data: Sequence[ConceptData],
    model: LatentDiffusion,
    kind: BaseKind,
) -> list[Concept]:
    """Returns the concepts with their initial vectors.

    Raises InputError if a token is already a word, or if `config.init_from` holds matrices, lacks a
    token or has another number of vectors for one.
    """
    check_tokens([data.token for data in concept_data], model.tokenizer)
    if config.init_from:
        return _learned_before(config, concept_data, model)
    rare_words = kind.rare_words if isinstance(config, CustomDiffusion) else ()

    def start(k: int, data: ConceptData) -> Tensor:
        own = rare_words[k % len(rare_words)] if rare_words else data.word
        word = config.start if config.start is not None else own
        return initial_vectors(word, config.vectors, model.text_encoder, model.tokenizer)

    return [Concept(data.token, start(k, data)) for k, data in enumerate(concept_data)]


def _learned_before(
    config: TextualInversion | CustomDiffusion,
    concept_data: Sequence[ConceptData],
    model: LatentDiffusion,
) -> list[Concept]:
    learned = load_learned([config.init_from], model)
    if learned.weights:
        raise InputError(
            f"--init-from {config.init_from} holds matrices too: it must be a result of textual"
            " inversion"
        )
    known = {concept.token: concept for concept in learned.concepts}
    for data in concept_data:
        found = len(known[data.token].vectors) if data.token in known else 0
        if found != config.vectors:
            raise InputError(
                f"--init-from {config.init_from} has {found} vectors for {data.token}, not"
                f" {config.vectors}"
            )
    return [known[data.token] for data in concept_data]


def isin(ids: Tensor, words: Sequence[int]) -> Tensor:
    """Which of the token ids are of one of these words, as a bool tensor like `ids`."""
    return torch.isin(ids, torch.tensor(words, device=ids.device))


def make_pool(
    config: TextualInversion | CustomDiffusion,
    kind: BaseKind,
    concept_data: Sequence[ConceptData],
    concepts: Sequence[Concept],
    model: LatentDiffusion,
    regularization: RegularizationImages,
    base: str,
) -> Pool:
    """Makes and encodes all views, see `training_views`, and pairs them with their prompts."""
    random = torch.Generator().manual_seed(views_seed(config.training.seed))
    shown = training_views(config, concept_data, kind, model.side, random)
    views = [each.view for each in shown]
    groups = [each.group for each in shown]
    prompts = [[expand(prompt, concepts) for prompt in each.prompts] for each in shown]
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
        "collage": config.collage,
        "object_weight": config.object_weight,
        "regions": bool(config.attention_weight),
        "seed": config.training.seed,
    }
    encoded: Encoded = encode_views(
        model,
        views,
        config.run_dir / "latents.safetensors",
        made_from,
        shown=[each.shown for each in shown] + [()] * len(regularization.pictures),
        things=[data.is_thing for data in concept_data],
        object_weight=config.object_weight,
    )
    return Pool.make(model, encoded, groups, prompts)


def about(
    config: TextualInversion | CustomDiffusion, concept_data: Sequence[ConceptData], base: str
) -> dict[str, Any]:
    """Returns what a result's config.json records: method, base model, vectors and concepts."""
    method: Literal["textual inversion", "Custom Diffusion"] = (
        "textual inversion" if isinstance(config, TextualInversion) else "Custom Diffusion"
    )
    concepts = [{"token": x.token, "word": x.word, "phrase": x.phrase} for x in concept_data]
    return {"method": method, "base": base, "vectors": config.vectors, "concepts": concepts}


# ----------------------------------------------------------------------------
# Scores.


def clip_for_checkpoints(model: str | None, device: DeviceName) -> "Clip | None":
    """Returns the CLIP that scores checkpoints, or None; prints which, or why there is none."""
    from common.clip.loading import load_judge

    is_file = model is not None and Path(model).is_file()
    clip, note = load_judge(*((None, model) if is_file else (model, None)), device=device)
    print(
        f"checkpoints are scored by {note}"
        if clip
        else f"checkpoints are compared by their loss on fixed noise, without a CLIP: {note}"
    )
    return clip


def scores(
    clip: "Clip",
    pictures: Tensor,
    texts: Sequence[tuple[int, str]],
    photos: Sequence[Sequence[Tensor]],
) -> tuple[float, float]:
    """Returns the mean image and text scores (100 times the cosine, as in the 2024 grader).

    `pictures` is uint8 [K, 3, S, S], equally many for each (index of the concept, text in known
    words) of `texts`; `photos` are the reference photos of each concept.
    """
    from common.clip.features import encode_pictures

    features = encode_pictures(clip, list(pictures)).unflatten(0, (len(texts), -1))
    references = [encode_pictures(clip, list(own)) for own in photos]
    image = [image_cosines(own, references[k]) for own, (k, _) in zip(features, texts, strict=True)]
    text = [text_cosines(clip, own, words) for own, (_, words) in zip(features, texts, strict=True)]
    return tuple(FORMS["dlcv2024"](torch.cat(values)).mean().item() for values in (image, text))


if __name__ == "__main__":
    cli.run(main, Config)
