"""Faults of Problem 3's ControlNet programs and of the small base model's trainers."""

import json
from typing import Any

import pytest
from faults import (
    NO_WEIGHTS,
    WRONG_TENSORS,
    Check,
    Damage,
    Fault,
    both,
    edited,
    folder,
    gone,
    halved,
    picture,
    put,
    tensors,
)

TRAIN, DRAW, GRADE = "p3_controlnet.train", "p3_controlnet.inference", "p3_controlnet.evaluate"
FIGURES, SWEEPS = "p3_controlnet.study.figures", "p3_controlnet.study.sweeps"
AUTOENCODER, TEXT, UNET = (f"p3_controlnet.base.train_{x}" for x in ("autoencoder", "text", "unet"))
BASE, PROMPTS = "models/base", "pairs/prompt.json"
LINE = {"source": "0.png", "target": "0.png", "prompt": "red circle with blue background"}
PARTS = {
    "unet": (f"{BASE}/unet", "diffusion_pytorch_model.safetensors"),
    "vae": (f"{BASE}/vae", "diffusion_pytorch_model.safetensors"),
    "text": (f"{BASE}/text_encoder", "model.safetensors"),
    "control": ("models/control", "diffusion_pytorch_model.safetensors"),
}


def lines(*values: Any) -> Damage:
    """prompt.json with these lines."""
    text = [value if isinstance(value, str) else json.dumps(value) for value in values]
    return put(PROMPTS, "\n".join(text) + "\n")


def line(**changes: Any) -> Damage:
    """prompt.json with two lines, the second with other entries; ... takes one away."""
    second = {**LINE, "target": "1.png", **changes}
    return lines(LINE, {name: value for name, value in second.items() if value is not ...})


