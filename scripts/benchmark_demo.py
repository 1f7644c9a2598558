"""Puts the web demo under load: many clients at once, each with one job after another.

    .venv/bin/python -m scripts.benchmark_demo

It starts the demo on a free port. Each client repeats the endpoints `/digits`, `/face` and `/clip`
in turn until the time is up, then waits for its last answer. A job is lost if it has no answer or
an error. The memory is the demo's resident set, read every five seconds.
"""

import contextlib
import dataclasses
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from common import cli
from common.errors import InputError
from common.files import ROOT, write_json
from common.images import write_png

if TYPE_CHECKING:
    from gradio_client import Client

INTERVAL = 5.0  # seconds between two readings of the memory


@dataclasses.dataclass(frozen=True)
class Config:
    """Puts the web demo under load."""

    clients: int = 30
    """Number of clients at once."""
    seconds: float = 180.0
    """Time during which clients send jobs."""
    steps: int = 5
    """Sampling steps of a job."""
    result: Path | None = ROOT / "results" / "demo.json"
    """JSON file to write."""


def main(config: Config) -> None:
    """Runs the clients, prints and writes the numbers; exits with 1 if a job was lost."""
    if config.clients < 1 or config.seconds <= 0 or config.steps < 1:
        raise InputError("--clients, --seconds and --steps must be above 0")
    with running_demo() as (address, process), tempfile.TemporaryDirectory() as folder:
        load = Load(config, address, Path(folder))
        load.run(process)
    waits = sorted(load.waits)
    result = {
        "command": "python3 -m scripts.benchmark_demo",
        "clients": config.clients,
        "seconds": config.seconds,
        "steps": config.steps,
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "machine": platform.machine(),
        "jobs": load.sent,
        "answered": len(waits),
        "lost": load.sent - len(waits),
        "seconds_until_answer": {
            "median": statistics.median(waits),
            "longest": waits[-1],
        },
        "memory_mb": load.memory,
        "memory_growth_mb": load.growth(),
    }
    print(
        f"{result['answered']} of {load.sent} jobs of {config.clients} clients answered, median"
        f" {result['seconds_until_answer']['median']:.1f} s; memory grew by"
        f" {result['memory_growth_mb']:.0f} MB in the second half"
    )
    print("\n".join(sorted(set(load.errors))[:5]), end="\n" if load.errors else "")
    if config.result:
        write_json(config.result, result)
    if result["lost"]:
        raise SystemExit(1)


@contextlib.contextmanager
def running_demo() -> Iterator[tuple[str, psutil.Process]]:
    """Starts the demo on a free port; yields its address and process, and ends it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "scripts.demo", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        for line in process.stdout or ():
            if "The demo is at" in line:
                break
        else:
            raise InputError("the demo did not start")
        yield f"http://127.0.0.1:{port}/", psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


class Load:
    """The clients, and what they saw."""

    def __init__(self, config: Config, address: str, folder: Path) -> None:
        self.config, self.address = config, address
        self.picture = folder / "picture.png"
        write_png(self.picture, _noise_picture())
        self.sent = 0
        self.waits: list[float] = []
        self.errors: list[str] = []
        self.memory: list[float] = []
        self._lock = threading.Lock()

    def run(self, process: psutil.Process) -> None:
        """Runs all clients to their end, and reads the memory of `process` meanwhile."""
        from gradio_client import Client

        answers = self.picture.parent / "answers"  # else a folder for each in the system's
        clients = [
            Client(self.address, download_files=answers, verbose=False)
            for _ in range(self.config.clients)
        ]
        self.call(clients[0], 0)  # networks allocate their buffers once
        self.sent, self.waits = 0, []
        until = time.monotonic() + self.config.seconds
        threads = [
            threading.Thread(target=self.repeat, args=(client, k, until))
            for k, client in enumerate(clients)
        ]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            self.memory.append(round(process.memory_info().rss / 2**20, 1))
            time.sleep(INTERVAL)

    def repeat(self, client: "Client", number: int, until: float) -> None:
        """Sends jobs one after another until the time `until`."""
        while time.monotonic() < until:
            self.call(client, number)
            number += 1

    def call(self, client: "Client", number: int) -> None:
        """Sends job `number` and notes the time until its answer, or its error."""
        from gradio_client import handle_file

        steps = self.config.steps
        jobs: list[tuple[str, list[Any]]] = [
            ("/digits", ["all", "mnistm", 7.5, 1.0, 150, 700, steps, "dpmpp_2m", number]),
            ("/face", [number, None, 0.0, steps, 0]),
            ("/clip", [handle_file(self.picture), "red circle\nblue square", "a {}"]),
        ]
        endpoint, arguments = jobs[number % len(jobs)]
        with self._lock:
            self.sent += 1
        started = time.monotonic()
        try:
            client.predict(*arguments, api_name=endpoint)
        except Exception as error:  # whatever it is, the job is lost and counted
            self.errors.append(f"{endpoint}: {type(error).__name__}: {error}")
            return
        with self._lock:
            self.waits.append(time.monotonic() - started)

    def growth(self) -> float:
        """Highest memory of the last quarter less that of the second, in MB."""
        quarter = max(1, len(self.memory) // 4)
        return max(self.memory[-quarter:]) - max(self.memory[quarter : 2 * quarter] or self.memory)


def _noise_picture() -> Any:
    import torch

    values = np.random.default_rng(0).integers(0, 256, (3, 64, 64), dtype=np.uint8)
    return torch.from_numpy(values)


if __name__ == "__main__":
    cli.run(main, Config)
