"""Trains a small CLIP of coloured shapes with the contrastive loss.

The pairs of image and caption are drawn on the fly; real ones of fill50k can be mixed in.

    python3 -m p3_clip.train --run-dir runs/clip_shapes --fill50k hw2_data/fill50k
    python3 -m p3_clip.train --run-dir runs/other --model ViT-S-32

Running the same command again resumes. RUN_DIR/last has the form of the shipped model: float16, for
`open_clip.create_model("local-dir:RUN_DIR/last")`. The 50 classes of
common.data.shapes.held_out_classes never occur in training. The default run takes about one and a
half hours on one free CPU core.

The sizes in p3_clip/data/clip_shapes.json are chosen for a CPU: 48x48 images in patches of 8, and
32 token positions instead of 77, since the longest caption has 24 tokens with start and end token.
transformers' CLIPTextModel takes any number of positions; a diffusion model conditioned on this
text tower gets its tokens from `clip_tokenizer(32)` of `common.latent.text_encoder`. Positions
after the longest caption of a batch are not computed (`common.clip.model.encode_tokens`).

The contrastive loss compares every image of a batch with every caption of the batch, so a batch
cannot be split: the gradient accumulation steps must be 1, and the run is one process (one GPU).
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

from common import cli
from common.checkpoint import load_strict, tensors_hash
from common.cli import Preset
from common.clip.config import check_model_cfg
from common.clip.loading import load_folder, save_folder
from common.clip.model import Clip, encode_tokens
from common.clip.weights import check_model_name
from common.colour import NAMES
from common.config import Probability
from common.contrastive import contrastive_loss
from common.data.fill50k import Pair, load_fill50k
from common.data.shapes import KINDS, draw_scene, held_out_classes, held_out_scene, render
from common.devices import pick_device
from common.errors import InputError
from common.files import read_json
from common.grid import labelled_grid
from common.images import resize, to_model_range, write_png
from common.progress import Progress
from common.seeds import Draws, batch_seed, derive_seed
from common.text_files import read_text
from common.training import (
    Batch,
    TrainingConfig,
    fit,
    new_network,
    refuse_compile,
    refuse_slices,
    settings_of,
)
from p3_clip.model import DATA, read_templates, zero_shot_classifier

CAPTIONS = (
    "{caption}",
    "{caption}",
    "a {caption}",
    "a photo of a {objects} on a {background} background.",
    "{objects}",
    "a {objects}",
    "a photo of {objects}",
    "a photo of a {objects}",
    "a photo of a {objects}.",
    "a picture of a {objects}",
)
"""Caption templates, chosen with equal probability; some omit the background, as class names do."""
TEMPLATES = DATA / "templates" / "shapes.txt"
MAX_SCALE = 100.0  # upper bound of the logit scale (inverse temperature), as in CLIP
VALIDATION_STEP = 2**31  # seeds the validation batches; no run reaches this step
VALIDATION_BATCHES = 4
WATCHED_PER_CLASS = 10  # images of each held-out class whose accuracy is logged
DRAWN = 64  # least side in pixels at which images are drawn, before resizing to the network's input


TRAINING = TrainingConfig(
    steps=2500,
    batch_size=256,
    lr=1e-3,
    warmup=200,
    weight_decay=0.05,
    beta2=0.98,
    ema_decay=0.998,
    log_every=25,
    validate_every=250,
    preview_every=1000,
    checkpoint_every=250,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains a small CLIP of coloured shapes."""

    run_dir: Path
    """Folder of the run: checkpoints, metrics, previews."""
    model: str = str(DATA / "clip_shapes.json")
    """JSON file with open_clip's model_cfg, or the name of an open_clip model."""
    fill50k: Path | None = None
    """Folder of fill50k in the homework's layout, to mix real pairs in; None: drawn images only."""
    init_from: Path | None = None
    """Model folder whose weights initialise the network; None: random weights."""
    real_fraction: Probability = 0.125
    """Fraction of each batch that comes from fill50k, in [0, 1]; unused without --fill50k."""
    pair_fraction: Probability = 0.4
    """Fraction of the drawn scenes that show two shapes, in [0, 1]."""
    training: Annotated[TrainingConfig, tyro.conf.arg(name="")] = TRAINING
    PRESETS: ClassVar = {
        "small": Preset(
            "the defaults: one and a half hours on one CPU core; expect a top-1 accuracy of"
            " 92 % on 50 classes that training never shows",
            {},
        ),
        "smoke": Preset(
            "tests the installation: two steps, about half a minute on a CPU;"
            " expect 2 % of 50 held-out classes, which is chance",
            {
                "training": dataclasses.replace(
                    TRAINING, steps=2, batch_size=16, warmup=1, log_every=1
                ),
            },
        ),
    }


