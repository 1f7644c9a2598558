"""Fine-tunes the small CLIP's text encoder on captions, so that linear layers can read the scene.

    python3 -m p3_controlnet.base.train_text --run-dir runs/ldm_text --clip checkpoints/clip_shapes

Why: a CLIP's contrastive loss trains only the output at the end token, but a U-Net's
cross-attention reads the outputs at all positions. Stable Diffusion's text encoder has seen
hundreds of millions of captions; this one has not, and a U-Net that has to learn from noisy images
which colour "light slate gray" is needs hours for it.

How: linear readouts of the text encoder's output [N, L, D] are trained with it. At the end token
and the padding they predict the colours and kinds of all regions of the scene, at the end of each
phrase the colour and the region of that phrase. This takes minutes and needs no images. The
readouts are then discarded; the U-Net's cross-attention takes their place. RUN_DIR/last is the
folder of a transformers CLIPTextModel.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, ClassVar

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

from common import cli
from common.cli import Preset
from common.colour import CSS_COLOURS, colour_difference
from common.config import Pictures
from common.data.examples import describe, described_scenes
from common.data.shapes import KINDS, Scene
from common.devices import pick_device
from common.files import ROOT
from common.latent.text_encoder import load_text_tower, save_text_encoder
from common.progress import Progress
from common.seeds import Draws, random_indices
from common.training import Batch, TrainingConfig, fit, refuse_compile, settings_of

VALIDATION_SEED, VALIDATION_CAPTIONS = 1, 500
REGIONS = 4  # the background and up to three shapes
WHAT = ("nothing", "background", *KINDS)  # kinds of a region; "nothing": not in the caption
WORD_WEIGHT = 0.0125  # of the cross-entropies, relative to the squared colour errors
Readout = tuple[Tensor, Tensor, Tensor, Tensor]
"""Scene colours, scene kinds, phrase colour and phrase region: the outputs of `Reader`."""


TRAINING = TrainingConfig(steps=3000, batch_size=64, lr=1e-3, weight_decay=0.0, validate_every=500)


@dataclasses.dataclass(frozen=True)
class Config:
    """Fine-tunes the text encoder of the small latent-diffusion model on captions."""

    run_dir: Path
    """Folder of the run: checkpoints and metrics."""
    clip: Path = ROOT / "checkpoints" / "clip_shapes"
    """Folder of the CLIP whose text encoder is fine-tuned."""
    captions: Pictures = 60_000
    """Number of training captions."""
    training: Annotated[TrainingConfig, tyro.conf.arg(name="")] = TRAINING
    PRESETS: ClassVar = {
        "small": Preset(
            "the defaults: five minutes on two CPU cores",
            {},
        ),
        "smoke": Preset(
            "tests the installation: two steps, about half a minute on a CPU;"
            " expect a colour error of about 40",
            {
                "captions": 64,
                "training": dataclasses.replace(
                    TRAINING, steps=2, batch_size=8, warmup=1, log_every=1
                ),
            },
        ),
    }


class Reader(nn.Module):
    """Linear readouts of each position of a text encoder's output [N, L, D]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scene_colours = nn.Linear(width, REGIONS * 3)
        self.scene_kinds = nn.Linear(width, REGIONS * len(WHAT))
        self.phrase_colour = nn.Linear(width, 3)
        self.phrase_region = nn.Linear(width, REGIONS)

    def forward(self, states: Tensor) -> Readout:
        """The four readouts of `states` [N, L, D], at each position.

        In this order: the colours [N, L, 4, 3] of the scene's regions, RGB in [-1, 1]; the logits
        [N, L, 4, 6] of the regions' kinds in WHAT; the colour [N, L, 3] that the phrase at this
        position names; the logits [N, L, 4] of the region that the phrase names.
        """
        return (
            self.scene_colours(states).unflatten(-1, (REGIONS, 3)),
            self.scene_kinds(states).unflatten(-1, (REGIONS, len(WHAT))),
            self.phrase_colour(states),
            self.phrase_region(states),
        )


