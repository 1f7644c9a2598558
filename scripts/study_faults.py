"""Kills each trainer and each drawing program at random moments and runs it again to the end.

    python3 -m scripts.study_faults                            # two hours on two CPU cores
    python3 -m scripts.study_faults --only p1_diffusion.train --times 1 --result None

The second run, by the same command, must end as one that nothing disturbed: the same files, byte
for byte, and in a training one line of metrics for each step. Between the two, no file may be half
written: each picture and each file of weights that exists is whole. SIGTERM must end the program
with exit code 143, without a traceback, within seconds. Half of the moments are spread between the
start and the end of the undisturbed run, imports included, and half between its first file and its
end. Where a killed program had written nothing yet, a second run would be a first one, and is left
out. Programs whose rows the result file holds already are skipped, so that a study can be
interrupted.
"""

import dataclasses
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import IO, Any

import torch

from common import cli
from common.checkpoint import load_tensors
from common.config import Count, Seed
from common.errors import InputError
from common.files import ROOT, read_json, write_json
from common.images import read_rgb, write_png
from common.progress import Progress

SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM}
SECONDS_TO_END = 30.0  # after SIGTERM, on a busy machine
FEW = (
    "--steps 6 --warmup 1 --log-every 1 --checkpoint-every 2 --validate-every 3 --preview-every 6"
    " --device cpu"
)
PREPARE = (
    "scripts.make_sample_data --output-dir DATA --count 100",
    "scripts.make_noise --output-dir DATA/noise --count 4 --side 64",
    "scripts.make_circles --output-dir DATA/circles --circles 4 --count 1",
    "scripts.make_concepts --output-dir DATA/concepts --count 4",
)
"""Commands that make the data; photos of faces are made by `make_photos`."""
TRAINERS = {
    "p1_diffusion.train": f"--preset smoke --data DATA/digits --run-dir OUT {FEW}",
    "p1_diffusion.study.train_classifier": (
        f"--data DATA/digits --run-dir OUT {FEW} --batch-size 8"
    ),
    "p2_ddim.train": f"--preset smoke --data DATA --run-dir OUT {FEW}",
    "p2_ddim.study.train_features": f"--data DATA --run-dir OUT {FEW} --batch-size 8",
    "p3_controlnet.train": (
        f"--preset smoke --run-dir OUT {FEW} --pictures 8 --validation-pictures 2"
    ),
    "p3_controlnet.base.train_autoencoder": f"--preset smoke --run-dir OUT {FEW} --pictures 8",
    "p3_controlnet.base.train_text": f"--preset smoke --run-dir OUT {FEW}",
    "p3_controlnet.base.train_unet": (
        "--preset smoke --autoencoder checkpoints/ldm_shapes/vae --text-encoder"
        " checkpoints/ldm_shapes/text_encoder --pictures 8 --run-dir OUT"
        f" {FEW.replace('--preview-every 6', '--preview-every 0')}"  # a preview takes half a minute
    ),
    "p3_clip.train": f"--preset smoke --run-dir OUT {FEW}",
    "p3_clip.personalisation.train textual-inversion": (
        f"--preset smoke --clip none --run-dir OUT {FEW}"
    ),
    "p3_clip.personalisation.train custom-diffusion": (
        f"--preset smoke --clip none --run-dir OUT {FEW} --num-class-images 4"
    ),
}
DRAWERS = {
    "p1_diffusion.inference": (
        "--output-dir OUT --classes svhn/1 --steps 2 --chunk-size 10 --device cpu"
    ),
    "p2_ddim.inference": "--noises DATA/noise --output-dir OUT --steps 4 --device cpu",
    "p3_controlnet.inference": (
        "--prompts DATA/circles/prompt.json --sources DATA/circles/source --output-dir OUT"
        " --steps 2 --chunk-size 2 --device cpu"
    ),
    "p3_clip.personalisation.inference": (
        "--prompts DATA/concepts/input.json --output-dir OUT --count 2 --size 64 --steps 1"
        " --chunk-size 2 --device cpu"
    ),
}
PROGRAMS = {**TRAINERS, **DRAWERS}
"""Flags of each program; DATA is the folder of the data, OUT the one that the program fills."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Kills trainers and drawing programs at random moments and compares what their reruns leave.

    Exits with 1 if a rerun differs or a file was half written.
    """

    only: tuple[str, ...] = ()
    """The programs to study, by their names; all if none is given."""
    times: Count = 20
    """How often each program is killed by each signal."""
    seed: Seed = 0
    """Seed of the moments."""
    jobs: Count = 2
    """Programs studied at once, each on one CPU core."""
    result: Path | None = ROOT / "results" / "faults.json"
    """JSON file to write."""