def main(config: Config) -> None:
    """Trains, or resumes the run in `config.run_dir`."""
    refuse_slices(config.training, "a contrastive loss")
    if (
        config.fill50k
        and round(config.real_fraction * config.training.batch_size) == config.training.batch_size
    ):
        raise InputError("--real-fraction leaves no drawn image in a batch: make it smaller")
    import open_clip

    refuse_compile(config.training)
    torch.manual_seed(config.training.seed)
    model_cfg = read_model_cfg(config.model)
    network = build(model_cfg)
    if config.init_from:
        start = load_folder(config.init_from, torch.device("cpu")).network
        load_strict(network, start.state_dict(), config.init_from)
    tokenize = open_clip.SimpleTokenizer(context_length=network.context_length)
    network.to(pick_device(config.training.device))
    shorten_vocabulary(network, tokenize(vocabulary()).unique())
    size = network.visual.image_size[0]
    real = read_real(config.fill50k, size) if config.fill50k else None
    data_hash = {"data_hash": real.hash()} if real else {}
    captions = Captioner(config, size, real)
    watched = watched_pictures(size)

    def loss_of(batch: Batch) -> tuple[Tensor, Tensor]:
        """The contrastive loss, and for each image [N] whether its own caption scores highest."""
        images = F.normalize(network.encode_image(to_model_range(batch["image"])), dim=-1)
        texts = F.normalize(encode_tokens(network, batch["ids"]), dim=-1)
        logits = network.logit_scale.exp().clamp(max=MAX_SCALE) * images @ texts.T  # [N, N]
        return (
            contrastive_loss(logits),
            (logits.argmax(1) == torch.arange(len(logits), device=logits.device)).float(),
        )

    def loss_fn(batch: Batch, draws: Draws) -> Tensor:
        return loss_of(batch)[0]

    def batch_of(step: int) -> Batch:
        images, texts = captions.batch(step)
        return {"index": torch.arange(len(images)), "image": images, "ids": tokenize(texts)}

    @torch.no_grad()
    def validate() -> dict[str, float]:
        """Loss and accuracy on fixed batches of the training classes; the loss selects the best.

        "held_out", the top-1 accuracy on images of the held-out classes, is only logged.
        """
        network.eval()
        device = network.logit_scale.device
        results = []
        for i in range(VALIDATION_BATCHES):
            batch = {
                name: value.to(device) for name, value in batch_of(VALIDATION_STEP + i).items()
            }
            results.append(loss_of(batch))
        watched_accuracy = zero_shot_accuracy(as_clip(), *watched)
        network.train()
        return {
            "loss": sum(loss.item() for loss, _ in results) / len(results),
            "matched": torch.cat([right for _, right in results]).mean().item(),
            "held_out": watched_accuracy,
            "scale": min(network.logit_scale.exp().item(), MAX_SCALE),
        }

    def as_clip() -> Clip:
        return Clip(network, tokenize, lambda image: image, config.model, str(config.run_dir))

    def preview(path: Path) -> None:
        images, texts = captions.batch(VALIDATION_STEP)
        write_png(path, labelled_grid(images[:16], 1, row_labels=texts[:16]))

    fit(
        dict(network.named_parameters()),
        loss_fn,
        lambda step, generator: batch_of(step),
        config.training,
        config.run_dir,
        settings=settings_of(config, fill50k=bool(real), model=model_cfg, **data_hash),
        save=lambda folder: save_folder(
            folder, whole_state(network), model_cfg, read_text(TEMPLATES)
        ),
        validate=validate,
        preview=preview,
        next_command="bash scripts/inference_clip.sh IMAGES LABELS OUT --model LAST",
    )


# ----------------------------------------------------------------------------
# The network. Captions use some hundred of CLIP's 49,408 tokens: only their rows of the token
# embedding are trained and kept in the optimiser.


