"""The tab Digits of the web demo: digits grow out of noise, at two guidance scales side by side.

The pictures of a digit are the first ten of it that `p1_diffusion.inference` writes with the same
settings. The chunk is the number of pictures shown, so they agree within one grey level.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import gradio as gr
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.data.digits import DATASETS, NUM_DIGITS
from common.demo import GRID, QUEUED, Steps, errors_in_the_page, paced, shown, whole
from common.diffusion.samplers import SAMPLERS
from common.diffusion.schedule import make_schedule
from common.errors import InputError
from common.grid import labelled_grid
from common.images import to_uint8
from p1_diffusion.model import ContextUNet
from p1_diffusion.sampling import ImageKey, SamplingConfig, class_keys, sample_digits

EVERY = "all"
PICTURES = 10
MAGNIFICATION = 3

Film = dict[float, list[tuple[str, Tensor]]]
"""For each guidance scale, what is seen after 0, 1, ... steps: a title, and x_t above the predicted
x0, uint8 [20, 3, H, W]."""


def tab(model: ContextUNet) -> None:
    """Adds the components and events of the tab to gradio's current `Blocks`."""
    default = SamplingConfig()
    datasets = DATASETS[: model.config.datasets]
    last_t = make_schedule(model.config.schedule).num_timesteps - 1
    scales = (default.guidance_scale, 1.0)
    *_, first = sample(model, keys_of(datasets[0], EVERY), scales, default)
    gr.Markdown(
        "Ten digits grow out of noise, twice from the **same noise** with two scales of"
        " classifier-free guidance. `x_t` is what the sampler holds, `x0` the clean picture that"
        " the network predicts from it."
    )
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            digit = gr.Radio([EVERY, *map(str, range(NUM_DIGITS))], value=EVERY, label="Digit")
            dataset = gr.Radio(list(datasets), value=datasets[0], label="Style of the dataset")
            scale = gr.Slider(0, 15, default.guidance_scale, step=0.5, label="Guidance scale")
            other = gr.Slider(0, 15, scales[1], step=0.5, label="Guidance scale for comparison")
            button = gr.Button("Sample", variant="primary")
            with gr.Accordion("Sampler and guidance interval", open=False):
                sampler = gr.Dropdown(
                    [(sampler.label, name) for name, sampler in SAMPLERS.items()],
                    value=default.sampler,
                    label="Sampler",
                )
                steps = gr.Slider(1, 100, default.steps, step=1, label="Steps")
                low, high = (
                    gr.Slider(0, last_t, t, step=1, label=f"{what} t with guidance")
                    for what, t in zip(
                        ("Lowest", "Highest"), default.guidance_interval, strict=True
                    )
                )
                seed = gr.Number(default.seed, label="Seed")
        with gr.Column(scale=2, min_width=320):
            picture = gr.Image(shown(drawn(first)), label="Digits", **GRID)
            done = gr.Slider(0, default.steps, default.steps, step=1, label="Look back: steps done")
    film = gr.State(first, time_to_live=600)
    inputs = [digit, dataset, scale, other, low, high, steps, sampler, seed]

    def grow(
        digit: str,
        dataset: str,
        guidance_scale: float,
        other_scale: float,
        lowest_t: float,
        highest_t: float,
        steps: float,
        sampler: str,
        seed: float,
    ) -> Iterator[tuple[NDArray[np.uint8], Film]]:
        """Ten digits at two guidance scales, from the same noise, as one picture.

        Rows: x_t and the predicted x0 of each scale; at the end, the digits and the last x0.
        """
        with errors_in_the_page():
            config = SamplingConfig(
                sampler=sampler,
                steps=whole(steps, "steps"),
                seed=whole(seed, "the seed"),
                guidance_interval=(
                    whole(lowest_t, "the lowest t"),
                    whole(highest_t, "the highest t"),
                ),
            )
            keys = keys_of(dataset, digit)
            for film in paced(sample(model, keys, (guidance_scale, other_scale), config)):
                yield shown(drawn(film)), film

    button.click(grow, inputs, [picture, film], api_name="digits", **QUEUED).success(
        lambda film: gr.Slider(maximum=steps_in(film), value=steps_in(film)),
        film,
        done,
        api_visibility="private",
        queue=False,
    )
    done.input(
        lambda film, done: shown(drawn(film, done)) if film else None,
        [film, done],
        picture,
        api_visibility="private",
        queue=False,
        show_progress="hidden",
    )
    gr.Examples(
        [
            [EVERY, datasets[-1], default.guidance_scale, 1.0],
            ["7", datasets[0], default.guidance_scale, 0.0],
            ["4", datasets[-1], 1.0, 15.0],
        ],
        [digit, dataset, scale, other],
        example_labels=[
            "In the style of SVHN",
            "Sevens beside no class",
            "Fours: no guidance, much",
        ],
        label="Examples",
    )


def sample(
    model: ContextUNet, keys: list[ImageKey], scales: Sequence[float], config: SamplingConfig
) -> Iterator[Film]:
    """Yields the film of the keys' pictures, longer by one step each time: one scale after another.

    Raises InputError if a setting is out of range.
    """
    film: Film = {}
    for scale in scales:
        settings = dataclasses.replace(config, guidance_scale=scale, chunk_size=len(keys))
        settings.check(make_schedule(model.config.schedule).num_timesteps)
        seen = film.setdefault(scale, [])
        if seen:  # both scales are equal
            continue
        run = Steps(
            lambda callback, settings=settings: next(
                sample_digits(model, keys, settings, callback=callback, show_progress=False)
            )[1]
        )
        for i, t, x_t, x0 in run:
            title = f"{i} of {config.steps} steps done, t = {t}"
            seen.append((title, to_uint8(torch.cat([x_t, x0]))))
            yield film
        title = f"{SAMPLERS[config.sampler].label}, {config.steps} steps"
        seen.append((title, torch.cat([run.result, seen[-1][1][PICTURES:]])))
        yield film


def keys_of(dataset: str, digit: str) -> list[ImageKey]:
    """The keys of ten pictures: the first of each digit for EVERY, else the first ten of a digit.

    Raises InputError if there is no such dataset or digit.
    """
    if dataset not in DATASETS or digit not in (EVERY, *map(str, range(NUM_DIGITS))):
        raise InputError(f"there is no digit {digit!r} of the dataset {dataset!r}")
    if digit == EVERY:
        return class_keys([(dataset, value) for value in range(NUM_DIGITS)], 1)
    return class_keys([(dataset, int(digit))], PICTURES)


def steps_in(film: Film) -> int:
    """The number of steps of a complete film."""
    return max((len(seen) - 1 for seen in film.values()), default=0)


def drawn(film: Film, done: int | None = None) -> Tensor:
    """The film after `done` steps, or its newest picture for None, as a grid uint8 [3, H', W']."""
    seen = {
        scale: frames[-1 if done is None else min(done, len(frames) - 1)]
        for scale, frames in film.items()
    }
    labels = [f"scale {scale:g}\n{name}" for scale in seen for name in ("x_t", "x0")]
    title = list(seen.values())[-1][0]
    pictures = torch.cat([pictures for _, pictures in seen.values()])
    return labelled_grid(pictures, PICTURES, row_labels=labels, title=title, scale=MAGNIFICATION)
