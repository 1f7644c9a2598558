"""Run folders that were touched: by Problem 1's trainer, whose files are those of every trainer."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from faults import Check, Damage, Fault, edited, first, folder, gone, halved, locked, put, tensors

from common.checkpoint import load_tensors, save_tensors

TRAIN = "p1_diffusion.train"
STATE, METRICS, CONFIG = (
    f"run/out/{x}" for x in ("state.safetensors", "metrics.jsonl", "config.json")
)
AGAIN = "--run-dir @run/out --steps 4 --log-every 1"


def touched(flags: str, says: str, damage: Damage | None = None) -> Fault:
    """The run of two steps is to be resumed."""
    return Fault(TRAIN, f"{AGAIN} {flags}", says, damage, parts="run")


def metrics(*steps: object) -> Damage:
    """metrics.jsonl with lines of these steps."""
    return put(METRICS, "".join(json.dumps({"step": step}) + "\n" for step in steps))


def progress(**changes: float) -> Damage:
    """The state with other numbers in its metadata."""

    def change(world: Path) -> None:
        state, values = load_tensors(world / STATE)
        save_tensors(world / STATE, state, {**values, **changes})

    return change


def in_the_way(name: str) -> Damage:
    """A file in place of a folder of the run."""

    def change(world: Path) -> None:
        shutil.rmtree(world / "run/out" / name, ignore_errors=True)
        (world / "run/out" / name).write_text("")

    return change


def moved(world: Path) -> None:
    """The state of a run with another seed."""
    tensors(STATE, lambda state: None, {"step": 2, "settings": {"seed": 9}})(world)


def relabelled(world: Path) -> None:
    """The same pictures with other labels."""
    table = world / "digits" / "svhn" / "train.csv"
    lines = table.read_text().splitlines()
    swapped = [*lines[:1], *(f"{line[:-1]}{9 - int(line[-1])}" for line in lines[1:])]
    table.write_text("\n".join(swapped) + "\n")


FAULTS = [
    touched("--seed 1", "config.json|seed"),
    touched("--lr 0.5", "config.json|lr"),
    touched("--steps 1", "past --steps 1"),
    touched("", "another job|run/out", locked("run/out")),
    touched("--augment 0", "config.json|augment"),
    touched("", "config.json|data_hash", relabelled),
    touched("--data @none", "get_dataset.sh"),
    touched("", "config.json", gone(CONFIG)),
    touched("", "config.json", put(CONFIG, "")),
    touched("", "config.json", put(CONFIG, "[]")),
    touched("", "config.json", halved(CONFIG)),
    touched("", "config.json|seed", edited(CONFIG, seed="0")),
    touched("", "config.json|lr", edited(CONFIG, lr=None)),
    touched("", "state.safetensors", gone(STATE)),
    touched("", "state.safetensors", folder(STATE)),
    touched("", "state.safetensors", put(STATE, "")),
    touched("", "state.safetensors", halved(STATE)),
    touched("", "state.safetensors|finite", tensors(STATE, first(value=torch.nan))),
    touched("", "state.safetensors", tensors(STATE, first(wider=True))),
    touched("", "state.safetensors", tensors(STATE, first(torch.int8))),
    touched("", "state.safetensors|a.stranger", tensors(STATE, first(more=True))),
    touched("", "state.safetensors", tensors(STATE, first(without=True))),
    touched("", "state.safetensors", tensors(STATE, lambda state: None, [1, 2])),
    touched("", "state.safetensors", tensors(STATE, lambda state: None, {"step": "two"})),
    touched("", "state.safetensors", moved),
    touched("", "state.safetensors|float16", tensors(STATE, first(torch.float16))),
    touched("", "state.safetensors|loss_count", progress(loss_count=10**30)),
    touched("", "state.safetensors|ema_updates", progress(ema_updates=3)),
    touched("", "state.safetensors|loss_scale", progress(loss_scale=-1.0)),
    touched("", "run/out/last|regular file", in_the_way("last")),
    touched("", "run/out/samples|regular file", in_the_way("samples")),
    touched("", "metrics.jsonl", gone(METRICS)),
    touched("", "metrics.jsonl", put(METRICS, "")),
    touched("", "metrics.jsonl", folder(METRICS)),
    touched("", "metrics.jsonl", put(METRICS, b"\xff\xfe\n" * 3)),
    touched("", "metrics.jsonl, line 1", metrics("one", 2)),
    touched("", "metrics.jsonl, line 2", metrics(2, 1, 2)),
    touched("", "metrics.jsonl, line 2", metrics(2, 1)),
    touched("", "metrics.jsonl|2", metrics(1)),
    touched("", "metrics.jsonl, line 1", put(METRICS, '{"step": 1, "loss": NaN}\n')),
    touched("", "metrics.jsonl, line 1", put(METRICS, '{"step": 1, "loss": "low"}\n')),
]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_fault(fault: Fault, check: Check) -> None:
    check(fault)