def read_model_cfg(model: str) -> dict[str, Any]:
    """Returns open_clip's model_cfg, from a JSON file or by the name of a model.

    Raises InputError if the name is unknown, or the file is missing or not a model_cfg.
    """
    if model.endswith(".json"):
        value = read_json(Path(model))
        if (
            not isinstance(value, dict)
            or not {"embed_dim", "vision_cfg", "text_cfg"} <= value.keys()
        ):
            raise InputError(f"{model} must hold embed_dim, vision_cfg and text_cfg")
        check_model_cfg(value, Path(model))
        return value
    check_model_name(model)
    import open_clip

    return open_clip.get_model_config(model)


def build(model_cfg: dict[str, Any]) -> nn.Module:
    """Builds open_clip's network with random weights.

    Raises InputError if it is not a plain CLIP with a ViT, square images and a causal text tower.
    """
    import open_clip

    network = new_network(lambda: open_clip.CLIP(**json.loads(json.dumps(model_cfg))))
    if (
        not isinstance(network.visual, open_clip.transformer.VisionTransformer)
        or network.text_pool_type != "argmax"
    ):
        raise InputError("--model must be a CLIP with a ViT and a causal text tower")
    if len(set(network.visual.image_size)) > 1:
        raise InputError(
            f"--model must take square images, but its image_size is {network.visual.image_size}"
        )
    return network


