"""The tab Faces of the web demo: DDIM from a numbered or uploaded noise, and between two noises.

Noise number N is `scripts.make_noise`'s NN.pt. The pictures are those of `p2_ddim.inference` from
the same noises with the same settings, within one grey level: the chunk is the number of pictures
shown.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.demo import GRID, QUEUED, Steps, errors_in_the_page, shown, whole
from common.diffusion.interpolation import lerp, slerp
from common.errors import InputError
from common.grid import labelled_grid
from common.images import to_uint8
from p2_ddim.model import FaceNetwork
from p2_ddim.sampling import (
    NamedNoise,
    SamplingConfig,
    check_side,
    minmax_to_uint8,
    numbered_noise,
    read_noise,
    sample_faces,
)

LAST_NOISE = 10**9  # the largest number of a noise
WIDTH = 192  # least screen pixels of a face


def tab(network: FaceNetwork, side: int, device: torch.device) -> None:
    """Adds the components and events of the tab to gradio's current `Blocks`.

    Numbered noises have `side` x `side` pixels; `device` is the network's.
    """
    default = SamplingConfig()
    gr.Markdown(
        "A face is a function of its noise: DDIM with eta 0 adds no noise of its own, with eta 1 as"
        " much as DDPM. Between two noises **slerp** keeps the norm that the network was trained"
        " on; **lerp** loses up to 30 % of it, and the face loses detail."
    )
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            with gr.Row():
                number = gr.Number(0, label="Noise number", min_width=120)
                other = gr.Number(1, label="Second noise", min_width=120)
            alpha = gr.Slider(0, 1, 0.5, step=0.05, label="From the first noise to the second")
            eta = gr.Slider(0, 1, default.eta, step=0.05, label="eta")
            with gr.Row():
                one = gr.Button("Sample the first", variant="primary", min_width=120)
                path = gr.Button("Interpolate", variant="primary", min_width=120)
            with gr.Accordion("Noises of your own", open=False):
                upload, other_upload = (
                    gr.File(label=f"{what} noise (.pt)", file_types=[".pt"], height=140)
                    for what in ("First", "Second")
                )
            with gr.Accordion("Steps and seed", open=False):
                steps = gr.Slider(1, 250, default.steps, step=1, label="Steps")
                seed = gr.Number(default.seed, label="Seed of the noise at eta above 0")
        with gr.Column(scale=2, min_width=320):
            face_picture = gr.Image(label="From noise to a face", **GRID)
            between_picture = gr.Image(label="Between two noises", **GRID)

    def face(
        number: float, upload: str | None, eta: float, steps: float, seed: float
    ) -> Iterator[NDArray[np.uint8]]:
        """The face of one noise: x_t, the predicted x0 and at the end the face, as one picture.

        The noise is an uploaded .pt file, or without one that of this number.
        """
        with errors_in_the_page():
            noise = chosen_noise(network, side, number, upload)
            config = settings(eta, steps, seed)
            for picture in grown(network, noise, config, device):
                yield shown(picture)

    def interpolate(
        number: float,
        upload: str | None,
        other: float,
        other_upload: str | None,
        alpha: float,
        eta: float,
        steps: float,
        seed: float,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 - gradio finds it by its default
    ) -> NDArray[np.uint8]:
        """The faces of two noises and of the noises between them by slerp and lerp at alpha."""
        with errors_in_the_page():
            a = chosen_noise(network, side, number, upload)
            b = chosen_noise(network, side, other, other_upload)
            config = settings(eta, steps, seed)
            noises = between(a, b, alpha)
            run = sampling(network, noises, config, device)
            for step in run:
                progress((step.i, config.steps), unit="steps")
            return shown(row(minmax_to_uint8(run.result), labels(noises), f"alpha {alpha:g}"))

    more: list[Any] = [eta, steps, seed]
    one.click(face, [number, upload, *more], face_picture, api_name="face", **QUEUED)
    gr.on(
        [path.click, alpha.release],
        interpolate,
        [number, upload, other, other_upload, alpha, *more],
        between_picture,
        api_name="interpolate",
        trigger_mode="always_last",
        **QUEUED,
    )
    gr.Examples(
        [[0, 1, 0.5, 0.0], [3, 7, 0.35, 0.0], [5, 2, 0.5, 1.0]],
        [number, other, alpha, eta],
        example_labels=["Noises 0 and 1", "Noises 3 and 7, nearer to 3", "With DDPM's noise"],
        label="Examples",
    )


def settings(eta: float, steps: float, seed: float) -> SamplingConfig:
    """The program's defaults with these settings; raises InputError if one is out of range."""
    config = SamplingConfig(eta=eta, steps=whole(steps, "steps"), seed=whole(seed, "the seed"))
    config.check()
    return config


def chosen_noise(network: FaceNetwork, side: int, number: float, upload: str | None) -> NamedNoise:
    """The uploaded noise, or without one that of the number.

    Raises InputError if the number is out of range, or if the file holds no noise for the network.
    """
    if not upload:
        number = whole(number, "the noise number")
        if not 0 <= number <= LAST_NOISE:
            raise InputError(f"the noise number must be between 0 and {LAST_NOISE}")
        return f"{number:02d}", numbered_noise(number, side)
    noise = read_noise(Path(upload))
    check_side(network, noise, Path(upload))
    return Path(upload).stem, noise


def between(a: NamedNoise, b: NamedNoise, alpha: float) -> list[NamedNoise]:
    """The two noises, and between them slerp and lerp at `alpha` in [0, 1]; names say which.

    Raises InputError if their sizes differ.
    """
    if a[1].shape != b[1].shape:
        raise InputError(
            f"the noises {a[0]} and {b[0]} differ in size: {list(a[1].shape)} and"
            f" {list(b[1].shape)}"
        )
    return [a, ("slerp", slerp(a[1], b[1], alpha)), ("lerp", lerp(a[1], b[1], alpha)), b]


def labels(noises: Sequence[NamedNoise]) -> list[str]:
    """The name and the norm of each noise."""
    return [f"{name}: norm {float(noise.norm()):.1f}" for name, noise in noises]


def sampling(
    network: FaceNetwork,
    noises: Sequence[NamedNoise],
    config: SamplingConfig,
    device: torch.device,
) -> Steps[Tensor]:
    """The sampling of all noises in one chunk; its result is x0 [N, 3, H, W]."""
    config = dataclasses.replace(config, chunk_size=len(noises))
    return Steps(
        lambda callback: next(
            sample_faces(network, noises, config, device, callback=callback, show_progress=False)
        )[1]
    )


def grown(
    network: FaceNetwork, noise: NamedNoise, config: SamplingConfig, device: torch.device
) -> Iterator[Tensor]:
    """Yields x_t beside the predicted x0 at each step, at the end the noise beside the face."""
    run = sampling(network, [noise], config, device)
    for i, t, x_t, x0 in run:
        title = f"{i} of {config.steps} steps done, t = {t}"
        yield row(to_uint8(torch.cat([x_t, x0])), ["x_t", "predicted x0"], title)
    pictures = torch.cat([to_uint8(noise[1][None]), minmax_to_uint8(run.result)])
    yield row(pictures, [*labels([noise]), "face"], f"{config.steps} steps, eta {config.eta:g}")


def row(pictures: Tensor, names: Sequence[str], title: str) -> Tensor:
    """Pictures uint8 [N, 3, H, W] in a row, enlarged to about WIDTH, uint8 [3, H', W']."""
    scale = max(1, round(WIDTH / pictures.shape[-1]))
    return labelled_grid(pictures, len(names), column_labels=names, title=title, scale=scale)
