"""Settings of the C library's allocator, each in a process of its own."""

import ctypes
import sys
from pathlib import Path

import pytest
from tiny import run_process

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_info"),
    reason="the C library is not glibc",
)
FAULTS = """
import resource, torch
from common.memory import keep_freed_memory
keep_freed_memory()
torch.ones(2**24 + 2**10)  # 64 MiB, or 16,384 pages, and a little to find an aligned place in
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
HEAPS = """
import ctypes, sys, threading
from common.memory import share_heaps
share_heaps()
library, all_there, end = ctypes.CDLL(None), threading.Barrier(9), threading.Event()
def work():
    library.malloc(1000)
    all_there.wait()
    end.wait()
for _ in range(8):
    threading.Thread(target=work).start()
all_there.wait()
library.fopen.restype = ctypes.c_void_p
file = ctypes.c_void_p(library.fopen(sys.argv[1].encode(), b"w"))
library.malloc_info(0, file)
library.fclose(file)
end.set()
"""


def test_memory_that_is_freed_is_not_cleared_anew() -> None:
    done = run_process([sys.executable, "-c", FAULTS])
    assert int(done.stdout) < 1000


def test_threads_share_two_heaps(tmp_path: Path) -> None:
    assert run_process([sys.executable, "-c", HEAPS, tmp_path / "heaps.xml"]).returncode == 0
    assert (tmp_path / "heaps.xml").read_text().count("<heap nr=") == 2
