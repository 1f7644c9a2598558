"""CLIP zero-shot classification of a folder of pictures, with a single prompt and with an ensemble
of prompts side by side.

    python3 -m p3_clip.inference --images hw2_data/clip_zeroshot/val \
        --labels hw2_data/clip_zeroshot/id2label.json --output-dir OUT
    python3 -m p3_clip.inference ... --model ViT-B-32 --pretrained laion2b_s34b_b79k
    python3 -m p3_clip.inference ... --model checkpoints/clip_shapes

Pictures are named {class_id}_{image_id}.png. OUT gets results.json (CLIP_benchmark's schema),
predictions.csv and cosines.safetensors, from which p3_clip.evaluate and p3_clip.study.figures make
the report. Image features are kept by content, so that other labels and templates on the same
pictures take seconds.
"""

import dataclasses
import time
from collections.abc import Mapping
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
from common.errors import InputError
from common.files import ROOT, atomic_write, check_folder, make_folder, read_json, shown, write_json
from common.images import SUFFIXES, image_files
from p3_clip.model import (
    check_template,
    class_names,
    default_templates,
    read_templates,
    spaced,
    template_hash,
    zero_shot_classifier,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Classifies a folder of pictures by CLIP, without training."""

    images: Path
    """Folder of pictures named {class_id}_{image_id}.png."""
    labels: Path
    """JSON file, class id to class name."""
    output_dir: Path
    """Gets results.json, predictions.csv and cosines.safetensors."""
    template: str = "a photo of a {}"
    """The single prompt; {} stands for the class name."""
    ensemble: Path | None = None
    """Text file with a template in each line; by default the model folder's templates.txt, else
    OpenAI's seven."""
    names: Path | None = None
    """JSON file, class id or name to other words for it, for example
    p3_clip/data/names/course_2024.json."""
    batch_size: int = 64
    """Pictures in one network call."""
    workers: int = 2
    """Threads that read and preprocess while the network computes."""
    cache: Path = ROOT / "outputs" / "clip_features"
    """Folder in which image features are kept by content."""
    use_cache: bool = True
    """Whether to keep and use features."""
    clip: Annotated[ClipConfig, tyro.conf.arg(name="")] = ClipConfig()


def main(config: Config) -> None:
    """Classifies, prints the table and writes the three files."""
    for name in ("batch_size", "workers"):
        if getattr(config, name) < 1:
            raise InputError(
                f"--{name.replace('_', '-')} must be at least 1, not {getattr(config, name)}"
            )
    single = check_template(config.template, "--template")
    if config.ensemble:
        read_templates(config.ensemble)
    classes = read_labels(config.labels)
    items = find_images(config.images, classes)
    names, changed = class_names(classes, read_json(config.names) if config.names else {})
    check_folder(config.output_dir)
    clip, note = config.clip.load()
    print(note, flush=True)
    path = config.ensemble or default_templates(clip)
    prompts = {"single": [single], "ensemble": read_templates(path)}

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
    run = Run([file.name for file, _ in items], labels, ids, names, clip.scale, cosines)
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
    atomic_write(folder / "predictions.csv", predictions(run).to_csv(index=False).encode())
    run.save(folder)
    write_json(folder / "results.json", result)
    print(f"{changed} of {len(ids)} class names changed (underscores to spaces, and overrides)")
    table = {
        what: {name: f"{value:.2%}" for name, value in part["metrics"].items()}
        for what, part in parts.items()
    }
    print(pd.DataFrame(table).to_string())
    print(
        f"{len(items)} images, {len(ids)} classes; single: {single!r}; ensemble:"
        f" {len(prompts['ensemble'])} of {path}"
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
    """Class id -> class name, from the JSON file. Raises InputError if it is not that or two
    classes have one name."""
    value = read_json(path)
    if (
        not isinstance(value, dict)
        or not value
        or not all(isinstance(name, str) and name for name in value.values())
    ):
        raise InputError(f'{path} must map class ids to names, like {{"0": "bicycle"}}')
    seen: dict[str, str] = {}
    for class_id, name in value.items():
        if (other := seen.setdefault(spaced(name), class_id)) != class_id:
            raise InputError(
                f"{path}: the classes {other} and {class_id} have the same name, {name!r}"
            )
    return value


def find_images(folder: Path, classes: Mapping[str, str]) -> list[tuple[Path, str]]:
    """The pictures of a folder, sorted by name, with their class ids. Raises InputError that names
    the file."""
    if not Path(folder).is_dir():
        raise InputError(f"the image folder {folder} does not exist")
    files = image_files(folder)
    if not files:
        raise InputError(f"{folder} holds no image ({', '.join(SUFFIXES)})")
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
    """What a run found: `cosines` by kind of prompt, each [N, C]; `labels` are indices into `ids`
    and `names`."""

    files: list[str]
    labels: Tensor
    ids: list[str]
    names: list[str]
    scale: float
    cosines: dict[str, Tensor]

    def save(self, folder: Path) -> None:
        """Writes cosines.safetensors."""
        metadata = {"files": self.files, "ids": self.ids, "names": self.names, "scale": self.scale}
        save_tensors(
            Path(folder) / "cosines.safetensors", {"labels": self.labels, **self.cosines}, metadata
        )

    @classmethod
    def load(cls, folder: Path) -> "Run":
        """Reads cosines.safetensors. Raises InputError if the folder was not written by this
        program."""
        path = Path(folder) / "cosines.safetensors"
        if not path.is_file():
            raise InputError(f"{path} does not exist: write {folder} with p3_clip.inference first")
        tensors, metadata = load_tensors(path)
        try:
            return cls(labels=tensors.pop("labels"), cosines=tensors, **metadata)
        except (KeyError, TypeError):
            raise InputError(f"{path} was not written by p3_clip.inference") from None

    def probabilities(self, prompts: str) -> Tensor:
        """Class probabilities float32 [N, C] at the model's own temperature."""
        return (self.scale * self.cosines[prompts]).softmax(dim=1)


def accuracy(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """Parts of one: right at first, among the first five, and the mean over classes of the part
    that is right."""
    order = scores.topk(min(5, scores.shape[1]), dim=1).indices
    right = order == labels[:, None]
    recalls = [right[labels == c, 0].float().mean() for c in labels.unique()]
    return {
        "acc1": right[:, 0].float().mean().item(),
        "acc5": right.any(dim=1).float().mean().item(),
        "mean_per_class_recall": torch.stack(recalls).mean().item(),
    }


def predictions(run: Run) -> pd.DataFrame:
    """One row for each picture: truth, and the prediction and runner-up of both kinds of prompt."""
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
