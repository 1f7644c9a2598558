"""Writes learned words and matrices in the form that another program reads.

    python3 -m p3_clip.personalisation.export --concepts runs/textual_inversion/best \
        --form a1111 --output dog.pt
    python3 -m p3_clip.personalisation.export --concepts runs/custom_diffusion/best \
        --form diffusers --output FOLDER
"""

import dataclasses
from pathlib import Path
from typing import Literal, get_args

from common import cli
from common.errors import InputError
from common.files import ROOT, make_folder
from common.latent.load import load_base
from p3_clip.personalisation.custom_diffusion import Form as DeltaForm
from p3_clip.personalisation.custom_diffusion import save_delta
from p3_clip.personalisation.formats import Form, save_concepts
from p3_clip.personalisation.model import load_learned


@dataclasses.dataclass(frozen=True)
class Config:
    """Writes learned words and matrices in the form of another program."""

    concepts: tuple[str, ...]
    """Folders or files of learned concepts; FILE=<word> calls the only word of a file <word>."""
    form: Literal[Form, DeltaForm]
    """Words: own, diffusers, a1111, a1111_safetensors or compvis. Words with the matrices of Custom
    Diffusion: own, diffusers (a folder), authors (their delta.bin) or authors_compvis (their
    delta.ckpt, in which the words have no names)."""
    output: Path
    """File to write; a folder for the form diffusers with matrices."""
    base: Path = ROOT / "checkpoints" / "ldm_shapes"
    """The base model: a Stable Diffusion v1.4 file or folder, or a small model's folder."""


def main(config: Config) -> None:
    """Writes the file or folder. Raises InputError if the form cannot hold what was learned."""
    model = load_base(config.base)
    learned = load_learned(config.concepts, model)
    forms = get_args(DeltaForm if learned.weights else Form)
    if config.form not in forms:
        what = "matrices" if learned.weights else "words alone"
        raise InputError(
            f"the form {config.form} cannot hold {what}: choose one of {', '.join(forms)}"
        )
    if config.output.is_file():
        raise InputError(f"{config.output} is there already: move it away, or choose another name")
    make_folder(config.output.parent)
    if learned.weights:
        save_delta(config.output, learned, config.form, model.unet)
    else:
        save_concepts(config.output, learned.concepts, config.form)
    print(f"{', '.join(concept.token for concept in learned.concepts)} in {config.output}")


if __name__ == "__main__":
    cli.run(main, Config)