def main(config: Config) -> None:
    """Trains from the start, or resumes the run in `config.run_dir`."""
    refuse_compile(config.training)
    torch.manual_seed(config.training.seed)
    tokenizer, tower = load_text_tower(config.clip)
    model = nn.ModuleDict({"tower": tower, "reader": Reader(tower.config.hidden_size)}).train()
    model.to(pick_device(config.training.device))

    def read(count: int, seed: int) -> Batch:
        """`count` captions of drawn scenes as token ids "ids" [count, L], with their `targets`."""
        scenes = described_scenes(count, seed)
        pairs = list(Progress(scenes, total=count, desc="describing scenes", unit="captions"))
        captions = [describe(*pair) for pair in pairs]
        ids = tokenizer(
            captions, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        nouns = ["background", *KINDS, *(f"{kind}s" for kind in KINDS)]
        tokens = [noun[-1] for noun in tokenizer(nouns, add_special_tokens=False).input_ids]
        return {"ids": ids, **targets(ids, [scene for scene, _ in pairs], tokens)}

    captions = read(config.captions, config.training.seed)
    held_out = read(VALIDATION_CAPTIONS, VALIDATION_SEED + config.training.seed)

    def get_batch(step: int, generator: torch.Generator) -> Batch:
        own = torch.Generator().manual_seed(generator.initial_seed())  # the data are on the CPU
        index = random_indices(config.captions, config.training.batch_size, own)
        return {"index": index, **{name: values[index] for name, values in captions.items()}}

    def readout(batch: Batch) -> Readout:
        return model["reader"](model["tower"](batch["ids"]).last_hidden_state)

    def loss_fn(batch: Batch, draws: Draws) -> Tensor:
        return readout_loss(readout(batch), batch, tokenizer.eos_token_id)

    @torch.no_grad()
    def validate() -> dict[str, float]:
        """Loss, and the colour errors (CIEDE2000) of the readouts, on held-out captions."""
        batch = {name: values.to(tower.device) for name, values in held_out.items()}
        read_out = readout(batch)
        scene, phrase = colour_errors(read_out, batch, tokenizer.eos_token_id)
        loss = readout_loss(read_out, batch, tokenizer.eos_token_id)
        return {"loss": loss.item(), "scene_colour_error": scene, "phrase_colour_error": phrase}

    fit(
        dict(model.named_parameters()),
        loss_fn,
        get_batch,
        config.training,
        config.run_dir,
        settings=settings_of(config, "clip"),
        save=lambda folder: save_text_encoder(folder, tower),
        validate=validate,
        next_command="bash scripts/train_ldm.sh unet --text-encoder LAST",
    )


def targets(ids: Tensor, scenes: list[Scene], nouns: list[int]) -> Batch:
    """The targets of the readouts, for captions `ids` long [N, L] of these scenes.

    `nouns` are the ids of the last token of "background" and of each of KINDS, singular and plural.

    - "colours" [N, 4, 3]: the RGB colour in [-1, 1] of each region.
    - "kinds" long [N, 4]: the index in WHAT of each region's kind.
    - "phrase" long [N, L]: the region that a phrase names (the first one, if it counts several), at
      the phrase's noun and at the token before it, the last of the colour's name; -1 at all other
      positions.
    """
    colours = torch.zeros(len(scenes), REGIONS, 3)
    kinds = torch.zeros(len(scenes), REGIONS, dtype=torch.long)
    phrase = torch.full_like(ids, -1)
    for k, (scene, row) in enumerate(zip(scenes, ids.tolist(), strict=True)):
        ends = [place for place, token in enumerate(row) if token in nouns[1:]]
        # A phrase that counts shapes is the only one; it names them all.
        regions = [
            (region, ends[min(region, len(ends)) - 1]) for region in range(len(scene.shapes), 0, -1)
        ]
        if nouns[0] in row:
            regions.append((0, row.index(nouns[0])))
        for region, place in regions:
            colour = scene.shapes[region - 1].colour if region else scene.background
            colours[k, region] = torch.tensor(CSS_COLOURS[colour]) / 127.5 - 1.0
            kinds[k, region] = (
                WHAT.index(scene.shapes[region - 1].kind) if region else WHAT.index("background")
            )
            phrase[k, place - 1 : place + 1] = region
    return {"colours": colours, "kinds": kinds, "phrase": phrase}


def readout_loss(read_out: Readout, batch: Batch, end: int) -> Tensor:
    """The training loss, a scalar: colour errors + WORD_WEIGHT * cross-entropies.

    The colour errors are the mean squared errors of colours in [-1, 1], the cross-entropies those
    of kinds and of regions. `end` is the id of the end token, which is that of the padding too.
    """
    scene_colours, scene_kinds, phrase_colour, phrase_region = read_out
    ends, phrases = batch["ids"] == end, batch["phrase"] >= 0
    own, kinds = _own_colours(batch), batch["kinds"][:, None].expand(*ends.shape, -1)
    squares = (scene_colours - batch["colours"][:, None]).square().mean(-1)
    colours = (
        squares[ends[..., None] & (kinds > 0)].mean()
        + (phrase_colour[phrases] - own[phrases]).square().mean()
    )
    words = F.cross_entropy(scene_kinds[ends].flatten(0, 1), kinds[ends].flatten())
    words = words + F.cross_entropy(phrase_region[phrases], batch["phrase"][phrases])
    return colours + WORD_WEIGHT * words


def colour_errors(read_out: Readout, batch: Batch, end: int) -> tuple[float, float]:
    """Mean CIEDE2000 of the colours read at the end token and the padding, and at the phrases."""
    ends, phrases = batch["ids"] == end, batch["phrase"] >= 0
    named = ends[..., None] & (batch["kinds"] > 0)[:, None]
    pairs = (
        (read_out[0][named], batch["colours"][:, None].expand_as(read_out[0])[named]),
        (read_out[2][phrases], _own_colours(batch)[phrases]),
    )
    scene, phrase = (
        float(
            colour_difference(
                *(((x + 1.0) * 127.5).clamp(0.0, 255.0).cpu().numpy() for x in pair)
            ).mean()
        )
        for pair in pairs
    )
    return scene, phrase


def _own_colours(batch: Batch) -> Tensor:
    """The colour [N, L, 3] of the region that each position's phrase names.

    At positions without a phrase it has no meaning.
    """
    return batch["colours"].gather(1, batch["phrase"].clamp(min=0)[..., None].expand(-1, -1, 3))


if __name__ == "__main__":
    cli.run(main, Config)