class TrainedRows(nn.Module):
    """A token embedding of which only the rows `ids` are parameters.

    The whole table [V, W] is kept on the CPU, so that `whole` can restore it.
    """

    def __init__(self, table: nn.Embedding, ids: Tensor) -> None:
        super().__init__()
        self.embedding_dim = table.embedding_dim
        self.rows = nn.Parameter(table.weight.detach()[ids.to(table.weight.device)].clone())
        self.ids = ids
        self.table = table.weight.detach().cpu()
        index = torch.full((table.num_embeddings,), -1)
        index[ids] = torch.arange(len(ids))
        self.register_buffer("index", index.to(table.weight.device), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings [N, L, W] of token ids [N, L], all of which must be among the trained ones."""
        return self.rows[self.index[ids]]

    def whole(self) -> Tensor:
        """Returns the whole table [V, W], on the CPU, with the trained rows in their places."""
        return self.table.index_copy(0, self.ids, self.rows.detach().cpu())


def shorten_vocabulary(network: nn.Module, ids: Tensor) -> None:
    """Replaces the network's token embedding by one that trains only the rows `ids`."""
    network.token_embedding = TrainedRows(network.token_embedding, ids)


def whole_state(network: nn.Module) -> dict[str, Tensor]:
    """Returns the state dict in open_clip's form, with the logit scale clipped at MAX_SCALE."""
    state = {
        name: value
        for name, value in network.state_dict().items()
        if not name.startswith("token_embedding.")
    }
    state["logit_scale"] = state["logit_scale"].clamp(max=math.log(MAX_SCALE))
    return state | {"token_embedding.weight": network.token_embedding.whole()}


def vocabulary() -> list[str]:
    """Returns texts that together contain every word of every caption and template."""
    templates = [template.replace("{}", "") for template in read_templates(TEMPLATES)]
    words = [caption.format(caption="", objects="", background="") for caption in CAPTIONS]
    return [*NAMES, *KINDS, "with next to background", *templates, *words]


# ----------------------------------------------------------------------------
# Images and captions.


@dataclasses.dataclass(frozen=True)
class RealPairs:
    """Images of fill50k, with the colours that their captions are made of."""

    images: Tensor
    """uint8 [N, 3, S, S]."""
    colours: list[tuple[str, str]]
    """For each image, the names of the circle's and the background's colour."""

    def hash(self) -> str:
        """Identifies the training data."""
        names = json.dumps(self.colours).encode()
        return tensors_hash(self.images, torch.frombuffer(bytearray(names), dtype=torch.uint8))


def read_real(root: Path, size: int) -> RealPairs:
    """Reads the training part of fill50k, resized to `size` x `size` pixels."""
    pairs: list[Pair] = load_fill50k(root)
    colours = [pair.colours for pair in pairs]
    images = [
        resize(pair.read_target()[None], size)[0]
        for pair in Progress(pairs, desc="reading fill50k", unit="pairs")
    ]
    return RealPairs(torch.stack(images), colours)


class Captioner:
    """Makes the batch of images and captions of each step.

    The first shapes of a batch all have different (colour, kind) classes, and drawn images come in
    groups that differ only in the kind of the first shape. Without such hard negatives, colour and
    background distinguish nearly all images of a batch, and shapes are hardly learned. A caption is
    rarely true of another image of the batch too, since the second shape may be of any training
    class. Raises InputError if a batch is larger than the number of classes.
    """

    def __init__(self, config: Config, size: int, real: RealPairs | None) -> None:
        self.config, self.size, self.real = config, size, real
        self.forbidden = frozenset(held_out_classes())
        self.classes = {(colour, kind) for colour in NAMES for kind in KINDS} - self.forbidden
        if config.training.batch_size > len(self.classes):
            raise InputError(
                f"--batch-size must be at most {len(self.classes)}, the number of classes, so that"
                " no class occurs twice in a batch"
            )

    def batch(self, step: int) -> tuple[Tensor, list[str]]:
        """Returns images uint8 [N, 3, S, S] and their captions, from the run's seed and `step`."""
        random = np.random.default_rng(batch_seed(self.config.training.seed, step))
        count = self.config.training.batch_size
        real: list[Tensor] = []
        drawn: list[Tensor] = []
        texts: list[str] = []
        taken: set[tuple[str, str]] = set()
        if self.real:
            for i in random.permutation(len(self.real.images))[
                : round(self.config.real_fraction * count)
            ]:
                circle, background = self.real.colours[i]
                if (circle, "circle") not in taken:
                    taken.add((circle, "circle"))
                    real.append(self.real.images[i])
                    texts.append(caption(background, f"{circle} circle", random))
        for i in random.permutation(len(NAMES)):
            kinds = [
                kind
                for kind in KINDS
                if (NAMES[i], kind) in self.classes and (NAMES[i], kind) not in taken
            ]
            kinds = [kinds[k] for k in random.permutation(len(kinds))][: count - len(texts)]
            if not kinds:
                continue
            shapes = 2 if random.random() < self.config.pair_fraction else 1
            scene = draw_scene(
                random, count=shapes, forbidden=self.forbidden, first=(NAMES[i], kinds[0])
            )
            for kind in kinds:
                first = dataclasses.replace(scene.shapes[0], kind=kind)
                sibling = dataclasses.replace(scene, shapes=(first, *scene.shapes[1:]))
                drawn.append(render(sibling, max(self.size, DRAWN)))
                texts.append(caption(sibling.background, sibling.objects, random))
        images = resize(torch.stack(drawn), self.size)
        return torch.cat([torch.stack(real), images]) if real else images, texts


def caption(background: str, objects: str, random: np.random.Generator) -> str:
    """Returns a caption by a random template of CAPTIONS, with or without the background."""
    template = CAPTIONS[random.integers(len(CAPTIONS))]
    whole = f"{objects} with {background} background"
    return template.format(caption=whole, objects=objects, background=background)


# ----------------------------------------------------------------------------
# Accuracy on the held-out classes, logged during training.


def watched_pictures(size: int) -> tuple[Tensor, Tensor]:
    """Draws WATCHED_PER_CLASS images of each held-out class, other ones than in the test set.

    Returns the images, uint8 [N, 3, S, S], and their class indices, long [N].
    """
    places = [(c, n) for c in range(len(held_out_classes())) for n in range(WATCHED_PER_CLASS)]
    scenes = [
        held_out_scene(c, np.random.default_rng(derive_seed(VALIDATION_STEP, c, n)))
        for c, n in places
    ]
    images = torch.stack([render(scene, max(size, DRAWN)) for scene in scenes])
    return resize(images, size), torch.tensor([c for c, _ in places])


def zero_shot_accuracy(clip: Clip, images: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy among the held-out classes, in [0, 1], with the ensemble of TEMPLATES."""
    names = [f"{colour} {kind}" for colour, kind in held_out_classes()]
    matrix = zero_shot_classifier(clip, names, read_templates(TEMPLATES))
    features = torch.cat([clip.encode_images(to_model_range(part)) for part in images.split(100)])
    return ((features @ matrix).argmax(1) == labels).float().mean().item()


if __name__ == "__main__":
    cli.run(main, Config)
