"""A running web demo for the tests."""

import contextlib
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tiny import environment

from common.files import ROOT

DEMO = ("-m", "scripts.demo")


@contextlib.contextmanager
def serving(temporary: Path, *flags: object, program: tuple[str, ...] = DEMO) -> Iterator[str]:
    """The address of a demo; at the end it must have had no defect and leave no file.

    `temporary` is a folder for its files, `program` what Python runs.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = temporary.with_suffix(".log")
    with open(log, "w") as output:
        process = subprocess.Popen(
            [sys.executable, *program, "--port", str(port), *map(str, flags)],
            stdout=subprocess.PIPE,
            stderr=output,
            text=True,
            cwd=ROOT,
            env=environment(TMPDIR=str(temporary)),
        )
        assert process.stdout
        started = any("The demo is at" in line for line in iter(process.stdout.readline, ""))
        if not started:
            process.communicate()
        assert started, log.read_text()
        try:
            yield f"http://127.0.0.1:{port}/"
        finally:
            process.send_signal(signal.SIGTERM)
            process.stdout.close()
            code = process.wait(60)
    assert code == 128 + signal.SIGTERM
    assert "Traceback" not in log.read_text(), log.read_text()
    assert not list(temporary.glob("demo_*"))
