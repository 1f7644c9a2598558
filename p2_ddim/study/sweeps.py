"""Runs the studies of Problem 2; each writes results/p2_STUDY.json.

    python3 -m p2_ddim.study.sweeps steps
    python3 -m p2_ddim.study.sweeps eta --photos hw2_data/face
    python3 -m p2_ddim.study.sweeps paths --photos hw2_data/face

- `steps` measures the error of a sampler with few steps, and makes a plot as well.
- `eta` measures the effect of the fresh noise that DDIM draws with eta > 0.
- `paths` measures the images along interpolations between two noises, and makes a plot as well.

The noises are drawn from --seed. Each study takes some minutes on two CPU cores with the shipped
model.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import tyro
from torch import Tensor

from common import cli
from common.config import Seed, Side
from common.data.faces import load_faces
from common.devices import DeviceName, pick_device
from common.diffusion.samplers import SAMPLERS, count_evaluations
from common.errors import InputError
from common.files import ROOT, make_folder, shown, write_json
from common.images import to_uint8
from common.metrics.detail import rms_difference
from common.metrics.frechet import feature_statistics, frechet_distance
from common.seeds import StackedRandomGenerator, derive_seeds
from p2_ddim.model import FACES, FaceNetwork, load_network
from p2_ddim.sampling import NamedNoise, SamplingConfig, check_side, plan, sample_faces
from p2_ddim.study.features import SHIPPED, Features, choose_features, colours
from p2_ddim.study.figures import ALPHAS, ETAS, PATHS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Photos = tuple[Tensor, Tensor]  # (training, held-out) photos, uint8 [N, 3, S, S] each
Measure = Callable[[Tensor], dict[str, float]]  # from uint8 images [N, 3, S, S] to metrics

COUNTS = {"steps": 8, "eta": 96, "paths": 96}  # default of --count
LEAST = {"steps": 1, "eta": 2, "paths": 2}  # 2, since covariances are taken over the images
REFERENCE_STEPS = 1000
# (sampler, spacing, steps)
STEP_TABLE = (
    *(
        ("ddim", spacing, steps)
        for spacing in ("homework", "trailing")
        for steps in (10, 20, 50, 100, 250)
    ),
    *(("dpmpp_2m", spacing, steps) for spacing in ("homework", "trailing") for steps in (10, 20)),
)
ETA_SAMPLING = SamplingConfig(chunk_size=16)
PATH_SAMPLING = SamplingConfig(sampler="dpmpp_2m", steps=20, spacing="trailing", chunk_size=16)


@dataclasses.dataclass(frozen=True)
class Config:
    """Runs a study of Problem 2."""

    study: tyro.conf.Positional[Literal["steps", "eta", "paths"]]
    """The study to run."""
    checkpoint: Path = FACES
    """Network: the homework's UNet.pt, a model folder of this project, or a folder of a diffusers
    UNet2DModel. The default is the shipped 64x64 face model."""
    photos: Path | None = None
    """Folder with photos/, real faces of --side; adds the Frechet distance to them in the studies
    eta and paths."""
    features: Path = SHIPPED
    """Folder of the network whose features the Frechet distance uses; if the folder does not exist,
    the colours on an 8x8 grid are used."""
    results: Path = ROOT / "results"
    """Output folder of p2_STUDY.json, and of the plots in figures/p2."""
    count: int | None = None
    """Number of noises (steps, eta) or of pairs of noises (paths). If it is not given, 8 for steps
    and 96 for eta and paths."""
    side: Side = 64
    """Height and width of the noises, in pixels."""
    seed: Seed = 0
    """Seed of the noises."""
    device: DeviceName = "auto"
    """Device of the computation; auto is CUDA if available."""


def main(config: Config) -> None:
    """Runs the study, prints its rows, and writes its file and plot."""
    count = COUNTS[config.study] if config.count is None else config.count
    if count < LEAST[config.study]:
        raise InputError(f"--count must be at least {LEAST[config.study]}, not {count}")
    device = pick_device(config.device)
    network = load_network(config.checkpoint).to(device)
    check_side(network, torch.empty(3, config.side, config.side), Path(f"--side {config.side}"))
    photos = read_photos(config.photos, config.side) if config.photos else None
    plot = None
    if config.study == "steps":
        result = study_steps(network, make_noises(count, config.side, config.seed), device)
        plot = plot_steps(result["rows"])
    else:
        features, name = choose_features(config.features)
        if config.study == "eta":
            found = study_eta(
                network,
                make_noises(count, config.side, config.seed),
                photos,
                device,
                features=features,
            )
        else:
            noises = make_noises(2 * count, config.side, config.seed)
            pairs = list(zip(noises[:count], noises[count:], strict=True))
            found = study_paths(network, pairs, photos, device, features=features)
            plot = plot_paths(found)
        result = {"features": name if photos else None, **found}
    for row in result["rows"]:
        print(
            ", ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                for key, value in row.items()
            )
        )
    settings = {
        "command": f"python3 -m p2_ddim.study.sweeps {config.study}",
        "model": shown(config.checkpoint),
        "seed": config.seed,
    }
    write_json(config.results / f"p2_{config.study}.json", {**settings, **result})
    if plot:
        path = make_folder(config.results / "figures" / "p2") / f"{config.study}.png"
        plot.savefig(path, dpi=120, metadata={"Software": None})
        print(path)


def read_photos(root: Path, side: int) -> Photos:
    """Reads the photos below `root`; raises InputError if their side is not `side`."""
    train, held_out = (load_faces(root, split).images for split in ("train", "held_out"))
    if train.shape[-1] != side:
        raise InputError(f"the photos are {train.shape[-1]} pixels wide, but --side is {side}")
    return train, held_out


def make_noises(count: int, side: int, seed: int) -> list[Tensor]:
    """Draws `count` standard normal noises [3, side, side], each from its own seed."""
    return list(StackedRandomGenerator(derive_seeds(seed, count=count)).randn(3, side, side))


def final_images(
    network: FaceNetwork, noises: Sequence[Tensor], sampling: SamplingConfig, device: torch.device
) -> Tensor:
    """Samples an image from each noise, float32 [N, 3, H, W] on the CPU, clamped to [-1, 1].

    The min-max normalisation of `minmax_to_uint8` is left out, so that grey levels of different
    images can be compared.
    """
    named_noises: list[NamedNoise] = [(str(i), noise) for i, noise in enumerate(noises)]
    return torch.cat([x0 for _, x0 in sample_faces(network, named_noises, sampling, device)]).clamp(
        -1.0, 1.0
    )


# ----------------------------------------------------------------------------
# The study "steps": error against the number of steps.


def study_steps(
    network: FaceNetwork,
    noises: list[Tensor],
    device: torch.device,
    table: Sequence[tuple[str, str, int]] = STEP_TABLE,
    reference_steps: int = REFERENCE_STEPS,
) -> dict[str, Any]:
    """MSE, on pixels in 0..255, to DDIM with all timesteps from the same noises.

    There is a row for each (sampler, spacing, steps) of the table. The reference and the trailing
    spacing start at t = 999. The homework's spacing starts lower (t = 981 for 50 steps, 901 for 10)
    from the same noise, which adds to its error.
    """
    base = SamplingConfig(chunk_size=min(len(noises), 16))
    reference = final_images(
        network, noises, dataclasses.replace(base, steps=reference_steps), device
    )
    rows = []
    for sampler, spacing, steps in table:
        sampling = dataclasses.replace(base, sampler=sampler, steps=steps, spacing=spacing)
        images = final_images(network, noises, sampling, device)
        per_image = _grey_mse(images, reference)
        rows.append(
            {
                "sampler": sampler,
                "spacing": spacing,
                "steps": steps,
                "evaluations": count_evaluations(sampler, *plan(sampling)),
                "mse": per_image.mean().item(),
                "mse_standard_error": per_image.std().item() / math.sqrt(len(noises))
                if len(noises) > 1
                else 0.0,
            }
        )
    return {"images": len(noises), "reference_steps": reference_steps, "rows": rows}


def plot_steps(rows: list[dict[str, Any]]) -> "Figure":
    """Plots the MSE against network evaluations, a line for each sampler and spacing."""
    figure, (axes,) = _figure(1)
    for key in dict.fromkeys((row["sampler"], row["spacing"]) for row in rows):
        line = [row for row in rows if (row["sampler"], row["spacing"]) == key]
        label = f"{SAMPLERS[key[0]].label}, {key[1]} spacing"
        axes.loglog(
            [row["evaluations"] for row in line], [row["mse"] for row in line], "o-", label=label
        )
    axes.set(xlabel="network evaluations", ylabel="MSE to 1000 steps (grey levels squared)")
    axes.legend()
    return figure


# ----------------------------------------------------------------------------
# Metrics of images.


def measures(photos: Photos | None, features: Features) -> Measure:
    """Returns the function that computes the metrics of uint8 images [N, 3, S, S].

    These are the metrics of `look` and, if photos are given, `frechet_distance` to the training
    photos.
    """
    target = feature_statistics(features(photos[0])) if photos else None

    def measure(images: Tensor) -> dict[str, float]:
        found = look(images)
        if target is not None:
            found["frechet_distance"] = frechet_distance(
                feature_statistics(features(images)), target
            )
        return found

    return measure


def measure_real(photos: Photos | None, count: int, measure: Measure) -> dict[str, float] | None:
    """The metrics of `count` held-out photos, or of all if there are fewer; None without photos."""
    if photos is None:
        return None
    if len(photos[1]) < 2:  # covariances are taken over them
        raise InputError(f"at least two held-out photos are needed, not {len(photos[1])}")
    chosen = torch.randperm(len(photos[1]), generator=torch.Generator().manual_seed(0))[:count]
    return measure(photos[1][chosen])


def look(images: Tensor) -> dict[str, float]:
    """Contrast and detail of uint8 images [N, 3, H, W], in grey levels, averaged over the images.

    `contrast` is the standard deviation within an image; `detail` is the root mean square
    difference of neighbouring pixels.
    """
    return {
        "contrast": images.float().flatten(1).std(1).mean().item(),
        "detail": rms_difference(images),
    }


# ----------------------------------------------------------------------------
# The study "eta": effect of the sampler's fresh noise.


def study_eta(
    network: FaceNetwork,
    noises: list[Tensor],
    photos: Photos | None,
    device: torch.device,
    sampling: SamplingConfig = ETA_SAMPLING,
    features: Features = colours,
    etas: Sequence[float] = ETAS,
) -> dict[str, Any]:
    """MSE to the images of eta 0, on pixels in 0..255, and the metrics of `measures`, for each eta.

    All etas start from the same noises. `unrelated_mse` is the MSE between images of eta 0 from
    different noises: the value to expect if the initial noise had no effect.
    """
    sampling = dataclasses.replace(sampling, chunk_size=min(len(noises), sampling.chunk_size))
    measure = measures(photos, features)
    plain = final_images(network, noises, dataclasses.replace(sampling, eta=0.0), device)
    rows = []
    for eta in etas:
        images = (
            final_images(network, noises, dataclasses.replace(sampling, eta=eta), device)
            if eta
            else plain
        )
        rows.append(
            {"eta": eta, "mse": _grey_mse(images, plain).mean().item(), **measure(to_uint8(images))}
        )
    return {
        "images": len(noises),
        "steps": sampling.steps,
        "unrelated_mse": _grey_mse(plain.roll(1, 0), plain).mean().item(),
        "real": measure_real(photos, len(noises), measure),
        "rows": rows,
    }


def _grey_mse(images: Tensor, others: Tensor) -> Tensor:
    """MSE [N], on pixels in 0..255, of each pair of images [N, 3, H, W] in [-1, 1]."""
    return ((images - others) * 127.5).square().flatten(1).mean(1)


# ----------------------------------------------------------------------------
# The study "paths": interpolation between two noises.


def study_paths(
    network: FaceNetwork,
    pairs: list[tuple[Tensor, Tensor]],
    photos: Photos | None,
    device: torch.device,
    sampling: SamplingConfig = PATH_SAMPLING,
    features: Features = colours,
    alphas: Sequence[float] = ALPHAS,
) -> dict[str, Any]:
    """Norm of the noise over sqrt(d), and metrics of the images, for each path and alpha.

    Both are taken over all pairs of noises; d is the number of values of a noise.
    """
    sampling = dataclasses.replace(sampling, chunk_size=min(len(pairs), sampling.chunk_size))
    measure = measures(photos, features)
    rows = []
    for path, between in PATHS.items():
        for alpha in alphas:
            noises = [between(a, b, alpha) for a, b in pairs]
            images = to_uint8(final_images(network, noises, sampling, device))
            norms = torch.stack([noise.norm() for noise in noises]) / math.sqrt(noises[0].numel())
            rows.append(
                {"path": path, "alpha": alpha, "norm": norms.mean().item(), **measure(images)}
            )
    return {
        "pairs": len(pairs),
        "evaluations": count_evaluations(sampling.sampler, *plan(sampling)),
        "real": measure_real(photos, len(pairs), measure),
        "rows": rows,
    }


def plot_paths(result: dict[str, Any]) -> "Figure":
    """Plots the noise's norm and the metrics against alpha, a line for each path.

    The metrics of real photos are dashed lines.
    """
    rows = result["rows"]
    labels = {
        "norm": "norm of the noise / sqrt(d)",
        "contrast": "contrast (grey levels)",
        "detail": "detail (grey levels)",
        "frechet_distance": "Frechet distance to photos",
    }
    measures = [name for name in labels if name in rows[0]]
    figure, panels = _figure(len(measures))
    for axes, name in zip(panels, measures, strict=True):
        for path in PATHS:
            line = [row for row in rows if row["path"] == path]
            axes.plot([row["alpha"] for row in line], [row[name] for row in line], "o-", label=path)
        if result["real"] and name in result["real"]:
            axes.axhline(result["real"][name], color="grey", linestyle="--", label="photos")
        axes.set(xlabel="alpha", ylabel=labels[name])
        axes.legend()
    return figure


def _figure(panels: int) -> tuple["Figure", list[Any]]:
    """A figure with that number of panels in a row, and their axes."""
    from matplotlib.figure import Figure  # imported here, since it takes a second

    figure = Figure(figsize=(4.5 * panels + 1.0, 3.8), layout="constrained")
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


if __name__ == "__main__":
    cli.run(main, Config)
