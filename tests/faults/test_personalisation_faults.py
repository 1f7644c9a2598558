"""Faults of the programs that learn, draw, merge and export concepts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from faults import NO_WEIGHTS, TASK, Check, Damage, Fault, folder, gone, halved, put, saved
from tiny import Malice

TRAIN, DRAW = "p3_clip.personalisation.train", "p3_clip.personalisation.inference"
EXPORT, MERGE = "p3_clip.personalisation.export", "p3_clip.personalisation.merge"
FIGURES, SWEEPS = (f"p3_clip.personalisation.study.{name}" for name in ("figures", "sweeps"))
INPUT, WORDS = "words/input.json", "words/learned/model.safetensors"
NEW = "--concepts @new.bin"
MATRIX = {"down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": torch.ones(16, 16)}


def task(**changes: Any) -> Damage:
    """input.json with other entries; ... takes one away."""
    entries = {name: value for name, value in {**TASK, **changes}.items() if value is not ...}
    return put(INPUT, {"0": entries})


def word(content: Any) -> Damage:
    """new.bin, a file of learned words."""
    return saved("new.bin", content)


FAULTS = [
    # input.json.
    Fault(DRAW, "--prompts @none.json", "none.json"),
    Fault(DRAW, "", "input.json", put(INPUT, "")),
    Fault(DRAW, "", "input.json", put(INPUT, "[]")),
    Fault(DRAW, "", "input.json", put(INPUT, "{}")),
    Fault(DRAW, "", "input.json", halved(INPUT)),
    Fault(DRAW, "", "input.json", put(INPUT, '{"0": ' * 50_000)),
    Fault(DRAW, "", "'0'", put(INPUT, {"0": []})),
    Fault(DRAW, "", "'../0'", put(INPUT, {"../0": TASK})),
    Fault(DRAW, "", "too long", put(INPUT, {"x" * 300: TASK})),
    Fault(DRAW, "", "input.json", put(INPUT, {"": TASK})),
    Fault(DRAW, "", "<new1>", put(INPUT, {"0": TASK, "1": TASK})),
    *(
        Fault(DRAW, "", f"'0'|{name}", task(**{name: ...}))
        for name in TASK
        if name != "src_image"  # which only a grade needs
    ),
    *(Fault(DRAW, "", "'0'", task(**{name: 3})) for name in TASK),
    Fault(DRAW, "", "'0'", task(prompt=[])),
    Fault(DRAW, "", "'0'|prompt", task(prompt=[3])),
    Fault(DRAW, "", "'0'|baselines", task(baseline=[[1]])),
    Fault(DRAW, "", "input.json", task(baseline=[[10**400, 1]])),
    Fault(DRAW, "", "<new1>", task(prompt=["A dog."])),
    Fault(DRAW, "", "<new3>", task(prompt=["<new1> and <new3>"])),
    Fault(DRAW, "", "input.json", task(prompt=["<new1> \ud800"])),
    Fault(DRAW, "", "<new2>", task(token_name="<new2>", prompt=["a <new2>"])),
    # Learned words.
    Fault(DRAW, "--concepts @none.bin", "none.bin"),
    Fault(DRAW, "--concepts @models/base", "base"),
    *(Fault(DRAW, NEW, f"new.bin|{said}", put("new.bin", x)) for x, said in NO_WEIGHTS.values()),
    Fault(DRAW, NEW, "new.bin|run code", word(Malice(Path("trace")))),
    Fault(DRAW, NEW, "<new1>", word({"<new1>": torch.ones(768)})),
    Fault(DRAW, NEW, "<new1>|finite", word({"<new1>": torch.full((16,), torch.nan)})),
    Fault(DRAW, NEW, "<new1>", word({"<new1>": torch.ones(16, dtype=torch.long)})),
    Fault(DRAW, NEW, "new.bin", word({"<new1>": torch.ones(0, 16)})),
    Fault(DRAW, NEW, "new.bin", word({"<new1>": torch.ones(2, 2, 16)})),
    Fault(DRAW, NEW, "new.bin", word({"<new1>": [1.0]})),
    Fault(DRAW, NEW, "new.bin", word({})),
    Fault(DRAW, NEW, "new.bin", word({3: torch.ones(16)})),
    Fault(DRAW, NEW, "<|endoftext|>", word({"<|endoftext|>": torch.ones(16)})),
    Fault(
        DRAW,
        NEW,
        "new.bin|Stable Diffusion XL",
        word({"clip_l": torch.ones(1, 768), "clip_g": torch.ones(1, 1280)}),
    ),
    Fault(
        DRAW,
        NEW,
        "new.bin|Stable Diffusion 3",
        word({"clip_l": torch.ones(1), "clip_g": torch.ones(1), "t5xxl": torch.ones(1)}),
    ),
    Fault(DRAW, NEW, "new.bin|a LoRA", word({"lora_unet_down.lora_up.weight": torch.ones(4, 4)})),
    Fault(DRAW, NEW, "new.bin|device meta", word({"<new1>": torch.ones(16, device="meta")})),
    *(
        Fault(DRAW, NEW, f"new.bin|{said}", word(content))
        for content, said in (
            ({"state_dict": {**MATRIX, "embed": torch.ones(1, 16)}, "modifier_token": 5}, "names"),
            ({"state_dict": MATRIX, "unet": torch.ones(2)}, "no named matrices"),
            ({"unet": {**MATRIX, 5: torch.ones(2)}}, "no text"),
            ({"state_dict": {**MATRIX, "embed": torch.tensor(1.0)}}, "vectors []"),
        )
    ),
    Fault(DRAW, "--concepts @words/learned @words/learned", "<new1>"),
    Fault(DRAW, "--concepts @words/learned=dog", "dog"),
    Fault(DRAW, "", "learned", gone(WORDS)),
    Fault(DRAW, "", "model.safetensors", halved(WORDS)),
    # Flags.
    Fault(DRAW, "--count 0", "--count"),
    Fault(DRAW, "--count 99999999999", "--count"),
    Fault(DRAW, "--size 9000", "--size"),
    Fault(DRAW, "--steps 0", "--steps"),
    Fault(DRAW, "--guidance-scale inf", "--guidance-scale"),
    Fault(DRAW, "--precision bf17", "--precision"),
    Fault(TRAIN, "--vectors 0", "--vectors"),
    Fault(TRAIN, "--vectors 500", "--vectors"),
    Fault(TRAIN, "--views 0", "--views"),
    Fault(TRAIN, "--cut-mix -1", "--cut-mix"),
    Fault(TRAIN, "--held-out-pictures -1", "--held-out-pictures"),
    Fault(TRAIN, "--words red blue", "--words"),
    Fault(TRAIN, "--tokens dog", "'dog'"),
    Fault(TRAIN, "--tokens '<a>' '<b>'", "--tokens"),
    Fault(TRAIN, "--phrases 'no place'", "--phrases"),
    Fault(TRAIN, "--start ''", "empty"),
    Fault(TRAIN, "--lr -1", "--lr"),
    Fault(TRAIN, "--seed -1", "seed"),
    Fault(TRAIN, "--steps 0", "--steps"),
    Fault(SWEEPS, "--images 0", "--images"),
    Fault(SWEEPS, "--steps 0", "--steps"),
    Fault(SWEEPS, "--chunk-size 0", "--chunk-size"),
    Fault(SWEEPS, "--inversion @none", "none"),
    Fault(SWEEPS, "--inversion @words/learned --clip @none", "none", parts="words"),
    Fault(MERGE, "--results @words/learned", "--results"),
    Fault(MERGE, "", "words only"),
    Fault(MERGE, "--captions 0", "--captions"),
    Fault(MERGE, "--results @none @none", "none"),
    Fault(EXPORT, "--form bogus", "--form"),
    Fault(EXPORT, "--form authors", "authors|words alone"),
    Fault(EXPORT, "--concepts @none", "none"),
    Fault(EXPORT, "--output @file/x.bin", "file is a regular file", put("file", "mine")),
    Fault(EXPORT, "--output @folder", "folder", folder("folder")),
    # Photos.
    Fault(TRAIN, "--photos @none", "none"),
    Fault(TRAIN, "--photos @empty", "empty", folder("empty")),
    Fault(TRAIN, "", "1.jpg", halved("photos/1.jpg")),
    Fault(TRAIN, "", "1.jpg", put("photos/1.jpg", "no photo")),
    # Models.
    Fault(DRAW, "--checkpoint @none", "none"),
    Fault(DRAW, "--checkpoint @words", "words"),
    Fault(TRAIN, "--base @none", "none"),
    Fault(TRAIN, "--clip @none", "none"),
    Fault(TRAIN, "--init-from @none", "none"),
    Fault(MERGE, "--base @none", "none"),
    Fault(EXPORT, "--base @none", "none"),
    Fault(SWEEPS, "--inversion @words/learned --base @none", "none", parts="words"),
    # Outputs and environment.
    Fault(DRAW, "--output-dir @file/out", "file is a regular file", put("file", "mine")),
    Fault(DRAW, "", "another.png", put("out/0/0/another.png", "x")),
    Fault(DRAW, "", "source0_prompt0_0.png", folder("out/0/0/source0_prompt0_0.png")),
    Fault(DRAW, "", "No space left", full_disk=True),
    Fault(DRAW, "", "WORLD_SIZE", env="WORLD_SIZE=many"),
    Fault(TRAIN, "--run-dir @photos/0.jpg", "0.jpg is a regular file"),
    Fault(MERGE, "--output-dir @photos", "photos is a regular file", put("photos", "mine")),
    Fault(FIGURES, "", "pictures"),
    Fault(FIGURES, "--output-dir @file", "file is a regular file", put("file", "mine")),
]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_fault(fault: Fault, check: Check) -> None:
    check(fault)
