"""Draws photos of the concepts without a name in the small model's vocabulary: OUT/NAME/NN.png.

    python3 -m scripts.make_concepts --output-dir hw2_data/concepts
    bash hw2_3.sh hw2_data/concepts/input.json OUT checkpoints/ldm_shapes

There are five photos of each concept. OUT/input.json lists prompts in the homework's format, with
the shipped tokens <new1> to <new4>; its baselines are 0, so that every score passes. Photo NN of a
concept depends on the seed, the side, the concept and NN alone.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

from common import cli
from common.config import Pictures, Seed, bounds
from common.data.concepts import DRAWN, PHOTOS, SIDE, draw_photo
from common.files import ROOT, check_same, json_bytes, make_folder, write_json
from common.images import write_png
from p3_clip.personalisation.sentences import ALONE, BESIDE_SQUARE, TOKENS


@dataclasses.dataclass(frozen=True)
class Config:
    """Draws photos of the concepts without a name in the small model's vocabulary."""

    output_dir: Path = ROOT / "hw2_data" / "concepts"
    """Output folder of NAME/NN.png and input.json."""
    count: Pictures = PHOTOS
    """Number of photos of each concept."""
    side: Annotated[int, *bounds(at_least=8, at_most=8192)] = SIDE
    """Height and width of the photos in pixels."""
    seed: Seed = 0
    """Seed of all photos."""


def main(config: Config) -> None:
    """Writes the photos and input.json. Raises InputError if there is another input.json."""
    check_same(config.output_dir / "input.json", json_bytes(tasks()))
    for name in DRAWN:
        folder = make_folder(config.output_dir / name)
        for index in range(config.count):
            photo = draw_photo(name, index, config.seed, config.side)
            write_png(folder / f"{index:02d}.png", photo, staging=config.output_dir)
    write_json(config.output_dir / "input.json", tasks())
    print(f"{config.count} photos each of {', '.join(DRAWN)} in {config.output_dir}")


def tasks() -> dict[str, Any]:
    """The content of input.json: the drawn concepts in the homework's format."""
    found = {}
    for name, drawn in DRAWN.items():
        sentences = (ALONE[name], BESIDE_SQUARE[name])
        found[name] = {
            "src_image": drawn.phrase.format(drawn.word),
            "token_name": TOKENS[name],
            "prompt": [sentence.prompt(TOKENS) for sentence in sentences],
            "prompt_4_clip_eval": [sentence.in_known_words for sentence in sentences],
            "baseline": [[0, 0]] * len(sentences),
        }
    return found


if __name__ == "__main__":
    cli.run(main, Config)
