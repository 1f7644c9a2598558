"""Measures what each personalisation method learned, and writes results/p3_personalisation.json.

    python3 -m p3_clip.personalisation.study.sweeps --inversion runs/inversion/last \
        --joint runs/joint/last --merged runs/merged

Each method generates images of every sentence in `sentences.py` whose concepts it learned, all from
the same seeds; `measure.py` says what counts as in place. The baseline is the untrained
placeholder, a word with the vectors that training starts from. Methods without a result are left
out. --inversion-cut-mix and --joint-cut-mix name results that were also trained on photos side by
side, --joint-collage one that was trained on collages. Images and the measures of each sentence are
kept in --output-dir, so a second call continues where the first stopped.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from common import cli
from common.checkpoint import load_config, state_hash, tensors_hash
from common.data.concepts import DRAWN, PHOTOS, draw_photo
from common.devices import DeviceName, pick_device
from common.errors import InputError
from common.files import ROOT, write_json
from common.images import read_rgb
from common.latent.generate import GenerationConfig, Request
from common.latent.load import load_base
from common.latent.model import LatentDiffusion
from common.latent.save_pictures import Picture, draw_missing
from common.latent.small import DEFAULT_GUIDANCE
from common.metrics.clip_scores import FORMS, image_cosines, text_cosines
from common.seeds import derive_seeds
from common.study import WEIGHTS, measured_rows
from p3_clip.personalisation.base_kind import SMALL
from p3_clip.personalisation.concepts import Concept, expand, initial_vectors, norms
from p3_clip.personalisation.custom_diffusion import CustomDiffusionResult
from p3_clip.personalisation.model import KIND, load_learned, personalise, usual_words
from p3_clip.personalisation.sentences import (
    HARDER,
    OFFERED,
    PAIRS,
    SENTENCES,
    Sentence,
)
from p3_clip.personalisation.study.measure import colour_error, judge, look_for, rates

if TYPE_CHECKING:
    from common.clip.model import Clip

UNTRAINED = "untrained placeholder"
INVERSION, INVERSION_CUT_MIX = "textual inversion", "textual inversion, cut-mix"
JOINT, JOINT_CUT_MIX = "Custom Diffusion, joint", "Custom Diffusion, joint, cut-mix"
JOINT_COLLAGE = "Custom Diffusion, joint, collage"
MERGED = "Custom Diffusion, merged"
PARTS = {"offered": OFFERED, "pairs": PAIRS, "harder": HARDER}
"""Sentences besides SINGLES, by their entry in the results."""
SEED = 2024
COMMAND = "bash scripts/study_personalisation.sh"


@dataclasses.dataclass(frozen=True)
class Config:
    """Measures what each personalisation method learned."""

    inversion: Path | None = None
    """Result of textual inversion."""
    inversion_cut_mix: Path | None = None
    """Result of textual inversion with --cut-mix, so also on photos side by side."""
    joint: Path | None = None
    """Result of Custom Diffusion, trained jointly on several concepts."""
    joint_cut_mix: Path | None = None
    """Result of joint Custom Diffusion with --cut-mix, so also on photos side by side."""
    joint_collage: Path | None = None
    """Result of joint Custom Diffusion with --collage, so also on things cut out and placed on
    other backgrounds."""
    merged: Path | None = None
    """Result of p3_clip.personalisation.merge, from Custom Diffusion on single concepts."""
    base: Path = ROOT / "checkpoints" / "ldm_shapes"
    """Folder of the small model."""
    output_dir: Path = ROOT / "outputs" / "personalisation"
    """Folder for the images."""
    result: Path = ROOT / "results" / "p3_personalisation.json"
    """JSON file to write."""
    images: int = 30
    """Images per prompt."""
    clip: str | None = None
    """CLIP of the image and text scores: a model folder, a name of open_clip, or none. Default:
    OpenAI's ViT-B/32 if it is available."""
    steps: int = 20
    """Sampling steps."""
    chunk_size: int = 20
    """Images per forward pass."""
    device: DeviceName = "auto"
    """Where to compute; auto takes CUDA if present."""


