"""Faults of Problem 1's programs and, by its trainer, of every run folder."""

import pytest
from faults import (
    NO_WEIGHTS,
    WRONG_TENSORS,
    Check,
    Damage,
    Fault,
    edited,
    folder,
    gone,
    halved,
    picture,
    put,
    tensors,
)

TRAIN, DRAW, GRADE = "p1_diffusion.train", "p1_diffusion.inference", "p1_diffusion.evaluate"
CLASSIFIER = "p1_diffusion.study.train_classifier"
FIGURES, SWEEPS = "p1_diffusion.study.figures", "p1_diffusion.study.sweeps"
WEIGHTS, CONFIG = "p1/model.safetensors", "p1/config.json"

FLAGS = [
    Fault(DRAW, "--steps 0", "--steps"),
    Fault(DRAW, "--steps 1001", "--steps"),
    Fault(DRAW, "--steps many", "--steps"),
    Fault(DRAW, "--seed -1", "--seed"),
    Fault(DRAW, "--chunk-size 100000", "--chunk-size"),
    Fault(DRAW, "--guidance-scale 1e38", "--guidance-scale"),
    Fault(DRAW, "--guidance-scale nan", "--guidance-scale"),
    Fault(DRAW, "--guide-w 2 --guidance-scale 2", "--guide-w|--guidance-scale"),
    Fault(DRAW, "--guidance-interval 700 150", "--guidance-interval"),
    Fault(DRAW, "--guidance-interval 5000 9000", "--guidance-interval"),
    Fault(DRAW, "--guidance-interval -9 -1", "--guidance-interval"),
    Fault(DRAW, "--eta 0.5", "--eta|DDIM"),
    Fault(DRAW, "--eta -1", "--eta"),
    Fault(DRAW, "--classes svhn/10", "svhn/10"),
    Fault(DRAW, "--edition 2023", "--edition"),
    Fault(DRAW, "--colour red", "--colour"),
    Fault(DRAW, "--device cuda", "--device cuda"),
    Fault(TRAIN, "--steps 0", "--steps"),
    Fault(TRAIN, "--batch-size 0", "--batch-size"),
    Fault(TRAIN, "--gradient-accumulation-steps 3", "--batch-size"),
    Fault(TRAIN, "--lr -0.001", "--lr"),
    Fault(TRAIN, "--lr nan", "--lr"),
    Fault(TRAIN, "--lr 1e30", "--lr"),
    Fault(TRAIN, "--weight-decay 1e308", "--weight-decay"),
    Fault(TRAIN, f"--warmup {10**30}", "--warmup"),
    Fault(TRAIN, f"--device-batch-size {10**30}", "--device-batch-size"),
    Fault(TRAIN, "--guidance-scale 1e308", "--guidance-scale"),
    Fault(TRAIN, "--beta2 5", "--beta2"),
    Fault(TRAIN, "--max-grad-norm -1", "--max-grad-norm"),
    Fault(TRAIN, "--max-grad-norm 0", "--max-grad-norm"),
    Fault(TRAIN, "--ema-decay 2", "--ema-decay"),
    Fault(TRAIN, "--warmup -3", "--warmup"),
    Fault(TRAIN, "--weight-decay inf", "--weight-decay"),
    Fault(TRAIN, "--seed -1", "seed"),
    Fault(TRAIN, "--cond-drop-prob 7", "--cond-drop-prob"),
    Fault(TRAIN, "--augment 1.5", "--augment"),
    Fault(TRAIN, "--guidance-interval 700 150", "--guidance-interval"),
    Fault(TRAIN, "--optimizer adamw8bit", "adamw8bit"),
    Fault(TRAIN, "--preset large", "--preset"),
    Fault(TRAIN, "--memory 40", "memory"),
    Fault(TRAIN, "--model.channels 0 32", "--model.channels"),
    Fault(TRAIN, "--model.channels 8192 8192 --model.blocks 64 64", "GB"),
    Fault(TRAIN, "--model.channels 16 999999999", "--model.channels"),
    Fault(TRAIN, "--model.heads 0", "--model.heads"),
    Fault(TRAIN, "--model.heads 5", "heads"),
    Fault(TRAIN, "--model.blocks 1", "blocks"),
    Fault(TRAIN, "--model.dropout 1", "--model.dropout"),
    Fault(CLASSIFIER, "--lr inf", "--lr"),
    Fault(CLASSIFIER, "--log-every 0", "--log-every"),
    Fault(SWEEPS, "--device mps", "--device mps"),
]
ENVIRONMENT = [
    Fault(DRAW, "", "RANK|first", env="RANK=first WORLD_SIZE=2"),
    Fault(DRAW, "", "RANK|WORLD_SIZE", env="WORLD_SIZE=4"),
    Fault(DRAW, "", "RANK|WORLD_SIZE", env="RANK=3 WORLD_SIZE=2"),
    Fault(DRAW, "", "WORLD_SIZE", env="WORLD_SIZE=-2"),
    Fault(DRAW, "", "LOCAL_RANK", env="RANK=0 WORLD_SIZE=2 LOCAL_RANK=one"),
    Fault(TRAIN, "", "RANK", env="RANK=3 WORLD_SIZE=2"),
]
OUTPUTS = [
    Fault(DRAW, "--output-dir @file/out", "file is a regular file", put("file", "mine")),
    Fault(DRAW, "", "out is a regular file", put("out", "mine")),
    Fault(DRAW, "--output-dir /proc/out", "/proc/out"),
    Fault(DRAW, f"--output-dir @{'x' * 300}", "too long"),
    Fault(DRAW, "", "No space left", full_disk=True),
    Fault(DRAW, "", "1_001.png", folder("out/svhn/1_001.png")),
    Fault(TRAIN, "", "No space left", full_disk=True),
    Fault(TRAIN, "--run-dir @file/out", "file is a regular file", put("file", "mine")),
    Fault(FIGURES, "--output-dir @file/out", "file is a regular file", put("file", "mine")),
    Fault(CLASSIFIER, "--run-dir @file", "file is a regular file", put("file", "mine")),
]
CHECKPOINTS = [
    Fault(DRAW, "--checkpoint @none", "none"),
    Fault(DRAW, "--checkpoint @digits.pth", "digits.pth", put("digits.pth", "x")),
    Fault(DRAW, "--checkpoint @grader", "kind", put("grader/config.json", {"kind": "x"})),
    Fault(DRAW, "", "config.json", gone(CONFIG)),
    Fault(DRAW, "", "config.json", halved(CONFIG)),
    Fault(DRAW, "", "p1|kind", put(CONFIG, "[1]")),
    Fault(DRAW, "", "config.json", put(CONFIG, "[" * 100_000)),
    Fault(DRAW, "", "config.json", put(CONFIG, b"\xff\xfe{\x00}\x00")),
    Fault(DRAW, "", "model.safetensors", gone(WEIGHTS)),
    Fault(DRAW, "", "model.safetensors", halved(WEIGHTS)),
    *(
        Fault(DRAW, "", f"model.safetensors|{said}", put(WEIGHTS, content))
        for content, said in NO_WEIGHTS.values()
    ),
    *(
        Fault(DRAW, "", f"model.safetensors|{said}", tensors(WEIGHTS, change))
        for change, said in WRONG_TENSORS.values()
    ),
    *(
        Fault(DRAW, "", f"config.json|{key}", edited(CONFIG, **{key: value}))
        for key, value in (
            ("parameterization", "bogus"),
            ("schedule", "bogus"),
            ("channels", [16, 0]),
            ("channels", [16, -32]),
            ("channels", "16"),
            ("channels", []),
            ("channels", [10**9, 32]),
            ("heads", 0),
            ("heads", 3),
            ("heads", "2"),
            ("heads", True),
            ("embedding", 0),
            ("embedding", 10**12),
            ("dropout", 1.5),
            ("dropout", None),
            ("datasets", 9),
            ("blocks", [1, 1, 1]),
            ("blocks", [1, 10**6]),
            ("attention", [7]),
            ("unknown", 1),
            ("heads", ...),
        )
    ),
    Fault(
        DRAW, "", "config.json", put(CONFIG, '{"kind": "p1_diffusion.ContextUNet", "dropout": NaN}')
    ),
    Fault(GRADE, "", "images"),
    Fault(GRADE, "--grader @p1 --images @p1", "p1"),
    Fault(TRAIN, "--init-from @none", "none"),
    Fault(TRAIN, "--init-from @digits", "config.json"),
    Fault(SWEEPS, "--grader @none", "none"),
    Fault(SWEEPS, "--checkpoint @p1/config.json", "config.json"),
    Fault(FIGURES, "", "images"),
]
CSV = "digits/svhn/train.csv"


