"""Merges results of Custom Diffusion that were trained separately, in closed form.

    python3 -m p3_clip.personalisation.merge --results runs/wine/last runs/mauve/last \
        --output-dir runs/merged

The method is that of Section 3.2 of Kumari et al. 2023 (arXiv:2212.04488).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import cli
from common.checkpoint import load_config
from common.config import Count, Seed
from common.errors import InputError
from common.files import ROOT
from common.latent.load import load_base
from common.latent.model import LatentDiffusion
from p3_clip.personalisation.base_kind import base_kind
from p3_clip.personalisation.concepts import check_tokens, expand, with_concepts
from p3_clip.personalisation.custom_diffusion import CustomDiffusionResult, merge, projections
from p3_clip.personalisation.model import KIND, load_learned, save_learned

CHUNK = 50  # captions encoded at once


@dataclasses.dataclass(frozen=True)
class Config:
    """Merges results of Custom Diffusion that were trained separately."""

    results: tuple[Path, ...]
    """Folders of at least two results, trained on the same base model."""
    output_dir: Path
    """Folder for the merged result."""
    base: Path = ROOT / "checkpoints" / "ldm_shapes"
    """The base model: a Stable Diffusion v1.4 file or folder, or the folder of a small model."""
    captions: Count = 1000
    """Number of captions of all kinds of things, whose keys and values should change least."""
    seed: Seed = 0
    """Seed of these captions."""


def main(config: Config) -> None:
    """Merges the results and writes the merged one.

    Raises InputError if a result holds words only or was trained on another base model, if its
    config.json does not name its words, or if two results use the same placeholder.
    """
    if len(config.results) < 2:
        raise InputError("--results must name at least two results")
    kind = base_kind(config.base)
    model = load_base(config.base)
    parts = [load_learned([path], model) for path in config.results]
    about = [load_config(path, KIND) for path in config.results]
    for path, part in zip(config.results, parts, strict=True):
        if not part.weights:
            raise InputError(
                f"{path} holds words only, which need no merging: give both results to --concepts"
                " of p3_clip.personalisation.inference"
            )
    concepts = [concept for part in parts for concept in part.concepts]
    check_tokens([concept.token for concept in concepts], model.tokenizer)
    learned = [
        (
            part.weights,
            phrase_features(model, part, phrases_of(part, own, path), kind.merge_sentences),
        )
        for part, own, path in zip(parts, about, config.results, strict=True)
    ]
    captions = kind.merge_captions(config.captions, config.seed)
    parts = [captions[i : i + CHUNK] for i in range(0, len(captions), CHUNK)]
    features = torch.cat([model.encode_text(part).flatten(0, 1) for part in parts])
    base = {name: weight.detach() for name, weight in projections(model.unet).items()}
    merged = merge(base, learned, features)
    entries = [entry for own in about for entry in own["concepts"]]
    result = {
        "method": "Custom Diffusion, merged",
        "base": about[0].get("base"),
        "vectors": max(own.get("vectors", 1) for own in about),
        "concepts": entries,
    }
    save_learned(config.output_dir, CustomDiffusionResult(merged, concepts), result)
    print(f"merged {', '.join(concept.token for concept in concepts)} in {config.output_dir}")


def phrases_of(part: CustomDiffusionResult, about: Mapping[str, Any], path: Path) -> list[str]:
    """Returns the phrase of each concept of a result, from its config.json.

    The file of weights sorts concepts by name, config.json has them in the order of training.
    """
    phrases = {entry["token"]: entry["phrase"] for entry in about["concepts"]}
    if phrases.keys() != {concept.token for concept in part.concepts}:
        raise InputError(
            f"{path / 'config.json'} names {', '.join(phrases)}, but the result holds"
            f" {', '.join(concept.token for concept in part.concepts)}"
        )
    return [phrases[concept.token] for concept in part.concepts]


@torch.no_grad()
def phrase_features(
    model: LatentDiffusion,
    part: CustomDiffusionResult,
    phrases: Sequence[str],
    sentences: Sequence[str],
) -> Tensor:
    """Returns the text features of the concepts' phrases in each sentence, float32 [n, D].

    Each sentence must end with {}. Only the positions of the phrase are taken, not those of the
    words before it or of the end token, whose keys and values should not change.
    """
    text_encoder, tokenizer = with_concepts(model.text_encoder, model.tokenizer, part.concepts)
    rows = []
    for concept, phrase in zip(part.concepts, phrases, strict=True):
        for sentence in sentences:
            before, whole = (
                tokenizer(expand(text, part.concepts)).input_ids
                for text in (sentence.format(""), sentence.format(phrase.format(concept.token)))
            )
            features = text_encoder(torch.tensor([whole])).last_hidden_state[0]
            rows.append(features[len(before) - 1 : len(whole) - 1])  # without the end tokens
    return torch.cat(rows).float()


if __name__ == "__main__":
    cli.run(main, Config)