def main(config: Config) -> None:
    """Generates the images, measures them and writes the results."""
    from common.clip.loading import load_judge

    if config.images < 1:
        raise InputError(f"--images must be at least 1, not {config.images}")
    generation = GenerationConfig(
        steps=config.steps,
        guidance_scale=DEFAULT_GUIDANCE.scale,
        pag_scale=DEFAULT_GUIDANCE.pag_scale,
        seed=SEED,
        chunk_size=config.chunk_size,
    )
    generation.check()
    device = pick_device(config.device)
    # All results are read first, so that a wrong path fails before any image is generated.
    tokens = {path: tokens_of(path) for path in sources(config).values() if path is not None}
    learned_by_any = [name for name in DRAWN if any(name in known for known in tokens.values())]
    clip, note = load_judge(config.clip, device=config.device)
    methods: dict[str, dict[str, Any]] = {}
    for method, path in sources(config).items():
        model = load_base(config.base)
        known = (
            tokens[path]
            if path
            else {name: f"<new{k + 1}>" for k, name in enumerate(learned_by_any)}
        )
        learned = learn(model, path, known, vectors_of(config))
        relative_norms = norms(learned.concepts, usual_words(model, SMALL))
        personalise(model, learned)
        personalised = PersonalisedModel(
            config, model.to(device), learned.concepts, known, generation, method, clip
        )
        settings = {
            "images": config.images,
            "sampling": {
                "solver": generation.sampler,
                "steps": config.steps,
                "guidance_scale": generation.guidance_scale,
                "pag_scale": generation.pag_scale,
            },
            "clip": note if clip is not None else None,
        }
        found = measured(personalised, {"method": method, **settings})
        singles = {
            name: {**single(name, found), "norm": relative_norms[token]}
            for name, token in known.items()
        }
        methods[method] = {"singles": singles} | {
            part: {key: found[key] for key in sentences if key in found}
            for part, sentences in PARTS.items()
        }
        print_method(method, methods[method])
    write_json(config.result, {"command": COMMAND, **settings, "methods": methods})


def sources(config: Config) -> dict[str, Path | None]:
    """Returns the result of each method to measure; None for the untrained placeholder.

    Raises InputError if no result is given.
    """
    results = {
        INVERSION: config.inversion,
        INVERSION_CUT_MIX: config.inversion_cut_mix,
        JOINT: config.joint,
        JOINT_CUT_MIX: config.joint_cut_mix,
        JOINT_COLLAGE: config.joint_collage,
        MERGED: config.merged,
    }
    given = {method: path for method, path in results.items() if path is not None}
    if not given:
        raise InputError(
            "there is nothing to measure: name a result with --inversion, --joint or --merged (see"
            " --help)"
        )
    return {UNTRAINED: None, **given}


def tokens_of(path: Path) -> dict[str, str]:
    """Returns the placeholder of each drawn concept that a result learned.

    The word and phrase in the result's config.json identify the concept. Raises InputError if it
    learned no drawn concept.
    """
    known = {
        (entry["word"], entry["phrase"]): entry["token"]
        for entry in load_config(path, KIND)["concepts"]
    }
    tokens = {name: known.get((drawn.word, drawn.phrase)) for name, drawn in DRAWN.items()}
    found = {name: token for name, token in tokens.items() if token}
    if not found:
        raise InputError(f"{path} learned none of the drawn concepts {', '.join(DRAWN)}")
    return found


def vectors_of(config: Config) -> int:
    """Vectors per concept of the first result, which the untrained placeholder gets too."""
    first = next(path for path in sources(config).values() if path is not None)
    return int(load_config(first, KIND).get("vectors", 1))


def learn(
    model: LatentDiffusion, path: Path | None, tokens: Mapping[str, str], vectors: int
) -> CustomDiffusionResult:
    """Loads a result; without one, returns untrained concepts.

    Untrained concepts have the `vectors` vectors each that training starts from.
    """
    if path is not None:
        return load_learned([path], model)
    return CustomDiffusionResult(
        {},
        [
            Concept(
                token,
                initial_vectors(DRAWN[name].word, vectors, model.text_encoder, model.tokenizer),
            )
            for name, token in tokens.items()
        ],
    )


# ----------------------------------------------------------------------------
# Generating and measuring.


@dataclasses.dataclass(frozen=True)
class PersonalisedModel:
    """A personalised model, and the settings by which it generates and keeps images."""

    config: Config
    model: LatentDiffusion
    concepts: Sequence[Concept]
    tokens: Mapping[str, str]
    """The placeholder of each drawn concept that it knows."""
    generation: GenerationConfig
    method: str
    clip: "Clip | None"
    """The CLIP of the image and text scores."""

    def draw(self, key: str) -> list[Tensor]:
        """Generates the images of a sentence, uint8 [3, S, S] each, kept in OUT/METHOD/KEY."""
        paths = picture_paths(self.config.output_dir, self.method, key, self.config.images)
        seeds = derive_seeds(SEED, count=self.config.images)
        words = expand(SENTENCES[key].prompt(self.tokens), self.concepts)
        pictures = [
            Picture(path, Request(words, seed)) for path, seed in zip(paths, seeds, strict=True)
        ]
        draw_missing(self.model, pictures, self.generation, self.model.side)
        return [read_rgb(path) for path in paths]