FAULTS = [
    # prompt.json.
    Fault(DRAW, "--prompts @none.json", "none.json"),
    Fault(DRAW, "", "prompt.json", put(PROMPTS, "")),
    Fault(DRAW, "", "prompt.json", folder(PROMPTS)),
    Fault(DRAW, "", "prompt.json", put(PROMPTS, "[]")),
    Fault(DRAW, "", "prompt.json", put(PROMPTS, json.dumps([LINE])[:-1])),
    Fault(DRAW, "", "prompt.json, line 1", put(PROMPTS, json.dumps([LINE])[:-1] + ",]")),
    Fault(DRAW, "", "prompt.json, line 1", put(PROMPTS, json.dumps(LINE, indent=1))),
    Fault(DRAW, "", "prompt.json, line 1", put(PROMPTS, json.dumps(LINE) + ",\n")),
    Fault(DRAW, "", "prompt.json|UTF-16", put(PROMPTS, json.dumps(LINE).encode("utf-16"))),
    Fault(DRAW, "", "prompt.json|line 1|0xff", put(PROMPTS, b'{"source": "\xff"}')),
    Fault(DRAW, "", "prompt.json, line 2", lines(LINE, "{broken")),
    Fault(DRAW, "", "prompt.json, line 2", lines(LINE, "[" * 100_000)),
    Fault(DRAW, "", "prompt.json, line 2", lines(LINE, '{"source": NaN}')),
    Fault(DRAW, "", "prompt.json, line 2", lines(LINE, '{"source": ' + "9" * 5000 + "}")),
    Fault(DRAW, "", "prompt.json, line 2", lines(LINE, '{"source": "a", "source": "b"}')),
    Fault(DRAW, "", "prompt.json, line 1", lines("3")),
    Fault(DRAW, "", "prompt.json, line 1", lines("null")),
    Fault(DRAW, "", "prompt.json, line 2|'prompt'", line(prompt=...)),
    Fault(DRAW, "", "prompt.json, line 2|prompt", line(prompt=["red"])),
    Fault(DRAW, "", "prompt.json, line 2|source", line(source=3)),
    Fault(DRAW, "", "prompt.json, line 2", line(prompt="red \ud800 circle")),
    Fault(DRAW, "", "prompt.json, line 2", line(target="a\0.png")),
    Fault(DRAW, "", "line 2|'0.png'", line(target="0.png")),
    Fault(DRAW, "", "line 2|'../1.png'", line(target="../1.png")),
    Fault(DRAW, "", "line 2|'/tmp/1.png'", line(target="/tmp/1.png")),
    Fault(DRAW, "", "line 2|'../source/0.png'", line(source="../source/0.png")),
    Fault(DRAW, "", "'.'", line(target=".")),
    Fault(DRAW, "", "line 2", line(target="")),
    Fault(DRAW, "", "a.jpg", line(target="a.jpg")),
    Fault(DRAW, "", "too long", line(target="x" * 250 + ".png")),
    Fault(DRAW, "", "0.png", line(target="0.png/b.png")),
    # Control pictures.
    Fault(DRAW, "", "line 2|9.png", line(source="9.png")),
    Fault(DRAW, "", "0.png|20x16", picture("pairs/source/0.png", size=(20, 16))),
    Fault(DRAW, "", "0.png", put("pairs/source/0.png", "no picture")),
    Fault(DRAW, "", "0.png", put("pairs/source/0.png", "")),
    Fault(DRAW, "", "0.png", halved("pairs/source/0.png")),
    Fault(DRAW, "", "0.png", put("pairs/source/0.png", b"%!PS-Adobe-3.0 EPSF-3.0\n")),
    Fault(DRAW, "", "0.png", both(gone("pairs/source/0.png"), folder("pairs/source/0.png"))),
    Fault(DRAW, "", "0.png", picture("pairs/source/0.png", "1", (20000, 20000))),
    Fault(DRAW, "--sources @none", "none"),
    # Flags.
    Fault(DRAW, "--size 0", "--size"),
    Fault(DRAW, "--size 100000", "--size"),
    Fault(DRAW, "--patch-stride 99", "--patch-stride"),
    Fault(DRAW, "--control-scales 1 2", "--control-scales"),
    Fault(DRAW, "--control-scales nan", "--control-scales"),
    Fault(DRAW, "--control-start 0.8 --control-end 0.2", "--control-start"),
    Fault(DRAW, "--control-end 7", "--control-end"),
    Fault(DRAW, "--guidance-scale 1e38", "--guidance-scale"),
    Fault(DRAW, "--seed 4294967296", "--seed"),
    Fault(SWEEPS, "--count 0", "--count"),
    Fault(SWEEPS, "--steps 0", "--steps"),
    Fault(FIGURES, "--rows 0", "--rows"),
    Fault(GRADE, "--iou-bar 7", "--iou-bar"),
    Fault(GRADE, "--colour-bar nan", "--colour-bar"),
    Fault(GRADE, "--resolution 0", "--resolution"),
    Fault(TRAIN, "--pictures -1", "--pictures"),
    Fault(TRAIN, "--pictures 99999999999", "--pictures"),
    Fault(TRAIN, "--size 100000", "--size"),
    Fault(TRAIN, "--size 63", "--size"),
    Fault(TRAIN, "--hint-channels 0 8 8", "--hint-channels"),
    Fault(TRAIN, "--hint-channels 4 8", "hint"),
    Fault(TRAIN, "--validation-pictures 0", "--validation-pictures"),
    Fault(AUTOENCODER, "--kl-weight -1", "--kl-weight"),
    Fault(AUTOENCODER, "--pictures 0", "--pictures"),
    Fault(AUTOENCODER, "--model.channels 0 8 16", "--model.channels"),
    Fault(AUTOENCODER, "--model.latent-channels 0", "--model.latent-channels"),
    Fault(AUTOENCODER, "--model.encoder-layers 1 1", "--model"),
    Fault(TEXT, "--captions 0", "--captions"),
    Fault(UNET, "--model.groups 0", "--model.groups"),
    Fault(UNET, "--model.groups 5", "--model|groups"),
    Fault(UNET, "--model.heads 0", "--model.heads"),
    Fault(UNET, "--model.channels 60000 65536", "GB"),
    Fault(UNET, "--parameterization eps", "--no-zero-terminal"),
    Fault(UNET, "--parameterization bogus", "--parameterization"),
    # Models.
    Fault(DRAW, "--checkpoint @none.ckpt", "none.ckpt"),
    Fault(DRAW, "--checkpoint @pairs", "pairs"),
    Fault(DRAW, "--base @none", "none"),
    *(
        Fault(DRAW, "--checkpoint @sd-v1-4.ckpt", f"sd-v1-4.ckpt|{said}", put("sd-v1-4.ckpt", x))
        for x, said in NO_WEIGHTS.values()
    ),
    *(
        Fault(DRAW, "", f"{part}|{said}", put(f"{part}/{file}", content))
        for part, file in PARTS.values()
        for content, said in NO_WEIGHTS.values()
    ),
    *(
        Fault(DRAW, "", f"{part}|{said}", tensors(f"{part}/{file}", change))
        for part, file in PARTS.values()
        for change, said in WRONG_TENSORS.values()
    ),
    *(Fault(DRAW, "", part, gone(f"{part}/{file}")) for part, file in PARTS.values()),
    *(Fault(DRAW, "", part, gone(f"{part}/config.json")) for part, _ in PARTS.values()),
    *(
        Fault(DRAW, "", f"{part}/config.json|{key}", edited(f"{part}/config.json", **{key: value}))
        for part, key, value in (
            (f"{BASE}/unet", "attention_head_dim", 0),
            (f"{BASE}/unet", "block_out_channels", [16, -32]),
            (f"{BASE}/unet", "block_out_channels", [16, 10**9]),
            (f"{BASE}/unet", "norm_num_groups", 0),
            (f"{BASE}/unet", "cross_attention_dim", "16"),
            (f"{BASE}/unet", "layers_per_block", 10**6),
            (f"{BASE}/unet", "in_channels", 0),
            (f"{BASE}/unet", "dropout", "much"),
            (f"{BASE}/vae", "latent_channels", 0),
            (f"{BASE}/vae", "latent_channels", 4.5),
            (f"{BASE}/vae", "encoder_block_out_channels", [8, None]),
            (f"{BASE}/text_encoder", "hidden_size", 0),
            (f"{BASE}/text_encoder", "num_attention_heads", 0),
            (f"{BASE}/text_encoder", "num_hidden_layers", -1),
            (f"{BASE}/text_encoder", "num_hidden_layers", 10**7),
            (f"{BASE}/text_encoder", "vocab_size", 10**12),
            ("models/control", "block_out_channels", [0, 0]),
            ("models/control", "layers_per_block", None),
        )
    ),
    *(
        Fault(DRAW, "", part, edited(f"{part}/config.json", **{key: value}))
        for part, key, value in (
            (f"{BASE}/unet", "norm_num_groups", 5),
            (f"{BASE}/unet", "down_block_types", ["Bogus", "Bogus"]),
            (f"{BASE}/text_encoder", "return_dict", False),
            (f"{BASE}/text_encoder", "output_hidden_states", "yes"),
            (f"{BASE}/text_encoder", "num_attention_heads", 5),
            (f"{BASE}/text_encoder", "hidden_act", "bogus"),
            (f"{BASE}/text_encoder", "max_position_embeddings", 3),
            (f"{BASE}/text_encoder", "eos_token_id", -5),
            (f"{BASE}/text_encoder", "quantization_config", {"a": 1}),
            ("models/control", "conditioning_embedding_out_channels", "4"),
            ("models/control", "conditioning_channels", 7),
        )
    ),
    *(
        Fault(DRAW, "", f"config.json|{key}", edited(f"{BASE}/config.json", **{key: value}))
        for key, value in (
            ("latent_std", [0.0] * 4),
            ("latent_std", [-1.0] * 4),
            ("latent_std", [1.0]),
            ("latent_std", None),
            ("latent_mean", ["0"] * 4),
            ("latent_mean", ...),
        )
    ),
    *(
        Fault(
            DRAW,
            "",
            f"scheduler_config.json|{key}",
            edited(f"{BASE}/scheduler/scheduler_config.json", **{key: value}),
        )
        for key, value in (
            ("num_train_timesteps", 5),
            ("num_train_timesteps", "1000"),
            ("beta_end", 0.5),
            ("beta_schedule", "cosine"),
            ("prediction_type", "bogus"),
            ("rescale_betas_zero_snr", 1),
            ("prediction_type", ...),
            ("_class_name", 5),
            ("trained_betas", [0.1]),
        )
    ),
    Fault(DRAW, "", "config.json", edited(f"{BASE}/config.json", latent_mean=[1e400] * 4)),
    Fault(DRAW, "", "not finite", edited(f"{BASE}/config.json", latent_mean=[1e39] * 4)),
    Fault(DRAW, "", "scheduler_config.json", gone(f"{BASE}/scheduler")),
    Fault(TRAIN, "--base @none", "none"),
    Fault(TRAIN, "--base @models/control", "control"),
    Fault(TRAIN, "--init-from @none", "none"),
    Fault(TRAIN, "--init-from @models/base", "base"),
    Fault(TEXT, "--clip @none", "none"),
    Fault(TEXT, "--clip @clip/val", "val"),
    Fault(UNET, "--autoencoder @models/base/unet", "unet"),
    Fault(UNET, "--text-encoder @models/base/vae", "vae"),
    Fault(UNET, "--autoencoder @none", "none"),
    Fault(AUTOENCODER, "--init-from @none", "none"),
    Fault(AUTOENCODER, "--model.latent-channels 7", "--model"),
    Fault(AUTOENCODER, "--model.channels 8 8 12", "--model"),
    Fault(AUTOENCODER, "--model.channels 7 7 7", "--model"),
    Fault(AUTOENCODER, "--model.encoder-layers -1 1 1", "--model.encoder-layers"),
    Fault(AUTOENCODER, "--model.decoder-layers 1 1 100000", "--model.decoder-layers"),
    Fault(TRAIN, "--gradient-accumulation-steps 7", "--batch-size"),
    Fault(UNET, "--gradient-accumulation-steps 7", "--batch-size"),
    Fault(DRAW, "--output-dir @pairs/source", "0.png is there already"),
    Fault(SWEEPS, "--checkpoint @none", "none"),
    Fault(FIGURES, "--checkpoint @none", "none"),
    # Pairs.
    Fault(TRAIN, "--fill50k @none", "none"),
    Fault(TRAIN, "--fill50k @fill50k", "prompt.json", put("fill50k/training/prompt.json", "{")),
    Fault(AUTOENCODER, "--fill50k @none", "none"),
    Fault(UNET, "--fill50k @none", "none"),
    # Grading.
    Fault(GRADE, "--images @none", "none"),
    Fault(GRADE, "--result @pairs/prompt.json", "prompt.json is read by this program"),
    Fault(GRADE, "--html @pairs/target/1.png", "1.png"),
    Fault(GRADE, "--targets @none", "none"),
    Fault(GRADE, "", "prompt.json", halved(PROMPTS)),
    Fault(GRADE, "", "1.png", gone("pairs/target/1.png")),
    Fault(GRADE, "", "1.png", halved("pairs/target/1.png")),
    Fault(GRADE, "", "1.png", picture("pairs/source/1.png", size=(20, 16))),
    Fault(GRADE, "--clip @none.pt", "none.pt"),
    Fault(GRADE, "--sam2 @pairs", "pairs"),
    Fault(GRADE, "--result @folder", "folder", folder("folder")),
    Fault(GRADE, "--result @file/r.json", "file is a regular file", put("file", "mine")),
    Fault(GRADE, "--html @folder", "folder", folder("folder")),
    # Outputs and environment.
    Fault(DRAW, "--output-dir @file/out", "file is a regular file", put("file", "mine")),
    Fault(DRAW, "", "1.png is a folder", folder("out/1.png")),
    Fault(DRAW, "", "No space left", full_disk=True),
    Fault(DRAW, "", "RANK", env="WORLD_SIZE=2"),
    Fault(DRAW, "", "RANK|two", env="RANK=two WORLD_SIZE=4"),
    Fault(TRAIN, "--run-dir @file/out", "file is a regular file", put("file", "mine")),
    Fault(FIGURES, "--output-dir @file", "file is a regular file", put("file", "mine")),
    Fault(AUTOENCODER, "--run-dir @file", "file is a regular file", put("file", "mine")),
]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_fault(fault: Fault, check: Check) -> None:
    check(fault)
