"""The benchmark of the training loop at a toy's size: the table is complete and no number is made
up."""

import json
import subprocess
import sys
from pathlib import Path

from tiny import environment

from common.files import ROOT


def test_loop_and_work_are_timed(tmp_path: Path) -> None:
    result = tmp_path / "overhead.json"
    flags = ["--batch-size", "8", "--steps", "5", "--result", str(result)]
    process = subprocess.run(
        [sys.executable, "-m", "scripts.benchmark_training", *flags],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    table = json.loads(result.read_text())
    assert table["batch_size"] == 8 and min(table["loop_ms"], table["work_ms"]) > 0.0
    assert table["overhead_ms"] < table["loop_ms"]