def rows(text: str) -> Damage:
    """svhn/train.csv."""
    return put(CSV, "image_name,label\n" + text)


DATA = [
    Fault(TRAIN, "--data @none", "get_dataset.sh"),
    Fault(TRAIN, "", "svhn", gone("digits/svhn/data")),
    Fault(TRAIN, "", "train.csv", gone(CSV)),
    Fault(TRAIN, "", "train.csv", put(CSV, "")),
    Fault(TRAIN, "", "train.csv", put(CSV, "name,number\n00000.png,1\n")),
    Fault(TRAIN, "", "train.csv", put(CSV, b"\x00\xff\x00")),
    Fault(TRAIN, "", "train.csv|12", rows("00000.png,12\n")),
    Fault(TRAIN, "", "train.csv|seven", rows("00000.png,seven\n")),
    Fault(TRAIN, "", "train.csv", rows("00000.png,1.5\n")),
    Fault(TRAIN, "", "train.csv", rows("00000.png,\n")),
    Fault(TRAIN, "", "99999.png", rows("99999.png,1\n")),
    Fault(TRAIN, "", "../x.png", rows("../x.png,1\n")),
    Fault(TRAIN, "", "00000.png", rows("00000.png,1\n00000.png,2\n")),
    Fault(TRAIN, "", "00003.png", put("digits/svhn/data/00003.png", "no picture")),
    Fault(TRAIN, "", "00003.png", halved("digits/svhn/data/00003.png")),
    Fault(TRAIN, "", "00003.png", put("digits/svhn/data/00003.png", "")),
    Fault(TRAIN, "", "00003.png|16x16", picture("digits/svhn/data/00003.png")),
    Fault(CLASSIFIER, "--data @none", "get_dataset.sh"),
    Fault(CLASSIFIER, "", "00003.png", put("digits/mnistm/data/00003.png", "no picture")),
]


@pytest.mark.parametrize("fault", [*FLAGS, *ENVIRONMENT, *OUTPUTS, *CHECKPOINTS, *DATA], ids=str)
def test_fault(fault: Fault, check: Check) -> None:
    check(fault)
