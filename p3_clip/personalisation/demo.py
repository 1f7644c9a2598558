"""The tab Concepts of the web demo: a prompt with learned words, beside the same without them.

The picture of the learned words is that of `p3_clip.personalisation.inference` for the first prompt
of the concept 0 in an input.json, picture 0, within one grey level.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

import gradio as gr
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from common.data.concepts import DRAWN, draw_photo
from common.demo import PICTURE, QUEUED, Steps, errors_in_the_page, shown, whole
from common.errors import InputError
from common.files import read_json
from common.images import to_pil
from common.latent.generate import GenerationConfig, Request, with_default_guidance
from common.latent.model import LatentDiffusion
from common.latent.save_pictures import draw
from p3_clip.personalisation.base_kind import BaseKind
from p3_clip.personalisation.concepts import ONE_WORD, Concept, expand, initial_vectors, without
from p3_clip.personalisation.custom_diffusion import CustomDiffusionResult
from p3_clip.personalisation.inference import SIZE, picture_path, picture_seed
from p3_clip.personalisation.inference import Config as InferenceConfig
from p3_clip.personalisation.model import load_learned, personalise, usual_words
from p3_clip.personalisation.sentences import EXAMPLES


def tab(base: LatentDiffusion, kind: BaseKind, paths: Sequence[Path]) -> None:
    """Adds the components and events of the tab to gradio's current `Blocks`.

    `paths` are the folders or files of learned concepts; there may be none. The base model is left
    as it is.
    """
    default = with_default_guidance(InferenceConfig.generation, base)
    learned = load_learned(paths, base)
    entries = [entry for path in paths for entry in described(path)]
    words = {entry["token"]: entry["word"] for entry in entries}
    known = ", ".join(f"`{concept.token}`" for concept in learned.concepts) or "none yet"
    gr.Markdown(
        f"Words that the model learned from a few photos: {known}. The same prompt and noise three"
        " times: with the learned words, with **untrained** ones, and **plain**, without the words."
    )
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            examples = [
                prompt for prompt in EXAMPLES if set(ONE_WORD.findall(prompt)) <= words.keys()
            ]
            prompt = gr.Textbox(
                examples[0] if examples else "a photo of a <name>",
                label="Prompt",
                elem_id="concepts_prompt",
            )
            button = gr.Button("Draw", variant="primary")
            upload = gr.File(
                label="Learned words of your own",
                file_types=[".safetensors", ".pt", ".bin"],
                height=140,
            )
            with gr.Accordion("Sampler", open=False):
                guidance = gr.Slider(
                    0, 15, default.guidance_scale, step=0.5, label="Guidance scale"
                )
                steps = gr.Slider(1, 100, default.steps, step=1, label="Steps")
                seed = gr.Number(default.seed, label="Seed")
        with gr.Column(scale=2, min_width=320):
            with gr.Row():
                pictures = [
                    gr.Image(label=name, min_width=160, **PICTURE)
                    for name in ("Learned", "Untrained", "Plain")
                ]
            photos = [
                (to_pil(draw_photo(name, 0)), entry["token"])
                for entry in entries
                for name, drawn in DRAWN.items()
                if (drawn.word, drawn.phrase) == (entry["word"], entry["phrase"])
            ]
            if photos:
                gr.Gallery(
                    photos,
                    label="A photo of each word",
                    columns=len(photos),
                    height=190,
                    interactive=False,
                    buttons=[],
                )

    def concepts(
        prompt: str,
        upload: str | None,
        guidance_scale: float,
        steps: float,
        seed: float,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 - gradio finds it by its default
    ) -> list[NDArray[np.uint8]]:
        """Pictures of a prompt with learned words, with untrained ones, and without the words.

        An uploaded file of learned words takes the place of the demo's own.
        """
        with errors_in_the_page():
            config = GenerationConfig(
                guidance_scale=guidance_scale,
                steps=whole(steps, "steps"),
                seed=whole(seed, "the seed"),
                chunk_size=1,
            )
            config.check(base.schedule.num_timesteps)
            mine = load_learned([Path(upload)], base) if upload else learned
            runs = samplings(base, kind, prompt, mine, {} if upload else words, config)
            for k, run in enumerate(runs):
                for step in run:
                    progress((k * config.steps + step.i, 3 * config.steps), unit="steps")
            return [shown(run.result) for run in runs]

    button.click(
        concepts,
        [prompt, upload, guidance, steps, seed],
        pictures,
        api_name="concepts",
        **QUEUED,
    )
    if examples:
        gr.Examples(
            [[example] for example in examples],
            [prompt],
            example_labels=list(examples),
            label="Examples",
        )


def described(path: Path) -> list[dict[str, str]]:
    """The concepts in a result's config.json, with token, word and phrase; none for a file."""
    config = path / "config.json"
    return read_json(config)["concepts"] if config.is_file() else []


def samplings(
    base: LatentDiffusion,
    kind: BaseKind,
    prompt: str,
    learned: CustomDiffusionResult,
    words: Mapping[str, str],
    config: GenerationConfig,
) -> list[Steps[Tensor]]:
    """The samplings of a prompt with learned, untrained and no placeholders, from one noise.

    Each result is uint8 [3, 512, 512]. Raises InputError if the prompt holds no placeholder, or one
    that is not learned.
    """
    expand(prompt, learned.concepts)  # refuses a word that is not loaded
    plain = without(prompt, learned.concepts)
    if plain == " ".join(prompt.split()):
        known = ", ".join(concept.token for concept in learned.concepts) or "none"
        raise InputError(f"the prompt holds no learned word (loaded: {known})")
    untrained = CustomDiffusionResult({}, untrained_concepts(base, kind, learned.concepts, words))
    drawings = [(personalised(base, each), prompt, each.concepts) for each in (learned, untrained)]
    return [
        sampling(model, expand(text, concepts), config)
        for model, text, concepts in [*drawings, (base, plain, [])]
    ]


def untrained_concepts(
    base: LatentDiffusion, kind: BaseKind, learned: Sequence[Concept], words: Mapping[str, str]
) -> list[Concept]:
    """Concepts with the vectors that training starts from: those of the known word in `words`.

    Where none is given, they are the mean of the vocabulary.
    """
    mean = usual_words(base, kind).float().mean(dim=0)
    return [
        Concept(
            concept.token,
            initial_vectors(
                words[concept.token], len(concept.vectors), base.text_encoder, base.tokenizer
            )
            if concept.token in words
            else mean.expand(len(concept.vectors), -1),
        )
        for concept in learned
    ]


def personalised(base: LatentDiffusion, learned: CustomDiffusionResult) -> LatentDiffusion:
    """A copy of the base model that knows the learned words; unchanged networks are shared."""
    shared = [base.autoencoder, base.text_encoder, base.tokenizer]
    if not learned.weights:
        shared.append(base.unet)
    model = copy.deepcopy(base, {id(part): part for part in shared})
    personalise(model, learned)
    return model


def sampling(model: LatentDiffusion, prompt: str, config: GenerationConfig) -> Steps[Tensor]:
    """The sampling of one picture; its result is uint8 [3, 512, 512]."""
    request = Request(prompt, picture_seed(picture_path("0", 0, 0), config.seed))
    return Steps(
        lambda callback: next(
            draw(model, [request], config, SIZE, callback=callback, show_progress=False)
        )[1][0]
    )
