"""Classifies a folder of images by zero-shot CLIP, with a single prompt and a prompt ensemble.

    python3 -m p3_clip.inference --images hw2_data/clip_zeroshot/val \
        --labels hw2_data/clip_zeroshot/id2label.json --output-dir OUT
    python3 -m p3_clip.inference ... --model ViT-B-32 --pretrained laion2b_s34b_b79k
    python3 -m p3_clip.inference ... --model checkpoints/clip_shapes

Images are named {class_id}_{image_id}.png. The program writes results.json (in CLIP_benchmark's
schema), predictions.csv (one row per image) and cosines.safetensors (the cosine of each image with
each class), which p3_clip.evaluate and p3_clip.study.figures read. Image features are cached by the
content of the file, so another run on the same images, with other labels or templates, takes
seconds.
"""

import dataclasses
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import tyro
from torch import Tensor

from common import cli
from common.checkpoint import load_tensors, save_tensors
from common.clip.features import extract_features
from common.clip.loading import ClipConfig
from common.clip.model import Clip
from common.config import bounds
from common.diffusion.sampling import ChunkSize
from common.errors import InputError
from common.files import ROOT, atomic_write, check_folder, make_folder, read_json, shown, write_json
from common.images import image_files, name_text
from p3_clip.model import (
    check_template,
    class_names,
    class_prompts,
    default_templates,
    read_templates,
    template_hash,
    zero_shot_classifier,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Classifies a folder of images by zero-shot CLIP."""

    images: Path
    """Folder of images named {class_id}_{image_id}.png."""
    labels: Path
    """JSON file that maps class ids to class names."""
    output_dir: Path
    """Folder for results.json, predictions.csv and cosines.safetensors."""
    template: str = "a photo of a {}"
    """The single prompt; {} stands for the class name."""
    ensemble: Path | None = None
    """Text file with one prompt template per line. Default: the model folder's templates.txt or, if
    it has none, OpenAI's seven templates."""
    names: Path | None = None
    """JSON file that maps a class id or name to the words to use for it, for example
    p3_clip/data/names/course_2024.json. Default: the names in --labels."""
    batch_size: ChunkSize = 64
    """Images per forward pass."""
    workers: Annotated[int, *bounds(at_least=1, at_most=256)] = 2
    """Threads that read and preprocess images while the network computes."""
    cache: Path = ROOT / "outputs" / "clip_features"
    """Folder of the image-feature cache, which identifies images by content."""
    use_cache: bool = True
    """Whether to read and write the image-feature cache."""
    clip: Annotated[ClipConfig, tyro.conf.arg(name="")] = ClipConfig()


def main(config: Config) -> None:
    """Classifies the images, writes the three files and prints a table of the accuracies."""
    single = check_template(config.template, "--template")
    if config.ensemble:
        read_templates(config.ensemble)
    classes = read_labels(config.labels)
    items = find_images(config.images, classes)
    names, changed = class_names(
        classes, read_json(config.names) if config.names else {}, config.names
    )
    check_output(config.output_dir)
    clip, note = config.clip.load()
    print(note, flush=True)
    path = config.ensemble or default_templates(clip)
    prompts = {"single": [single], "ensemble": read_templates(path)}
    _warn_of_cut(clip, names, prompts["single"] + prompts["ensemble"])

    started = time.monotonic()
    features = extract_features(
        clip,
        [file for file, _ in items],
        batch_size=config.batch_size,
        workers=config.workers,
        cache=config.cache if config.use_cache else None,
    )
    cosines = {
        what: features @ zero_shot_classifier(clip, names, list(t)) for what, t in prompts.items()
    }
    ids = list(classes)
    labels = torch.tensor([ids.index(class_id) for _, class_id in items])
    run = Run([name_text(file) for file, _ in items], labels, ids, names, clip.scale, cosines)
    parts = {
        what: {
            "metrics": accuracy(values, labels),
            "templates": prompts[what],
            "template_hash": template_hash(prompts[what]),
        }
        for what, values in cosines.items()
    }
    result = {
        "dataset": (
            config.images.resolve().name
            if config.images.name != "val"
            else config.images.resolve().parent.name
        ),
        "model": clip.name,
        "pretrained": clip.pretrained,
        "identity": clip.identity,
        "task": "zeroshot_classification",
        "language": "en",
        **parts["single"],
        "ensemble": parts["ensemble"],
        "images": len(items),
        "classes": len(ids),
        "names_changed": changed,
        "logit_scale": clip.scale,
        "seconds": round(time.monotonic() - started, 2),
        "settings": {
            key: _plain(key, value)
            for key, value in {
                **dataclasses.asdict(config),
                **dataclasses.asdict(config.clip),
            }.items()
            if key not in ("output_dir", "cache", "use_cache", "clip")
        },
    }
    folder = make_folder(config.output_dir)
    run.save(folder)  # first: `check_output` knows the folder by it
    atomic_write(folder / "predictions.csv", predictions(run).to_csv(index=False).encode())
    write_json(folder / "results.json", result)
    print(
        f"{changed} of {len(ids)} class names changed (underscores became spaces, or --names"
        " overrides them)"
    )
    table = {
        what: {name: f"{value:.2%}" for name, value in part["metrics"].items()}
        for what, part in parts.items()
    }
    print(pd.DataFrame(table).to_string())
    print(
        f"{len(items)} images, {len(ids)} classes; single prompt {single!r}; ensemble of"
        f" {len(prompts['ensemble'])} templates in {path}"
    )


def _warn_of_cut(clip: Clip, names: Sequence[str], templates: Sequence[str]) -> None:
    """Warns of prompts whose end the text encoder does not see, so that classes may look alike."""
    if cut := clip.cut_texts(class_prompts(names, templates)):
        print(
            f"warning: {len(cut)} prompts have more tokens than the text encoder takes and are cut,"
            f" such as {textwrap.shorten(cut[0], 100)!r}",
            file=sys.stderr,
        )


def check_output(folder: Path) -> None:
    """Raises InputError if the folder cannot be written or holds like-named files of another."""
    check_folder(folder)
    if not (folder / "cosines.safetensors").exists():
        for name in ("results.json", "predictions.csv"):
            if (folder / name).exists():
                raise InputError(
                    f"{folder / name} is there already and is not of this program, which would"
                    " replace it: choose another output folder"
                )


def _plain(key: str, value: Any) -> Any:
    may_be_path = key in ("model", "pretrained") and value is not None
    return (
        shown(Path(value))
        if isinstance(value, Path) or (may_be_path and Path(value).exists())
        else value
    )


# ----------------------------------------------------------------------------
# Files and their classes.


def read_labels(path: Path) -> dict[str, str]:
    """Reads the JSON file that maps class ids to class names.

    Raises InputError if it does not do that. Two classes may have one name, such as ImageNet's
    cranes, which `class_names` tells apart.
    """
    value = read_json(path)
    if (
        not isinstance(value, dict)
        or not value
        or not all(
            isinstance(name, str) and name.replace("_", " ").strip() for name in value.values()
        )
    ):
        raise InputError(f'{path} must map class ids to names, like {{"0": "bicycle"}}')
    return value


def find_images(folder: Path, classes: Mapping[str, str]) -> list[tuple[Path, str]]:
    """Returns the image files of a folder, sorted by name, each with its class id.

    Raises InputError if the folder is missing or holds no image, or, with the name of the file, if
    a name is not {class_id}_{image_id} or its class id is not in `classes`.
    """
    if not Path(folder).is_dir():
        raise InputError(f"the image folder {folder} does not exist")
    files = image_files(folder, report=True)
    if not files:
        raise InputError(f"{folder} holds no image")
    items = []
    for file in files:
        class_id, _, image_id = file.stem.rpartition("_")
        if not class_id or not image_id:
            raise InputError(f"{file}: the name must be {{class_id}}_{{image_id}}{file.suffix}")
        if class_id not in classes:
            raise InputError(f"{file}: the class id {class_id!r} is not in the labels")
        items.append((file, class_id))
    return items


# ----------------------------------------------------------------------------
# Results.


@dataclasses.dataclass(frozen=True)
class Run:
    """The result of a classification of N images into C classes."""

    files: list[str]
    """Names of the image files."""
    labels: Tensor
    """long [N]: index of the true class in `ids` and `names`."""
    ids: list[str]
    """Class ids."""
    names: list[str]
    """The words used for each class."""
    scale: float
    """The model's logit scale, which is the inverse temperature of the softmax."""
    cosines: dict[str, Tensor]
    """Cosines of images and classes, float32 [N, C], of the prompts "single" and "ensemble"."""

    def save(self, folder: Path) -> None:
        """Writes cosines.safetensors into `folder`."""
        metadata = {"files": self.files, "ids": self.ids, "names": self.names, "scale": self.scale}
        save_tensors(
            Path(folder) / "cosines.safetensors", {"labels": self.labels, **self.cosines}, metadata
        )

    @classmethod
    def load(cls, folder: Path) -> "Run":
        """Reads cosines.safetensors from `folder`.

        Raises InputError if the file is missing or was not written by this program.
        """
        path = Path(folder) / "cosines.safetensors"
        if not path.is_file():
            raise InputError(f"{path} does not exist: write {folder} with p3_clip.inference first")
        tensors, metadata = load_tensors(path)
        try:
            run = cls(labels=tensors.pop("labels"), cosines=tensors, **metadata)
            shape = (len(run.files), len(run.ids))
            whole = (
                {"single", "ensemble"} <= tensors.keys()
                and all(cosines.shape == shape for cosines in tensors.values())
                and run.labels.shape == shape[:1]
                and set(run.labels.tolist()) <= set(range(shape[1]))
                and len(run.names) == shape[1]
            )
        except (KeyError, TypeError):
            whole = False
        if not whole:
            raise InputError(f"{path} was not written by p3_clip.inference")
        return run

    def probabilities(self, prompts: str) -> Tensor:
        """Class probabilities, float32 [N, C]: the softmax of the scaled cosines of `prompts`."""
        return (self.scale * self.cosines[prompts]).softmax(dim=1)


def accuracy(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1, top-5 and mean per-class accuracy (recall), as fractions in [0, 1].

    `scores` is [N, C], `labels` long [N]. The mean is over the classes that have images.
    """
    order = scores.topk(min(5, scores.shape[1]), dim=1).indices
    right = order == labels[:, None]
    recalls = [right[labels == c, 0].float().mean() for c in labels.unique()]
    return {
        "acc1": right[:, 0].float().mean().item(),
        "acc5": right.any(dim=1).float().mean().item(),
        "mean_per_class_recall": torch.stack(recalls).mean().item(),
    }


def predictions(run: Run) -> pd.DataFrame:
    """Returns a table with one row per image: its true class and the predictions of each prompt.

    For "single" and "ensemble": the predicted class and the runner-up with their probabilities,
    whether the prediction is correct, and the rank of the true class, from 1.
    """
    table: dict[str, Any] = {
        "file": run.files,
        "class_id": [run.ids[label] for label in run.labels],
        "truth": [run.names[label] for label in run.labels],
    }
    for what in run.cosines:
        probabilities, order = run.probabilities(what).topk(min(2, len(run.ids)), dim=1)
        rank = (run.cosines[what] > run.cosines[what].gather(1, run.labels[:, None])).sum(1) + 1
        table |= {
            f"{what}_prediction": [run.names[i] for i in order[:, 0]],
            f"{what}_probability": probabilities[:, 0].numpy().round(6),
            f"{what}_runner_up": [run.names[i] for i in order[:, -1]],
            f"{what}_runner_up_probability": probabilities[:, -1].numpy().round(6),
            f"{what}_correct": (order[:, 0] == run.labels).numpy(),
            f"{what}_rank_of_truth": rank.numpy(),
        }
    return pd.DataFrame(table)


if __name__ == "__main__":
    cli.run(main, Config)
