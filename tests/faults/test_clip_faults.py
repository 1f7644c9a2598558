"""Faults of Problem 3's CLIP programs."""

import pytest
from clip_tiny import TINY
from faults import (
    NO_WEIGHTS,
    WRONG_TENSORS,
    Check,
    Damage,
    Fault,
    edited,
    first,
    folder,
    gone,
    halved,
    put,
    tensors,
)

TRAIN, CLASSIFY, REPORT = "p3_clip.train", "p3_clip.inference", "p3_clip.evaluate"
COLOURS, FIGURES = "p3_clip.study.colours", "p3_clip.study.figures"
WEIGHTS, CONFIG, LABELS = "clip/model/model.safetensors", "clip/model", "clip/id2label.json"
PRETRAINED = "--model ViT-B-32 --pretrained @ViT-B-32.pt"
COSINES = "clip_run/cosines.safetensors"


def tiny(**changes: object) -> Damage:
    """The trainer's model file, with other values."""
    return put("tiny.json", {**TINY, **changes})


FAULTS = [
    # Pictures and labels.
    Fault(CLASSIFY, "--images @none", "none"),
    Fault(CLASSIFY, "--images @empty", "empty", folder("empty")),
    Fault(CLASSIFY, "", "bicycle.png", put("clip/val/bicycle.png", "x")),
    Fault(CLASSIFY, "", "7_0.png", put("clip/val/7_0.png", "x")),
    Fault(CLASSIFY, "", "1_0.png", halved("clip/val/1_0.png")),
    Fault(CLASSIFY, "", "1_0.png", put("clip/val/1_0.png", "")),
    Fault(CLASSIFY, "", "1_9.jpg", put("clip/val/1_9.jpg", "<svg/>")),
    Fault(CLASSIFY, "", "out/results.json", put("out/results.json", "mine")),
    Fault(CLASSIFY, "", "out/predictions.csv", put("out/predictions.csv", "mine")),
    Fault(CLASSIFY, "--labels @none.json", "none.json"),
    Fault(CLASSIFY, "", "id2label.json", put(LABELS, "")),
    Fault(CLASSIFY, "", "id2label.json", put(LABELS, "[]")),
    Fault(CLASSIFY, "", "id2label.json", put(LABELS, "{}")),
    Fault(CLASSIFY, "", "id2label.json", halved(LABELS)),
    Fault(CLASSIFY, "", "id2label.json", put(LABELS, {"0": 1, "1": "b", "2": "c"})),
    Fault(CLASSIFY, "", "id2label.json", put(LABELS, {"0": "", "1": "b", "2": "c"})),
    Fault(CLASSIFY, "", "id2label.json|twice", put(LABELS, '{"0": "a", "0": "b"}')),
    Fault(CLASSIFY, "", "same name", put(LABELS, {"0": "a b", "1": "a_b", "2": "c"})),
    Fault(CLASSIFY, "", "id2label.json|UTF-8", put(LABELS, '{"0": "café"}'.encode("latin-1"))),
    Fault(CLASSIFY, "--names @none.json", "none.json"),
    Fault(CLASSIFY, "--names @names.json", "lorry", put("names.json", {"lorry": "x"})),
    Fault(CLASSIFY, "--names @names.json", "names.json", put("names.json", "[" * 10**5)),
    Fault(CLASSIFY, "--ensemble @none.txt", "none.txt"),
    Fault(CLASSIFY, "--ensemble @t.txt", "t.txt, line 2", put("t.txt", "a {}\nno place\n")),
    Fault(CLASSIFY, "--ensemble @t.txt", "t.txt", put("t.txt", "")),
    Fault(CLASSIFY, "--ensemble @t.txt", "t.txt|NUL", put("t.txt", b"a {}\0\n")),
    # Flags.
    Fault(CLASSIFY, "--template ''", "--template"),
    Fault(CLASSIFY, "--template '{} and {}'", "--template"),
    Fault(CLASSIFY, "--batch-size 0", "--batch-size"),
    Fault(CLASSIFY, "--workers -1", "--workers"),
    Fault(CLASSIFY, "--workers 100000", "--workers"),
    Fault(CLASSIFY, "--model ViT-B32", "ViT-B32"),
    Fault(CLASSIFY, "--pretrained openai", "--pretrained"),
    Fault(CLASSIFY, "--device cuda", "--device cuda"),
    Fault(TRAIN, "--real-fraction 7", "--real-fraction", tiny()),
    Fault(TRAIN, "--pair-fraction nan", "--pair-fraction", tiny()),
    Fault(TRAIN, "--batch-size 100000", "batch", tiny()),
    Fault(TRAIN, "--gradient-accumulation-steps 2", "--gradient-accumulation-steps", tiny()),
    Fault(TRAIN, "--lr nan", "--lr", tiny()),
    Fault(TRAIN, "", "process", tiny(), env="RANK=0 WORLD_SIZE=2"),
    Fault(TRAIN, "--fill50k @none", "none", tiny()),
    Fault(TRAIN, "--init-from @none", "none", tiny()),
    # Models.
    Fault(CLASSIFY, "--model @none", "none"),
    Fault(CLASSIFY, "--model @clip/val", "val"),
    Fault(CLASSIFY, "", "model", gone(WEIGHTS)),
    *(
        Fault(CLASSIFY, "", f"model.safetensors|{said}", put(WEIGHTS, content))
        for content, said in NO_WEIGHTS.values()
    ),
    *(
        Fault(CLASSIFY, PRETRAINED, f"ViT-B-32.pt|{said}", put("ViT-B-32.pt", content))
        for content, said in NO_WEIGHTS.values()
    ),
    Fault(CLASSIFY, "--model @ViT-B-32.pt", "--pretrained", put("ViT-B-32.pt", "x")),
    *(
        Fault(CLASSIFY, "", f"model.safetensors|{said}", tensors(WEIGHTS, change))
        for change, said in WRONG_TENSORS.values()
    ),
    Fault(CLASSIFY, "", "open_clip_config.json", put(f"{CONFIG}/open_clip_config.json", "{}")),
    Fault(CLASSIFY, "", "open_clip_config.json", halved(f"{CONFIG}/open_clip_config.json")),
    *(
        Fault(
            CLASSIFY,
            "",
            "open_clip_config.json",
            edited(f"{CONFIG}/open_clip_config.json", model_cfg=TINY | changes),
        )
        for changes in (
            {"embed_dim": 0},
            {"embed_dim": "24"},
            {"embed_dim": 10**9},
            {"vision_cfg": {**TINY["vision_cfg"], "patch_size": 0}},
            {"vision_cfg": {**TINY["vision_cfg"], "layers": -1}},
            {"vision_cfg": {**TINY["vision_cfg"], "image_size": 10**6}},
            {"vision_cfg": {**TINY["vision_cfg"], "head_width": 0}},
            {"vision_cfg": None},
            {"text_cfg": {**TINY["text_cfg"], "heads": 0}},
            {"text_cfg": {**TINY["text_cfg"], "heads": 3}},
            {"text_cfg": {**TINY["text_cfg"], "context_length": 0}},
            {"text_cfg": {**TINY["text_cfg"], "vocab_size": -1}},
            {"text_cfg": []},
        )
    ),
    Fault(
        CLASSIFY,
        "",
        "clip/model",
        edited(
            f"{CONFIG}/open_clip_config.json",
            model_cfg=TINY | {"vision_cfg": {**TINY["vision_cfg"], "patch_size": 99}},
        ),
    ),
    Fault(CLASSIFY, "", "fingerprint.json", put(f"{CONFIG}/fingerprint.json", "{}")),
    Fault(CLASSIFY, "", "fingerprint.json", put(f"{CONFIG}/fingerprint.json", "[1e999]")),
    Fault(TRAIN, "--model @none.json", "none.json"),
    Fault(TRAIN, "", "tiny.json", put("tiny.json", "{}")),
    Fault(TRAIN, "", "tiny.json", put("tiny.json", "")),
    Fault(TRAIN, "", "tiny.json|embed_dim", tiny(embed_dim=0)),
    Fault(TRAIN, "", "tiny.json|heads", tiny(text_cfg={**TINY["text_cfg"], "heads": 0})),
    Fault(TRAIN, "", "tiny.json|embed_dim", tiny(embed_dim=10**9)),
    Fault(TRAIN, "", "GB", tiny(text_cfg={**TINY["text_cfg"], "width": 65536, "layers": 200})),
    # Runs.
    Fault(REPORT, "--run @none", "none"),
    Fault(REPORT, "", "cosines.safetensors", gone(COSINES)),
    Fault(REPORT, "", "cosines.safetensors", halved(COSINES)),
    Fault(REPORT, "", "cosines.safetensors", tensors(COSINES, first(wider=True))),
    Fault(REPORT, "", "cosines.safetensors", tensors(COSINES, first(without=True))),
    Fault(REPORT, "", "cosines.safetensors", tensors(COSINES, lambda state: None, {"files": []})),
    Fault(REPORT, "--result @folder", "folder", folder("folder")),
    Fault(REPORT, "--result @file/r.json", "file is a regular file", put("file", "mine")),
    Fault(COLOURS, "--run @none", "none", put("r.json", {})),
    Fault(COLOURS, "", "r.json does not exist"),
    Fault(FIGURES, "--run @none", "none"),
    Fault(FIGURES, "--images @none", "none"),
    Fault(FIGURES, "--seed -1", "--seed"),
    # Outputs.
    Fault(CLASSIFY, "--output-dir @file", "file is a regular file", put("file", "mine")),
    Fault(CLASSIFY, "--no-use-cache", "No space left", full_disk=True),
    Fault(CLASSIFY, "", "RANK", env="RANK=a"),
    Fault(TRAIN, "--run-dir @tiny.json", "tiny.json is a regular file", tiny()),
    Fault(TRAIN, "", "No space left", tiny(), full_disk=True),
    Fault(FIGURES, "--output-dir @file", "file is a regular file", put("file", "mine")),
]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_fault(fault: Fault, check: Check) -> None:
    check(fault)
