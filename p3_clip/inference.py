"""CLIP zero-shot classification of a folder of pictures, with a single prompt and with an ensemble of prompts side by side.

    python3 -m p3_clip.inference --images hw2_data/clip_zeroshot/val --labels hw2_data/clip_zeroshot/id2label.json --output-dir OUT
    python3 -m p3_clip.inference ... --model ViT-B-32 --pretrained laion2b_s34b_b79k
    python3 -m p3_clip.inference ... --model checkpoints/clip_shapes

Pictures are named {class_id}_{image_id}.png. OUT gets results.json (CLIP_benchmark's schema), predictions.csv and
cosines.safetensors, from which p3_clip.evaluate and p3_clip.figures make the report. Image features are kept by content, so
that other labels and templates on the same pictures take seconds.
"""

import contextlib
import dataclasses
import hashlib
import re
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from common import cli
from common.checkpoint import load_tensors, save_tensors
from common.devices import DeviceName
from common.errors import InputError
from common.files import ROOT, atomic_write, make_folder, read_json, write_json
from p3_clip.model import DATA, Clip, load_clip, shown, zero_shot_classifier

SUFFIXES = (".png", ".jpg", ".jpeg")
AHEAD = 2  # batches that are read and preprocessed while one is computed


@dataclasses.dataclass(frozen=True)
class Config:
    """Classifies a folder of pictures by CLIP, without training."""

    images: Path
    """Folder of pictures named {class_id}_{image_id}.png."""
    labels: Path
    """JSON file, class id to class name."""
    output_dir: Path
    """Gets results.json, predictions.csv and cosines.safetensors."""
    model: str | None = None
    """A model of open_clip or a model folder; by default ViT-B-32-quickgelu, or the shipped small model without its weights."""
    pretrained: str | None = None
    """A tag of open_clip, a weight file or a transformers folder; by default openai."""
    template: str = "a photo of a {}"
    """The single prompt; {} stands for the class name."""
    ensemble: Path | None = None
    """Text file with a template in each line; by default the model folder's templates.txt, else OpenAI's seven."""
    names: Path | None = None
    """JSON file, class id or name to other words for it, for example p3_clip/data/names/course_2024.json."""
    batch_size: int = 64
    """Pictures in one network call."""
    workers: int = 2
    """Threads that read and preprocess while the network computes."""
    cache: Path = ROOT / "outputs" / "clip_features"
    """Folder in which image features are kept by content."""
    use_cache: bool = True
    """Whether to keep and use features."""
    device: DeviceName = "auto"
    """Where to compute; auto takes CUDA if present."""


def main(config: Config) -> None:
    """Classifies, prints the table and writes the three files."""
    for name in ("batch_size", "workers"):
        if getattr(config, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(config, name)}")
    single = check_template(config.template, "--template")
    if config.ensemble:
        read_templates(config.ensemble)
    classes = read_labels(config.labels)
    items = find_images(config.images, classes)
    clip, note = load_clip(config.model, config.pretrained, config.device)
    print(note, flush=True)
    path = config.ensemble or default_templates(clip)
    prompts = {"single": [single], "ensemble": read_templates(path)}
    names, changed = class_names(classes, read_json(config.names) if config.names else {})

    started = time.monotonic()
    features = extract_features(
        clip,
        [file for file, _ in items],
        batch_size=config.batch_size,
        workers=config.workers,
        cache=config.cache if config.use_cache else None,
    )
    cosines = {what: features @ zero_shot_classifier(clip, names, list(t)) for what, t in prompts.items()}
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
        "dataset": config.images.resolve().name if config.images.name != "val" else config.images.resolve().parent.name,
        "model": clip.name,
        "pretrained": clip.pretrained,
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
            key: _plain(value)
            for key, value in dataclasses.asdict(config).items()
            if key not in ("output_dir", "cache", "use_cache")
        },
    }
    folder = make_folder(config.output_dir)
    write_json(folder / "results.json", result)
    atomic_write(folder / "predictions.csv", predictions(run).to_csv(index=False).encode())
    run.save(folder)
    print(f"{changed} of {len(ids)} class names changed (underscores to spaces, and overrides)")
    table = {what: {name: f"{value:.2%}" for name, value in part["metrics"].items()} for what, part in parts.items()}
    print(pd.DataFrame(table).to_string())
    print(
        f"{len(items)} images, {len(ids)} classes; single: {single!r}; ensemble: {len(prompts['ensemble'])} of {path}"
    )