def main(config: Config) -> None:
    """Prints and writes the counts for each program and signal."""
    unknown = [name for name in config.only if name not in PROGRAMS]
    if unknown:
        raise InputError(f"--only: {unknown[0]} is none of {', '.join(PROGRAMS)}")
    command = f"bash scripts/study_faults.sh --times {config.times} --seed {config.seed}"
    rows: list[dict[str, Any]] = []
    if config.result and config.result.exists():
        before = read_json(config.result)
        rows = before["rows"] if before["command"] == command else []
    known = {row["program"] for row in rows}
    names = [name for name in config.only or PROGRAMS if name not in known]
    with tempfile.TemporaryDirectory() as work, ThreadPoolExecutor(config.jobs) as pool:
        data = prepare(Path(work) / "data")
        studies = [
            pool.submit(study, name, data, Path(work), config.times, config.seed) for name in names
        ]
        for done in as_completed(studies):
            if done.exception():
                pool.shutdown(cancel_futures=True)
            rows += done.result()
            print(json.dumps(rows[-len(SIGNALS) :]), flush=True)
            if config.result:
                in_order = sorted(rows, key=lambda row: list(PROGRAMS).index(row["program"]))
                write_json(config.result, {"command": command, "rows": in_order})
    failures = sum(len(row["failures"]) for row in rows)
    print(f"{sum(row['times'] for row in rows)} kills, {failures} failures")
    if failures:
        raise SystemExit(1)


def study(name: str, data: Path, work: Path, times: int, seed: int) -> list[dict[str, Any]]:
    """For each signal how often the program was hit and was run again, and every failure."""
    folder = work / name.replace(" ", ".")
    first, end = run_undisturbed(name, data, folder / "undisturbed" / "out")
    expected = contents(folder / "undisturbed")
    rows = []
    for kind in SIGNALS:
        moments = random.Random(f"{name} {kind} {seed}")
        row: dict[str, Any] = {"program": name, "signal": kind, "times": times}
        row |= {"hit": 0, "run_again": 0, "slowest_end": 0.0, "failures": []}
        for number in Progress(range(times), desc=f"{name}, {kind}", unit="kills"):
            moment = moments.uniform(first if number % 2 else 0.0, end)
            out = folder / f"{kind}{number}" / "out"
            killed, ending = run_and_kill(name, data, out, SIGNALS[kind], moment)
            row["hit"] += killed.returncode != 0
            row["slowest_end"] = max(row["slowest_end"], round(ending, 2))
            problems = [*wrong_end(killed, kind), *half_written(out, expected)]
            if contents(out.parent):
                row["run_again"] += 1
                again = run(name, data, out)
                if again.returncode:
                    problems.append(f"the rerun: {again.stderr.strip().splitlines()[-1]}")
                else:
                    problems += differences(contents(out.parent), expected)
            row["failures"] += [{"moment": moment, "problem": problem} for problem in problems]
            shutil.rmtree(out.parent, ignore_errors=True)  # it may not exist yet
        rows.append(row)
    return rows


# ----------------------------------------------------------------------------
# Processes.


def command_of(name: str, data: Path, out: Path) -> list[str]:
    """The program as a command."""
    words = f"{name} {PROGRAMS[name]}".replace("DATA", str(data)).replace("OUT", str(out))
    return [sys.executable, "-m", *shlex.split(words)]


def environment() -> dict[str, str]:
    """One thread, so that sums have one order, and nothing is asked of the network."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def run(name: str, data: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """Runs the program to its end."""
    return subprocess.run(
        command_of(name, data, out), capture_output=True, text=True, cwd=ROOT, env=environment()
    )


def run_undisturbed(name: str, data: Path, out: Path) -> tuple[float, float]:
    """Runs the program; the seconds until its first file in OUT's parent, and until its end."""
    with tempfile.TemporaryFile("w+") as said:
        started = time.monotonic()
        process = start(name, data, out, said)
        while process.poll() is None and not any(files for *_, files in os.walk(out.parent)):
            time.sleep(0.05)
        first = time.monotonic() - started
        if process.wait():
            said.seek(0)
            raise InputError(f"{name} failed undisturbed: {said.read().strip().splitlines()[-1]}")
        return first, time.monotonic() - started


