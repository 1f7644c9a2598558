"""Runs the studies of Problem 1; each writes results/p1_STUDY.json.

    python3 -m p1_diffusion.study.sweeps guidance
    python3 -m p1_diffusion.study.sweeps samplers
    python3 -m p1_diffusion.study.sweeps classifier --data hw2_data/digits
    python3 -m p1_diffusion.study.sweeps recipes --data hw2_data/digits --runs runs/recipes/*
    python3 -m p1_diffusion.study.sweeps denoising --data hw2_data/digits --runs runs/p1_digits

- `guidance` sweeps the guidance strength w, and makes a plot as well.
- `samplers` compares samplers and numbers of steps.
- `classifier` measures the accuracy of the diffusion model used as a classifier.
- `recipes` compares training runs.
- `denoising` compares the network with a Wiener filter at several noise levels.

A study takes minutes to an hour on two CPU cores. Finished rows of `guidance`, `samplers` and
`recipes` are saved one by one; running the study again measures the missing rows only.
"""

import dataclasses
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
import tyro

from common import cli
from common.checkpoint import state_hash
from common.data.digits import DATASETS, Digits, load_digits, pairing
from common.devices import DeviceName, pick_device
from common.diffusion.samplers import count_evaluations
from common.diffusion.schedule import SPACINGS, make_schedule
from common.errors import InputError
from common.files import ROOT, make_folder, read_json, write_json
from common.metrics.classifier import DigitClassifier
from common.metrics.detail import mean_difference
from common.study import WEIGHTS, measured_rows
from common.text_files import read_records
from p1_diffusion.evaluate import GRADER, grade
from p1_diffusion.model import ContextUNet
from p1_diffusion.quality import load_reference, quality
from p1_diffusion.sampling import IMAGES_PER_CLASS, SamplingConfig, class_keys, sample_digits
from p1_diffusion.study.classify import TIMESTEPS, classify_by_error
from p1_diffusion.study.denoising import denoising_errors

# (w, interval of t with guidance): every timestep, and the default interval.
ALWAYS = (0, 999)
GUIDANCE_SWEEP = (
    *((w, ALWAYS) for w in (0.0, 0.5, 1.0, 2.0, 3.0, 4.0)),
    *((w, SamplingConfig().guidance_interval) for w in (0.5, 1.0, 1.5, 2.0, 3.0)),
)
# (sampler, steps, images of each class). S steps of Heun are 2 S - 1 network evaluations.
SAMPLER_TABLE = (
    *((name, steps, 25) for name in ("ddim", "dpmpp_2m") for steps in (10, 15, 20, 25)),
    *(("heun", steps, 25) for steps in (5, 8, 10, 13)),
    ("ddim", 50, 25),
    ("ddpm", 1000, 5),
)
RECIPE_IMAGES = 15  # samples of each (dataset, digit) for a row of "recipes"
RECIPE_DIGITS = 200  # held-out digits of each dataset to classify for a row of "recipes"


@dataclasses.dataclass(frozen=True)
class Config:
    """Runs a study of Problem 1 on the classes of the edition 2024: all digits of both datasets."""

    study: tyro.conf.Positional[
        Literal["guidance", "samplers", "classifier", "recipes", "denoising"]
    ]
    """The study to run."""
    checkpoint: Path = ROOT / "checkpoints" / "p1_digits"
    """Model folder; "recipes" and "denoising" do not use it."""
    grader: Path = GRADER
    """Folder of the project's classifier, which grades the samples."""
    data: Path = ROOT / "hw2_data" / "digits"
    """Folder of the real digits; "classifier", "recipes" and "denoising" use its held-out tenth."""
    runs: tuple[Path, ...] = ()
    """Run folders that "recipes" and "denoising" compare; "recipes" draws without guidance."""
    results: Path = ROOT / "results"
    """Output folder of p1_STUDY.json, and of figures/p1/guidance.png."""
    device: DeviceName = "auto"
    """Device of the computation; auto is CUDA if available."""