def _plain(value: Any) -> Any:
    is_path = isinstance(value, Path) or (isinstance(value, str) and bool(value) and Path(value).exists())
    return shown(Path(value)) if is_path else value


# ----------------------------------------------------------------------------
# Files, classes, templates.


def read_labels(path: Path) -> dict[str, str]:
    """Class id -> class name, from the JSON file. Raises InputError if it is not that or two classes have one name."""
    value = read_json(path)
    if not isinstance(value, dict) or not value or not all(isinstance(name, str) and name for name in value.values()):
        raise InputError(f'{path} must map class ids to names, like {{"0": "bicycle"}}')
    seen: dict[str, str] = {}
    for class_id, name in value.items():
        if (other := seen.setdefault(spaced(name), class_id)) != class_id:
            raise InputError(f"{path}: the classes {other} and {class_id} have the same name, {name!r}")
    return value


def find_images(folder: Path, classes: Mapping[str, str]) -> list[tuple[Path, str]]:
    """The pictures of a folder, sorted by name, with their class ids. Raises InputError that names the file."""
    if not Path(folder).is_dir():
        raise InputError(f"the image folder {folder} does not exist")
    files = [path for path in sorted(Path(folder).iterdir()) if path.suffix.lower() in SUFFIXES]
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


def spaced(name: str) -> str:
    """The name with spaces for underscores."""
    return " ".join(name.replace("_", " ").split())


def class_names(classes: Mapping[str, str], overrides: Any) -> tuple[list[str], int]:
    """The words for the classes, and how many differ from the labels' names. Raises InputError on an unknown override."""
    if not isinstance(overrides, dict) or not all(isinstance(words, str) and words for words in overrides.values()):
        raise InputError("class-name overrides must be a JSON object of class id or name to words")
    known = {key for class_id, name in classes.items() for key in (class_id, name, spaced(name))}
    if unknown := [key for key in overrides if key not in known]:
        raise InputError(f"the class-name override {unknown[0]!r} is neither an id nor a name of the labels")
    names = []
    for class_id, name in classes.items():
        keys = [key for key in (class_id, name, spaced(name)) if key in overrides]
        names.append(overrides[keys[0]] if keys else spaced(name))
    if len(set(names)) < len(names):
        double = next(name for name in names if names.count(name) > 1)
        raise InputError(f"the class-name overrides give two classes the same name, {double!r}")
    return names, sum(new != old for new, old in zip(names, classes.values(), strict=True))


def check_template(template: str, source: str) -> str:
    """The template with {} for the class name; {object} and the like mean the same. Raises InputError if it has none."""
    plain = re.sub(r"\{\w*\}", "{}", template.strip())
    if plain.count("{}") != 1:
        problem = "is empty" if not plain else f"{template!r} must hold {{}} once, in the place of the class name"
        raise InputError(f"{source}: the template {problem}")
    return plain


def read_templates(path: Path) -> list[str]:
    """The templates of a file, one in each line; lines that start with # are notes. Raises InputError that names the line."""
    try:
        lines = Path(path).read_text().splitlines()
    except FileNotFoundError:
        raise InputError(f"the template file {path} does not exist") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not a text file") from None
    templates = [
        check_template(line, f"{path}, line {number}")
        for number, line in enumerate(lines, 1)
        if not line.startswith("#")
    ]
    if not templates:
        raise InputError(f"{path} holds no template")
    return templates