def start(name: str, data: Path, out: Path, said: IO[str]) -> subprocess.Popen[bytes]:
    """Starts the program; what it prints goes to the file `said`."""
    command = command_of(name, data, out)
    return subprocess.Popen(command, stdout=said, stderr=said, cwd=ROOT, env=environment())


def run_and_kill(
    name: str, data: Path, out: Path, number: signal.Signals, moment: float
) -> tuple[subprocess.CompletedProcess[str], float]:
    """Runs the program and sends the signal after so many seconds; how long it took to end."""
    with tempfile.TemporaryFile("w+") as said:
        process = start(name, data, out, said)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            process.send_signal(number)
        sent = time.monotonic()
        try:
            process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        said.seek(0)
        code = process.returncode
        return subprocess.CompletedProcess([], code, "", said.read()), time.monotonic() - sent


def wrong_end(killed: subprocess.CompletedProcess[str], kind: str) -> Iterator[str]:
    """What is wrong with how the program ended."""
    # Before Python runs the program, SIGTERM ends the process itself, which a shell shows as 143.
    allowed = {"SIGKILL": {0, -9}, "SIGTERM": {0, 143, -15}}[kind]
    if killed.returncode not in allowed:
        yield f"ended with {killed.returncode}: {killed.stderr[-300:]}"
    elif "Traceback" in killed.stderr:
        yield f"a traceback: {killed.stderr[-300:]}"


# ----------------------------------------------------------------------------
# Files.


def contents(folder: Path) -> dict[str, Any]:
    """Every file below the folder by its relative name: bytes, or of metrics the losses by line."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): (
            [json.loads(line) for line in path.read_text().splitlines()]
            if path.name == "metrics.jsonl"
            else path.read_bytes()
        )
        for path in files
    }


def differences(found: dict[str, Any], expected: dict[str, Any]) -> Iterator[str]:
    """What differs from the undisturbed run. Times in the metrics may."""
    for name in sorted(found.keys() | expected.keys()):
        if name not in found or name not in expected:
            yield f"{name} is {'missing' if name in expected else 'left over'}"
        elif name.endswith("metrics.jsonl"):
            lines = [
                [(line["step"], line.get("loss")) for line in x[name]] for x in (found, expected)
            ]
            if lines[0] != lines[1]:
                yield f"{name} has the lines {lines[0]} instead of {lines[1]}"
        elif found[name] != expected[name]:
            yield f"{name} differs"


def half_written(out: Path, expected: dict[str, Any]) -> Iterator[str]:
    """Files that a reader would take for finished and that are not."""
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out.parent))
        if any(part.startswith(".") for part in Path(name).parts) or not path.is_file():
            continue
        try:
            if path.suffix == ".png":
                read_rgb(path)
            elif path.suffix == ".safetensors":
                load_tensors(path)
            elif path.suffix == ".json":
                json.loads(path.read_text())
        except (InputError, ValueError) as error:
            yield f"{name} is half written: {error}"
        if path.suffix == ".png" and path.read_bytes() != expected.get(name):
            yield f"{name} was there and is not the final one"


def prepare(data: Path) -> Path:
    """Makes the data of all programs in the folder, which it returns."""
    for line in PREPARE:
        command = [sys.executable, "-m", *shlex.split(line.replace("DATA", str(data)))]
        made = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment())
        if made.returncode:
            raise InputError(f"{line} failed: {made.stderr.strip().splitlines()[-1]}")
    make_photos(data / "photos")
    return data


def make_photos(folder: Path, count: int = 40, side: int = 32) -> None:
    """Pictures in the layout of Problem 2's faces: discs of random colours."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    inside = (rows - side / 2) ** 2 + (columns - side / 2) ** 2 < (side / 3) ** 2
    for i in range(count):
        ground, disc = torch.randint(0, 256, (2, 3, 1, 1), generator=generator)
        write_png(folder / f"{i:05d}.png", torch.where(inside, disc, ground).to(torch.uint8))


if __name__ == "__main__":
    cli.run(main, Config)