def main(config: Config) -> None:
    """Runs the study and writes its file."""
    if config.study in ("recipes", "denoising"):
        if not config.runs:
            raise InputError(f"{config.study} compares run folders: name them with --runs")
        (compare_recipes if config.study == "recipes" else write_denoising)(config)
        return
    model = ContextUNet.load(config.checkpoint).to(pick_device(config.device))
    if config.study == "classifier":
        write_recognised(config, model)
        return
    network, reference = DigitClassifier.load(config.grader), load_reference(config.grader)
    default = SamplingConfig()
    if config.study == "guidance":
        settings = [
            (
                dataclasses.replace(default, guidance_scale=w + 1.0, guidance_interval=interval),
                IMAGES_PER_CLASS,
            )
            for w, interval in GUIDANCE_SWEEP
        ]
    else:
        settings = [
            (dataclasses.replace(default, sampler=name, steps=s), n) for name, s, n in SAMPLER_TABLE
        ]
    weights = state_hash(model)
    plan = [
        (
            {
                WEIGHTS: weights,
                "sampling": dataclasses.asdict(sampling)
                | {"guide_w": sampling.guidance_scale - 1.0},
                "images": 20 * per_class,
            },
            functools.partial(measure, model, sampling, per_class, network, reference),
        )
        for sampling, per_class in settings
    ]
    path = config.results / f"p1_{config.study}.json"
    command = f"python3 -m p1_diffusion.study.sweeps {config.study}"
    rows = measured_rows(
        path, command, plan, ("evaluations", "accuracy", "frechet_ratio", "spread_ratio", "seconds")
    )
    if config.study == "guidance":
        plot_guidance(rows, make_folder(config.results / "figures" / "p1") / "guidance.png")


def compare_recipes(config: Config) -> None:
    """Writes p1_recipes.json, with a row of settings and metrics for each training run.

    The metrics are those of `measure` for the run's last weights without guidance, the last
    validation loss, and the accuracy as a classifier.
    """
    network, reference = DigitClassifier.load(config.grader), load_reference(config.grader)
    held_out = load_digits(config.data, "held_out")
    sampling, device = SamplingConfig(guidance_scale=1.0), pick_device(config.device)

    def measure_run(run: Path, model: ContextUNet) -> dict[str, Any]:
        model.to(device)
        losses = [line for _, line in read_records(run / "metrics.jsonl")]
        found = measure(model, sampling, RECIPE_IMAGES, network, reference)
        recognised = recognise(model, held_out, RECIPE_DIGITS)
        validation = [line["validation_loss"] for line in losses if "validation_loss" in line][-1]
        of_v = validation if model.config.parameterization == "v" else None
        return found | {"validation_loss": of_v, "recognised": recognised}

    plan = []
    for run in config.runs:
        settings, model = read_json(run / "config.json"), ContextUNet.load(run / "last")
        key = {
            "name": run.name,
            "images": settings["steps"] * settings["batch_size"],
            "settings": settings,
            WEIGHTS: state_hash(model),
        }
        plan.append((key, functools.partial(measure_run, run, model)))
    command = (
        "python3 -m p1_diffusion.study.sweeps recipes --data hw2_data/digits --runs runs/recipes/*"
    )
    shown = ("name", "validation_loss", "accuracy", "frechet_ratio", "recognised")
    measured_rows(config.results / "p1_recipes.json", command, plan, shown)


def recognise(model: ContextUNet, held_out: Digits, count: int | None = None) -> dict[str, float]:
    """Accuracy of the diffusion model as a classifier of held-out digits, for each dataset.

    Values are fractions in [0, 1]. `count` limits the digits of each dataset; None is all.
    """
    found = {}
    for i, name in enumerate(DATASETS):
        mine = torch.nonzero(held_out.datasets == i).flatten()[:count]
        right = (
            classify_by_error(model, held_out.images[mine], held_out.datasets[mine])
            == held_out.digits[mine]
        )
        found[name] = right.double().mean().item()
    return found