def default_templates(clip: Clip) -> Path:
    """The model folder's templates.txt if there is one, else OpenAI's seven."""
    own = clip.folder / "templates.txt" if clip.folder else None
    return own if own and own.is_file() else DATA / "templates" / "openai_7.txt"


def template_hash(templates: Sequence[str]) -> str:
    """Sixteen hexadecimal digits that name the list of templates."""
    return hashlib.sha256("\n".join(templates).encode()).hexdigest()[:16]


# ----------------------------------------------------------------------------
# Image features, kept by content.


def extract_features(
    clip: Clip,
    files: Sequence[Path],
    *,
    batch_size: int = 64,
    workers: int = 2,
    cache: Path | None = None,
    show_progress: bool = True,
) -> Tensor:
    """Unit vectors float32 [N, D] of picture files; equal files are computed once, and never again with a `cache` folder.

    Threads read and preprocess the next batches while the network computes. Raises InputError that names an unreadable file.
    """
    with (
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=len(files), unit="images", disable=not show_progress, dynamic_ncols=True) as bar,
    ):
        keys = list(pool.map(_content_key, files))
        store = cache / f"{clip.identity()}.safetensors" if cache else None
        known = _read_store(store) if store else {}
        todo = list({key: file for key, file in zip(keys, files, strict=True) if key not in known}.items())
        bar.update(len(files) - len(todo))
        for part, pixels in _batches(clip, todo, batch_size, pool):
            for (key, _), feature in zip(part, clip.encode_images(pixels), strict=True):
                known[key] = feature
            bar.update(len(part))
    if store and todo:
        # A read-only folder costs time, not the result.
        with contextlib.suppress(OSError, InputError):
            make_folder(store.parent)
            save_tensors(store, {"features": torch.stack(list(known.values()))}, {"keys": list(known)})
    return torch.stack([known[key] for key in keys])


def _content_key(file: Path) -> str:
    return hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()


def _read_store(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        return {}
    try:
        tensors, metadata = load_tensors(path)
        return dict(zip(metadata["keys"], tensors["features"], strict=True))
    except (InputError, KeyError, TypeError, ValueError):
        return {}  # damaged: made anew


def _batches(
    clip: Clip, items: Sequence[tuple[str, Path]], size: int, pool: ThreadPoolExecutor
) -> Iterator[tuple[Sequence[tuple[str, Path]], Tensor]]:
    """Batches of preprocessed pictures, a few of them ahead of the one that is out."""
    waiting: deque[tuple[Sequence[tuple[str, Path]], list[Future[Tensor]]]] = deque()
    starts = deque(range(0, len(items), size))
    while starts or waiting:
        while starts and len(waiting) <= AHEAD:
            start = starts.popleft()
            part = items[start : start + size]
            waiting.append((part, [pool.submit(read_pixels, clip, file) for _, file in part]))
        part, futures = waiting.popleft()
        yield part, torch.stack([future.result() for future in futures])


def read_pixels(clip: Clip, file: Path) -> Tensor:
    """One preprocessed picture. Raises InputError if it cannot be read."""
    try:
        with Image.open(BytesIO(Path(file).read_bytes())) as image:
            return clip.preprocess(image)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else error
        raise InputError(f"{file} is not a readable image ({reason})") from None


# ----------------------------------------------------------------------------
# Results.


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run found: `cosines` by kind of prompt, each [N, C]; `labels` are indices into `ids` and `names`."""

    files: list[str]
    labels: Tensor
    ids: list[str]
    names: list[str]
    scale: float
    cosines: dict[str, Tensor]

    def save(self, folder: Path) -> None:
        """Writes cosines.safetensors."""
        metadata = {"files": self.files, "ids": self.ids, "names": self.names, "scale": self.scale}
        save_tensors(Path(folder) / "cosines.safetensors", {"labels": self.labels, **self.cosines}, metadata)

    @classmethod
    def load(cls, folder: Path) -> "Run":
        """Reads cosines.safetensors. Raises InputError if the folder was not written by this program."""
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
    """Parts of one: right at first, among the first five, and the mean over classes of the part that is right."""
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
