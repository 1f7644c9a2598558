"""Tunes the small CLIP's text tower on captions alone, until each position of its output says
plainly what the caption says.

    python3 -m p3_controlnet.base.train_text --run-dir runs/ldm_text --clip checkpoints/clip_shapes

A CLIP's contrastive loss trains the end token's output and leaves the other positions, which a
U-Net reads too, as they come. Stable Diffusion's tower has seen hundreds of millions of captions;
this one has not, and a U-Net that has to find out by itself what "light slate gray" looks like,
through the noise, needs hours for it. So linear readouts of the tower's output are asked for the
scene: at the end token and the padding for all of it, at the end of each phrase for that phrase. It
takes minutes, and no picture. The readouts are thrown away; the U-Net's cross-attention takes their
place. RUN_DIR/last is a CLIPTextModel's folder.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

from common import cli
from common.colour import CSS_COLOURS, colour_difference
from common.data.examples import describe, described_scenes
from common.data.shapes import KINDS, Scene
from common.errors import InputError
from common.files import ROOT
from common.latent.text_encoder import load_text_tower, save_text_encoder
from common.seeds import Draws, random_indices
from common.training import Batch, TrainingConfig, fit, settings_of

VALIDATION_SEED, VALIDATION_CAPTIONS = 1, 500
REGIONS = 3  # the background, the first shape, the second
WHAT = (
    "nothing",
    "background",
    *KINDS,
)  # what a region can be; "nothing" where the caption leaves it open
WORD_WEIGHT = 0.0125  # of the cross-entropies beside the squared colour errors
Readout = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclasses.dataclass(frozen=True)
class Config:
    """Tunes the text tower of the small latent-diffusion model."""

    run_dir: Path
    """Folder of the run: checkpoints and metrics."""
    clip: Path = ROOT / "checkpoints" / "clip_shapes"
    """Folder of the CLIP whose text tower is tuned."""
    captions: int = 60_000
    """Captions to learn from."""
    training: Annotated[TrainingConfig, tyro.conf.arg(name="")] = TrainingConfig(
        steps=3000, batch_size=64, lr=1e-3, weight_decay=0.0, validate_every=500
    )


class Reader(nn.Module):
    """Linear readouts of each position of a text tower's output [N, L, D]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scene_colours = nn.Linear(width, REGIONS * 3)
        self.scene_kinds = nn.Linear(width, REGIONS * len(WHAT))
        self.phrase_colour = nn.Linear(width, 3)
        self.phrase_region = nn.Linear(width, REGIONS)

    def forward(self, states: Tensor) -> Readout:
        """Colours [N, L, 3, 3] and kinds (logits) [N, L, 3, 6] of the scene's regions; the colour
        [N, L, 3] of the position's own phrase, and which region it names (logits) [N, L, 3]."""
        return (
            self.scene_colours(states).unflatten(-1, (REGIONS, 3)),
            self.scene_kinds(states).unflatten(-1, (REGIONS, len(WHAT))),
            self.phrase_colour(states),
            self.phrase_region(states),
        )


def main(config: Config) -> None:
    """Tunes, or resumes."""
    if config.captions < 1:
        raise InputError(f"--captions must be at least 1, not {config.captions}")
    torch.manual_seed(config.training.seed)
    tokenizer, tower = load_text_tower(config.clip)
    model = nn.ModuleDict({"tower": tower, "reader": Reader(tower.config.hidden_size)}).train()

    def read(count: int, seed: int) -> Batch:
        pairs = list(described_scenes(count, seed))
        captions = [describe(*pair) for pair in pairs]
        ids = tokenizer(
            captions, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        nouns = tokenizer(["background", *KINDS], add_special_tokens=False).input_ids
        return {
            "ids": ids,
            **targets(ids, [scene for scene, _ in pairs], [noun[-1] for noun in nouns]),
        }

    captions = read(config.captions, config.training.seed)
    held_out = read(VALIDATION_CAPTIONS, VALIDATION_SEED + config.training.seed)

    def get_batch(step: int, generator: torch.Generator) -> Batch:
        index = random_indices(config.captions, config.training.batch_size, generator).cpu()
        return {"index": index, **{name: values[index] for name, values in captions.items()}}

    def readout(batch: Batch) -> Readout:
        return model["reader"](model["tower"](batch["ids"]).last_hidden_state)

    def loss_fn(batch: Batch, draws: Draws) -> Tensor:
        return readout_loss(readout(batch), batch, tokenizer.eos_token_id)

    @torch.no_grad()
    def validate() -> dict[str, float]:
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
    )


def targets(ids: Tensor, scenes: list[Scene], nouns: list[int]) -> Batch:
    """What the captions `ids` [N, L] of these scenes say, `nouns` being the last tokens of
    "background" and of each of KINDS.

    "colours" [N, 3, 3] in [-1, 1] and "kinds" [N, 3] (places in WHAT) of the regions; "phrase" [N,
    L]: the region whose phrase ends here, at its noun or the colour's last token before it, and -1
    elsewhere.
    """
    colours = torch.zeros(len(scenes), REGIONS, 3)
    kinds = torch.zeros(len(scenes), REGIONS, dtype=torch.long)
    phrase = torch.full_like(ids, -1)
    for k, (scene, row) in enumerate(zip(scenes, ids.tolist(), strict=True)):
        shapes = [place for place, token in enumerate(row) if token in nouns[1:]]
        ends = {region: place for region, place in enumerate(shapes, 1)}
        if nouns[0] in row:
            ends[0] = row.index(nouns[0])
        for region, place in ends.items():
            colour = scene.shapes[region - 1].colour if region else scene.background
            colours[k, region] = torch.tensor(CSS_COLOURS[colour]) / 127.5 - 1.0
            kinds[k, region] = (
                WHAT.index(scene.shapes[region - 1].kind) if region else WHAT.index("background")
            )
            phrase[k, place - 1 : place + 1] = region
    return {"colours": colours, "kinds": kinds, "phrase": phrase}


def readout_loss(read_out: Readout, batch: Batch, end: int) -> Tensor:
    """Squared errors of colours in [-1, 1] and cross-entropies of kinds and regions, a scalar;
    `end` is the end token's id."""
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
    """Mean CIEDE2000 of the colours read at the end and the padding, and of those read at each
    phrase."""
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
    """The colour [N, L, 3] of the region that each position's phrase names; any where there is
    none."""
    return batch["colours"].gather(1, batch["phrase"].clamp(min=0)[..., None].expand(-1, -1, 3))


if __name__ == "__main__":
    cli.run(main, Config)
