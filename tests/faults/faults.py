"""What the campaign's tables are made of: rows, the programs they are about, the small files that
these need, ways to damage files, and the one check of all rows."""

import dataclasses
import errno
import fcntl
import hashlib
import importlib
import io
import json
import os
import shlex
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import exit_code, refusal

from common.checkpoint import load_tensors, save_tensors

Damage = Callable[[Path], None]
Check = Callable[["Fault"], None]


@dataclasses.dataclass(frozen=True)
class Fault:
    """A row: one input or fault that a program must refuse."""

    program: str
    """A key of PROGRAMS."""
    flags: str
    """Flags after the program's own; of a flag given twice the last one counts. @PATH is a path in
    the row's folder."""
    says: str
    """What the sentence must name, such as the file, key or flag; several are separated by |."""
    damage: Damage | None = None
    """Changes the row's folder before the program runs."""
    env: str = ""
    """Environment variables, as NAME=VALUE with spaces between them."""
    full_disk: bool = False
    """Whether nothing can be written to the disk."""
    parts: str = ""
    """Parts of the world besides the program's, with spaces between them."""

    def __str__(self) -> str:
        words = (self.program.split(".")[-1], self.flags, self.env, self.says)
        return " ".join(filter(None, words))[:100]


SMALL_DIGITS = (
    "--model.channels 16 32 --model.blocks 1 1 --model.attention 1 --model.embedding 32"
    " --model.heads 2"
)
SMALL_FACES = "--model.channels 32 64 --model.blocks 1 --model.attention 1 --model.embedding 32"
SMALL_FACES += " --model.heads 1 --model.patch 1 --model.refine 0"
SMALL_UNET = "--model.channels 16 32 --model.heads 2 --model.groups 4"
FEW = "--steps 1 --batch-size 4 --warmup 0 --validate-every 0 --preview-every 0 --device cpu"
LEARN = f"--run-dir @out --base @models/base --clip none --photos @photos --words red {FEW}"
CONTROL = "--checkpoint @models/control --base @models/base --device cpu"

