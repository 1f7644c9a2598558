"""Faults of Problem 2's programs."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faults import (
    NO_WEIGHTS,
    WRONG_TENSORS,
    Check,
    Fault,
    edited,
    folder,
    gone,
    halved,
    locked,
    picture,
    put,
    saved,
    tensors,
)
from tiny import Malice

TRAIN, DRAW, GRADE = "p2_ddim.train", "p2_ddim.inference", "p2_ddim.evaluate"
FEATURES, MEASURE = "p2_ddim.study.train_features", "p2_ddim.study.evaluate_features"
CALIBRATE, FIGURES, SWEEPS = (f"p2_ddim.study.{x}" for x in ("calibrate", "figures", "sweeps"))
WEIGHTS, CONFIG, NOISE = "p2/model.safetensors", "p2/config.json", "noises/01.pt"

CYCLE: dict[str, Any] = {}
CYCLE["model"] = CYCLE
warnings.filterwarnings("ignore", "The PyTorch API of nested tensors", UserWarning)
FAULTS = [
    # Flags.
    Fault(DRAW, "--steps 0", "--steps"),
    Fault(DRAW, "--steps 1001", "--steps"),
    Fault(DRAW, "--eta 1.5", "--eta"),
    Fault(DRAW, "--eta nan", "--eta"),
    Fault(DRAW, "--table-length 1", "--table-length"),
    Fault(DRAW, "--table-offset 1000", "--table-offset"),
    Fault(DRAW, "--sampler dpmpp_2m --eta 0.5", "--eta|DDIM"),
    Fault(DRAW, "--precision fp16", "--precision fp16"),
    Fault(DRAW, "--chunk-size 5000", "--chunk-size"),
    Fault(CALIBRATE, "--count 0", "--count"),
    Fault(SWEEPS, "--count 0", "--count"),
    Fault(SWEEPS, "--side 17", "2"),
    Fault(SWEEPS, "--side 100000", "--side"),
    Fault(SWEEPS, "--seed -5", "--seed"),
    Fault(TRAIN, "--model.channels 32 -64", "--model.channels"),
    Fault(TRAIN, "--model.attention 9", "attention"),
    Fault(TRAIN, "--model.patch 32", "multiple"),
    Fault(TRAIN, "--model.channels 33 65", "channels"),
    Fault(TRAIN, "--model.channels 60000 65536", "GB"),
    Fault(TRAIN, "--steps 1.5", "--steps"),
    Fault(FEATURES, "--temperature 0", "--temperature"),
    Fault(FEATURES, "--validate-every -1", "--validate-every"),
    # Noises.
    Fault(DRAW, "--noises @none", "none"),
    Fault(DRAW, "--noises @empty", "empty", folder("empty")),
    Fault(DRAW, "--noises @p2", "p2"),
    Fault(DRAW, "", "01.pt|finite", saved(NOISE, torch.full((3, 16, 16), torch.nan))),
    Fault(DRAW, "", "01.pt|int64", saved(NOISE, torch.zeros(3, 16, 16, dtype=torch.long))),
    Fault(DRAW, "", "01.pt|device meta", saved(NOISE, torch.zeros(3, 16, 16, device="meta"))),
    Fault(
        DRAW, "", "01.pt|nested", saved(NOISE, torch.nested.nested_tensor([torch.zeros(3, 16)] * 3))
    ),
    Fault(DRAW, "", "01.pt|contains itself", saved(NOISE, CYCLE)),
    Fault(DRAW, "", "01.pt|[16, 16]", saved(NOISE, torch.zeros(16, 16))),
    Fault(DRAW, "", "01.pt|[16, 16, 3]", saved(NOISE, torch.zeros(16, 16, 3))),
    Fault(DRAW, "", "01.pt|[0, 3, 16, 16]", saved(NOISE, torch.zeros(0, 3, 16, 16))),
    Fault(DRAW, "", "01.pt|sparse", saved(NOISE, torch.zeros(3, 16, 16).to_sparse())),
    Fault(DRAW, "", "01.pt", saved(NOISE, torch.zeros(3, 16, 16, dtype=torch.complex64))),
    Fault(DRAW, "", "01.pt|3x32x32", saved(NOISE, torch.zeros(3, 32, 32))),
    Fault(DRAW, "", "01.pt", saved(NOISE, np.zeros((3, 16, 16)))),
    Fault(DRAW, "", "01.pt|entries", saved(NOISE, dict.fromkeys("ab", torch.zeros(3, 16, 16)))),
    Fault(DRAW, "", "01.pt|run code", saved(NOISE, Malice(Path("trace")))),
    Fault(DRAW, "", "01", saved("noises/01.pth", torch.zeros(3, 16, 16))),
    *(Fault(DRAW, "", f"01.pt|{said}", put(NOISE, x)) for x, said in NO_WEIGHTS.values()),
    Fault(FIGURES, "--noises @none", "none"),
    Fault(FIGURES, "--noises @one", "one|two", saved("one/0.pt", torch.zeros(3, 16, 16))),
    Fault(CALIBRATE, "--references @none", "none"),
    # Checkpoints.
    Fault(DRAW, "--checkpoint @UNet.pt", "UNet.pt"),
    *(
        Fault(DRAW, "--checkpoint @UNet.pt", f"UNet.pt|{said}", put("UNet.pt", content))
        for content, said in NO_WEIGHTS.values()
    ),
    Fault(DRAW, "--checkpoint @UNet.pt", "UNet.pt", saved("UNet.pt", {"a": torch.zeros(2)})),
    Fault(DRAW, "--checkpoint @UNet.pt", "UNet.pt", saved("UNet.pt", torch.zeros(2))),
    Fault(DRAW, "--checkpoint @UNet.pt", "run code", saved("UNet.pt", Malice(Path("trace")))),
    Fault(DRAW, "", "p2", gone(WEIGHTS)),
    Fault(DRAW, "", "model.safetensors", halved(WEIGHTS)),
    *(
        Fault(DRAW, "", f"model.safetensors|{said}", tensors(WEIGHTS, change))
        for change, said in WRONG_TENSORS.values()
    ),
    *(
        Fault(DRAW, "", f"config.json|{key}", edited(CONFIG, **{key: value}))
        for key, value in (
            ("parameterization", "noise"),
            ("patch", 0),
            ("blocks", 10**9),
            ("blocks", -1),
            ("heads", 0),
            ("refine", -4),
            ("channels", [32, 0]),
            ("channels", [32, 1e3]),
            ("channels", None),
            ("embedding", ...),
            ("dropout", 2),
        )
    ),
    Fault(FIGURES, "--checkpoint @none", "none"),
    Fault(SWEEPS, "--checkpoint @none", "none"),
    Fault(CALIBRATE, "--checkpoint @none", "none", picture("noises/00.png")),
    Fault(MEASURE, "--features @none", "none"),
    Fault(TRAIN, "--init-from @none", "none"),
    Fault(FEATURES, "--init-from @faces", "config.json"),
    # Photos.
    Fault(TRAIN, "--data @none", "get_dataset.sh"),
    Fault(TRAIN, "", "00007.png|20x16", picture("faces/photos/00007.png", size=(20, 16))),
    Fault(TRAIN, "", "00003.jpg", halved("faces/photos/00003.jpg")),
    Fault(TRAIN, "", "00003.jpg", put("faces/photos/00003.jpg", "no photo")),
    Fault(FEATURES, "--data @none", "get_dataset.sh"),
    Fault(MEASURE, "--photos @none", "none"),
    Fault(SWEEPS, "--photos @none", "none"),
    # Grading.
    Fault(GRADE, "--images @none", "none"),
    Fault(GRADE, "--references @none", "none"),
    Fault(GRADE, "", "00003.jpg", halved("faces/photos/00003.jpg")),
    Fault(GRADE, "", "00003", picture("faces/photos/00003.png")),
    Fault(GRADE, "--references @few", "0", picture("few/00000.png")),
    Fault(GRADE, "--result @folder", "folder", folder("folder")),
    Fault(GRADE, "--html @file/page.html", "file is a regular file", put("file", "mine")),
    # Outputs.
    Fault(DRAW, "--output-dir @file/out", "file is a regular file", put("file", "mine")),
    Fault(DRAW, "", "00.png is a folder", folder("out/00.png")),
    Fault(DRAW, "", "out/00.png is there already", picture("out/00.png")),
    Fault(DRAW, "", "00.pt|1e+30", saved("noises/00.pt", torch.full((3, 16, 16), 1e30))),
    Fault(
        DRAW,
        "",
        "00.pt|not finite",
        saved("noises/00.pt", torch.full((3, 16, 16), 1e300, dtype=torch.float64)),
    ),
    Fault(DRAW, "--checkpoint /dev/zero", "/dev/zero is not a regular file"),
    Fault(DRAW, "", "No space left", full_disk=True),
    Fault(DRAW, "", "too long", saved(f"noises/{'x' * 240}.pt", torch.zeros(3, 16, 16))),
    Fault(DRAW, "", "another job|out", locked("out")),
    Fault(DRAW, "", "RANK", env="WORLD_SIZE=4"),
    Fault(TRAIN, "", "No space left", full_disk=True),
    Fault(TRAIN, "", "LOCAL_RANK", env="LOCAL_RANK=-1"),
    Fault(FEATURES, "--run-dir @faces/photos/00000.jpg", "00000.jpg is a regular file"),
    Fault(FIGURES, "--output-dir @file", "file is a regular file", put("file", "mine")),
]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_fault(fault: Fault, check: Check) -> None:
    check(fault)