def picture_paths(folder: Path, method: str, key: str, count: int) -> list[Path]:
    """Returns the paths of a method's images of a sentence, by its key."""
    place = folder / method.replace(", ", "_").replace(" ", "_").lower() / key
    return [place / f"{number:03d}.png" for number in range(count)]


def measured(
    personalised: PersonalisedModel, settings: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Returns what `measure` found of each sentence whose concepts are known, by its key.

    The measures are kept in OUT/measures.json; `settings` tell them from those of other runs.
    """
    vectors = tensors_hash(*(concept.vectors for concept in personalised.concepts))
    common = {**settings, WEIGHTS: [state_hash(personalised.model), vectors]}
    plan = [
        ({"sentence": key, **common}, functools.partial(measure, personalised, key))
        for key, sentence in SENTENCES.items()
        if {*sentence.names} <= personalised.tokens.keys()
    ]
    path = personalised.config.output_dir / "measures.json"
    rows = measured_rows(path, COMMAND, plan, ("method", "sentence", "bound"))
    return {
        row["sentence"]: {name: value for name, value in row.items() if name not in plan[0][0]}
        for row in rows
        if all(row[name] == value for name, value in common.items())
    }


def measure(personalised: PersonalisedModel, key: str) -> dict[str, Any]:
    """Generates and measures the images of a sentence.

    Returns the sentence, the rates of `Judgement`, which images are in place and, with a CLIP,
    `scores`; for a sentence of `SINGLES` also "colour_error", the mean CIEDE2000 of the concept's
    colour if it has one.
    """
    sentence, pictures = SENTENCES[key], personalised.draw(key)
    seen = [look_for(sentence, picture) for picture in pictures]
    prompt = sentence.prompt({name: f"<{name}>" for name in sentence.names})
    found = {"prompt": prompt, **rates([judge(sentence, each) for each in seen])}
    drawn = DRAWN.get(key)
    if drawn and drawn.colour:
        found["colour_error"] = fmean(
            colour_error(drawn.colour, each, of_background=not drawn.is_thing) for each in seen
        )
    if personalised.clip is not None:
        found |= scores(personalised.clip, pictures, sentence)
    return found


def single(name: str, found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The numbers of one concept, from what was measured of all sentences.

    "presence" is the fraction of images in place, "colour_error" the mean CIEDE2000 (only of
    concepts with a colour). With a CLIP also "image_score", and "text_score" on images of a
    validation prompt, see `scores`.
    """
    own = found[name]
    result = {"presence": own["bound"]}
    result |= {key: own[key] for key in ("colour_error", "image_score") if key in own}
    if "image_score" in own:
        result["text_score"] = found[f"{name}_beside_square"]["text_score"]
    return result


def scores(clip: "Clip", pictures: Sequence[Tensor], sentence: Sentence) -> dict[str, float]:
    """The image and text scores of images, as for CustomConcept101 (arXiv:2212.04488).

    "image_score" is the mean cosine with the photos of a concept, averaged over the concepts of the
    sentence; "text_score" that with the sentence in known words; both times 100.
    """
    from common.clip.features import encode_pictures

    features = encode_pictures(clip, pictures)
    image = torch.stack(
        [
            image_cosines(features, encode_pictures(clip, draw_photos(name)))
            for name in sentence.names
        ]
    )
    text, score = text_cosines(clip, features, sentence.in_known_words), FORMS["dlcv2024"]
    return {"image_score": score(image).mean().item(), "text_score": score(text).mean().item()}


@functools.cache
def draw_photos(name: str) -> list[Tensor]:
    """The first photos of a drawn concept."""
    return [draw_photo(name, index) for index in range(PHOTOS)]


def print_method(method: str, found: Mapping[str, Any]) -> None:
    """Prints the measurements of a method, one line per concept or sentence."""
    print(method)
    for name, numbers in ((name, each) for part in found.values() for name, each in part.items()):
        shown = {key: round(value, 3) for key, value in numbers.items() if isinstance(value, float)}
        print(
            f"  {name}: "
            + ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in shown.items())
        )


if __name__ == "__main__":
    cli.run(main, Config)