PROGRAMS: dict[str, tuple[str, str]] = {
    "p1_diffusion.train": (
        "digits",
        f"--run-dir @out --data @digits {SMALL_DIGITS} --optimizer adamw {FEW}",
    ),
    "p1_diffusion.study.train_classifier": ("digits", f"--run-dir @out --data @digits {FEW}"),
    "p1_diffusion.inference": (
        "p1",
        "--output-dir @out --checkpoint @p1 --device cpu --steps 1 --classes svhn/1",
    ),
    "p1_diffusion.evaluate": ("p1 grader", "--images @images --grader @grader --result @r.json"),
    "p1_diffusion.study.figures": ("p1", "--images @images --output-dir @out --checkpoint @p1"),
    "p1_diffusion.study.sweeps": (
        "p1 grader",
        "guidance --checkpoint @p1 --grader @grader --results @out --device cpu",
    ),
    "p2_ddim.train": ("faces", f"--run-dir @out --data @faces {SMALL_FACES} {FEW}"),
    "p2_ddim.study.train_features": ("faces", f"--run-dir @out --data @faces {FEW}"),
    "p2_ddim.inference": (
        "p2 noises",
        "--noises @noises --output-dir @out --checkpoint @p2 --device cpu --steps 2",
    ),
    "p2_ddim.evaluate": ("faces", "--images @faces/photos --references @faces/photos"),
    "p2_ddim.study.calibrate": (
        "p2 noises",
        "--noises @noises --references @noises --checkpoint @p2 --device cpu --result @r.json",
    ),
    "p2_ddim.study.evaluate_features": ("faces", "--photos @faces --result @r.json"),
    "p2_ddim.study.figures": (
        "p2 noises",
        "--noises @noises --output-dir @out --checkpoint @p2 --device cpu",
    ),
    "p2_ddim.study.sweeps": (
        "p2",
        "steps --checkpoint @p2 --results @out --side 16 --count 2 --device cpu",
    ),
    "p3_controlnet.train": (
        "models",
        "--run-dir @out --base @models/base --pictures 4 --validation-pictures 2"
        f" --hint-channels 4 8 8 {FEW}",
    ),
    "p3_controlnet.base.train_autoencoder": (
        "",
        f"--run-dir @out --pictures 4 --model.channels 8 8 16 {FEW}",
    ),
    "p3_controlnet.base.train_text": ("clip", f"--run-dir @out --clip @clip/model {FEW}"),
    "p3_controlnet.base.train_unet": (
        "models",
        "--run-dir @out --autoencoder @models/base/vae --text-encoder @models/base/text_encoder"
        f" --pictures 4 {SMALL_UNET} {FEW}",
    ),
    "p3_controlnet.inference": (
        "models pairs",
        f"--prompts @pairs/prompt.json --sources @pairs/source --output-dir @out {CONTROL}"
        " --steps 1 --chunk-size 2",
    ),
    "p3_controlnet.evaluate": (
        "pairs",
        "--images @pairs/target --prompts @pairs/prompt.json --sources @pairs/source"
        " --targets @pairs/target --clip none --result @r.json",
    ),
    "p3_controlnet.study.figures": ("models", f"--output-dir @out {CONTROL}"),
    "p3_controlnet.study.sweeps": (
        "models",
        "base --checkpoint @models/base --control @models/control --results @out --device cpu"
        " --count 1",
    ),
    "p3_clip.train": ("clip", f"--run-dir @out --model @tiny.json {FEW}"),
    "p3_clip.inference": (
        "clip",
        "--images @clip/val --labels @clip/id2label.json --model @clip/model --output-dir @out"
        " --cache @cache --device cpu --workers 1",
    ),
    "p3_clip.evaluate": ("clip_run", "zero-shot --run @clip_run --result @r.json"),
    "p3_clip.study.colours": ("clip_run", "--run @clip_run --cache @cache --result @r.json"),
    "p3_clip.study.figures": (
        "clip_run clip",
        "--run @clip_run --images @clip/val --output-dir @out",
    ),
    "p3_clip.personalisation.train": ("models photos", f"textual-inversion {LEARN}"),
    "p3_clip.personalisation.inference": (
        "models words",
        "--prompts @words/input.json --output-dir @out --checkpoint @models/base --concepts"
        " @words/learned --count 1 --size 32 --steps 1 --chunk-size 2 --device cpu",
    ),
    "p3_clip.personalisation.export": (
        "models words",
        "--concepts @words/learned --form diffusers --output @out.bin --base @models/base",
    ),
    "p3_clip.personalisation.merge": (
        "models words",
        "--results @words/learned @words/learned --output-dir @out --base @models/base",
    ),
    "p3_clip.personalisation.study.figures": ("", "--pictures @pictures --output-dir @out"),
    "p3_clip.personalisation.study.sweeps": (
        "models",
        "--base @models/base --output-dir @out --result @r.json --device cpu",
    ),
    "scripts.demo": ("p1 p2 models", "--digits @p1 --unet @p2 --base @models/base --device cpu"),
    "scripts.make_circles": ("", "--output-dir @out"),
    "scripts.make_clip_testset": ("", "--output-dir @out --count 1"),
    "scripts.make_concepts": ("", "--output-dir @out --count 1"),
    "scripts.make_frames": ("", "--output-dir @out"),
    "scripts.make_noise": ("", "--output-dir @out --count 1 --side 8"),
    "scripts.make_report": ("", "--check"),
    "scripts.make_sample_data": ("", "--output-dir @out --count 1"),
    "scripts.benchmark_clip": ("", "--images @images --result @r.json"),
    "scripts.benchmark_controlnet": ("", "--result @r.json"),
    "scripts.benchmark_demo": ("", "--result @r.json"),
    "scripts.benchmark_gpu": ("", "--result @r.json"),
    "scripts.benchmark_p2": ("", "--result @r.json"),
    "scripts.benchmark_streaming": ("", "--fill50k @fill50k --result @r.json"),
    "scripts.benchmark_training": ("", "--result @r.json"),
    "scripts.study_faults": ("", "--times 1 --result @r.json"),
}
"""Every program: the parts of the world that it reads (`conftest.parts`), and flags with which it
works."""

TASK = {
    "src_image": "dog",
    "token_name": "<new1>",
    "prompt": ["A <new1> on red."],
    "prompt_4_clip_eval": ["A dog on red."],
    "baseline": [[79, 34]],
}
"""A concept in input.json, as the part `words` has it."""


# ----------------------------------------------------------------------------
# Damage.


def put(path: str, content: bytes | str | Any) -> Damage:
    """The file gets this content: bytes, text, or JSON."""
    if not isinstance(content, bytes):
        text = content if isinstance(content, str) else json.dumps(content)
        content = text.encode(errors="surrogatepass")

    def damage(world: Path) -> None:
        (world / path).parent.mkdir(parents=True, exist_ok=True)
        (world / path).write_bytes(content)

    return damage


def gone(path: str) -> Damage:
    """The file or folder is missing."""

    def damage(world: Path) -> None:
        shutil.rmtree(world / path) if (world / path).is_dir() else (world / path).unlink()

    return damage


def folder(path: str) -> Damage:
    """An empty folder is in the file's place."""

    def damage(world: Path) -> None:
        (world / path).unlink(missing_ok=True)
        (world / path).mkdir(parents=True)

    return damage