def write_recognised(config: Config, model: ContextUNet) -> None:
    """Writes p1_classifier.json and prints the accuracies of `recognise` on all held-out digits."""
    held_out = load_digits(config.data, "held_out")
    rows = recognise(model, held_out)
    command = "python3 -m p1_diffusion.study.sweeps classifier --data hw2_data/digits"
    write_json(
        config.results / "p1_classifier.json",
        {"command": command, "timesteps": TIMESTEPS, "images": len(held_out), **rows},
    )
    for name, value in rows.items():
        print(f"{name}: {value:.2%} of the held-out digits classified correctly")


def write_denoising(config: Config) -> None:
    """Writes p1_denoising.json: the rows of `denoising_errors` for each run's last weights."""
    train, held_out = (load_digits(config.data, part) for part in ("train", "held_out"))
    device = pick_device(config.device)
    models = {run.name: ContextUNet.load(run / "last") for run in config.runs}
    plan = [
        (
            {"name": name, WEIGHTS: state_hash(model)},
            lambda model=model: {"errors": denoising_errors(model.to(device), train, held_out)},
        )
        for name, model in models.items()
    ]
    command = "python3 -m p1_diffusion.study.sweeps denoising --data hw2_data/digits --runs RUN ..."
    measured_rows(config.results / "p1_denoising.json", command, plan, ("name", "errors"))


def measure(
    model: ContextUNet,
    sampling: SamplingConfig,
    per_class: int,
    network: DigitClassifier,
    reference: Any,
) -> dict[str, Any]:
    """Metrics of samples drawn with the given settings, `per_class` of each (dataset, digit).

    Holds accuracy, Frechet distance and spread (see `quality`) and detail in grey levels
    (`mean_difference`) as means over the datasets and, in `datasets`, for each; network evaluations
    per sample; and the seconds of sampling.
    """
    keys = class_keys(pairing("2024"), per_class)
    started = time.monotonic()
    images = torch.cat([images for _, images in sample_digits(model, keys, sampling)])
    seconds = time.monotonic() - started
    digits = torch.tensor([digit for _, digit, _ in keys])
    datasets = torch.tensor([DATASETS.index(dataset) for dataset, _, _ in keys])
    graded = grade(images, digits, datasets, dict.fromkeys(DATASETS, ("project", network)))
    numbers = {
        dataset: {
            "accuracy": graded["datasets"][dataset]["accuracy"],
            "detail": mean_difference(images[datasets == DATASETS.index(dataset)]),
            **values,
        }
        for dataset, values in quality(images, digits, datasets, network, reference).items()
    }
    schedule = make_schedule(model.config.schedule)
    timestep_pairs = SPACINGS[sampling.spacing](schedule, sampling.steps)
    return {
        "evaluations": count_evaluations(sampling.sampler, schedule, timestep_pairs),
        **{
            name: fmean([numbers[dataset][name] for dataset in DATASETS])
            for name in numbers[DATASETS[0]]
        },
        "datasets": numbers,
        "seconds": seconds,
    }


def plot_guidance(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Plots accuracy, Frechet ratio and spread ratio against the guidance strength w.

    Colours are datasets; solid lines have guidance at every timestep, dashed ones in an interval.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    rows = sorted(rows, key=lambda row: row["sampling"]["guide_w"])
    intervals = sorted({tuple(row["sampling"]["guidance_interval"]) for row in rows})
    titles = {
        "accuracy": "accuracy",
        "frechet_ratio": "Frechet distance / real",
        "spread_ratio": "spread / real",
    }
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        for colour, dataset in enumerate(DATASETS):
            for interval in intervals:
                part = [
                    row for row in rows if tuple(row["sampling"]["guidance_interval"]) == interval
                ]
                where = "always" if interval == ALWAYS else f"t in {interval[0]}..{interval[1]}"
                axis.plot(
                    [row["sampling"]["guide_w"] for row in part],
                    [row["datasets"][dataset][name] for row in part],
                    "o-" if interval == ALWAYS else "s--",
                    color=f"C{colour}",
                    label=f"{dataset}, {where}",
                )
        axis.set(xlabel="guidance w", title=title)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    cli.run(main, Config)