def halved(path: str) -> Damage:
    """Only the first half of the file is there."""

    def damage(world: Path) -> None:
        whole = (world / path).read_bytes()
        (world / path).write_bytes(whole[: len(whole) // 2])

    return damage


def edited(path: str, **values: Any) -> Damage:
    """Entries of a JSON object have other values; ... takes an entry away."""

    def damage(world: Path) -> None:
        content = json.loads((world / path).read_text()) | values
        content = {name: value for name, value in content.items() if value is not ...}
        (world / path).write_text(json.dumps(content))

    return damage


def both(*damages: Damage) -> Damage:
    """One after another."""

    def damage(world: Path) -> None:
        for each in damages:
            each(world)

    return damage


def tensors(path: str, change: Callable[[dict[str, Any]], None], metadata: Any = ...) -> Damage:
    """The tensors of a safetensors file are changed in place, its metadata kept unless given."""

    def damage(world: Path) -> None:
        state, before = load_tensors(world / path)
        change(state)
        save_tensors(world / path, state, before if metadata is ... else metadata)

    return damage


def saved(path: str, content: Any) -> Damage:
    """A file of torch.save."""

    def damage(world: Path) -> None:
        (world / path).parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, world / path)

    return damage


def picture(path: str, mode: str = "RGB", size: tuple[int, int] = (16, 16), **more: Any) -> Damage:
    """A plain picture."""

    def damage(world: Path) -> None:
        (world / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, size).save(world / path, **more)

    return damage


def locked(path: str) -> Damage:
    """Another job holds the folder, until the tests end."""

    def damage(world: Path) -> None:
        (world / path).mkdir(exist_ok=True)
        fcntl.flock(os.open(world / path, os.O_RDONLY), fcntl.LOCK_EX)

    return damage


def archive() -> bytes:
    """A zip archive that holds no weights."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        file.writestr("model/readme.txt", "hello")
    return stream.getvalue()


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab\nsize 4265380512\n"
PAGE = "<!DOCTYPE html><html><head><title>Google Drive - Quota exceeded</title></head></html>"
NO_WEIGHTS = {
    "a Git LFS pointer": (POINTER, "Git LFS"),
    "a web page": (PAGE, "web page"),
    "an empty file": ("", "empty"),
    "a zip archive": (archive(), "archive"),
    "a tar.gz archive": (b"\x1f\x8b\x08" + bytes(40), "archive"),
    "text": ("hello", "text file"),
    "a header without end": (b"\xff" * 8 + b"{", "not"),
}
"""What people have in the place of weights: (content, what must be said of it)."""


def first(dtype: torch.dtype | None = None, **how: Any) -> Callable[[dict[str, Any]], None]:
    """Changes the first matrix: its type, one value (`value`), its shape, its name or its being."""

    def change(state: dict[str, Any]) -> None:
        name = next(name for name, value in state.items() if value.dim() > 1)
        if dtype is not None:
            state[name] = state[name].to(dtype)
        if "value" in how:
            state[name].view(-1)[0] = how["value"]
        if "wider" in how:
            state[name] = torch.cat([state[name], state[name]])
        if "renamed" in how:
            state["a.stranger"] = state.pop(name)
        if "more" in how:
            state["a.stranger"] = torch.zeros(2)
        if "without" in how:
            del state[name]

    return change


WRONG_TENSORS = {
    "NaN": (first(value=float("nan")), "not finite"),
    "infinity": (first(value=float("inf")), "not finite"),
    "int8": (first(torch.int8), "kind of number"),
    "bool": (first(torch.bool), "kind of number"),
    "complex": (first(torch.complex64), "kind of number"),
    "another shape": (first(wider=True), "shape"),
    "another name": (first(renamed=True), "missing"),
    "one more": (first(more=True), "a.stranger"),
    "one less": (first(without=True), "missing"),
}
"""Weights that no network can have: (change of the tensors, what must be said)."""


# ----------------------------------------------------------------------------
# The check of all rows.


def snapshot(world: Path) -> dict[str, tuple[int, str]]:
    """Size and hash of every file below a folder, and every folder."""
    return {
        str(path.relative_to(world)): (
            (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
            if path.is_file()
            else (-1, "folder")
        )
        for path in sorted(world.rglob("*"))
    }


def arguments(flags: str, world: Path) -> list[str]:
    """The flags as words, with @PATH below `world`."""
    words = shlex.split(flags)
    return [str(world / word[1:]) if word.startswith("@") else word for word in words]


def check_fault(
    fault: Fault,
    parts: Callable[[str], Path],
    world: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The program refuses with exit code 2 and one sentence that names what is wrong; what was
    there is unchanged, and nothing is half-written."""
    needs, flags = PROGRAMS[fault.program]
    for name in f"{needs} {fault.parts}".split():
        shutil.copytree(parts(name), world / name)
    if fault.damage:
        fault.damage(world)
    before = snapshot(world)
    for setting in fault.env.split():
        monkeypatch.setenv(*setting.split("=", 1))
    # As on a machine without a GPU and without packages that are asked for by name.
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    if fault.full_disk:
        monkeypatch.setattr(os, "fsync", _no_space)
    module = importlib.import_module(fault.program)
    monkeypatch.chdir(world)
    code = exit_code(module.main, module.Config, *arguments(f"{flags} {fault.flags}", world))
    said = capsys.readouterr().err
    assert code == 2, said
    assert "Traceback" not in said, said
    if "For full helptext" not in said:  # the box of the argument parser
        said = refusal(said)
    said = said.replace(str(world), "")  # whose name holds the row's own words
    for words in fault.says.split("|"):
        assert words in said, said
    after = snapshot(world)
    assert {name: after.get(name) for name in before} == before
    new = sorted(name for name in after.keys() - before if (world / name).is_file())
    assert not new


def _no_space(_: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
