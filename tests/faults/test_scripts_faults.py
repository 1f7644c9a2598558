"""Faults of the programs in scripts/, and what holds for every program."""

import re

import pytest
from faults import PROGRAMS, Check, Fault, put

from common.files import ROOT

MAKERS = ("circles", "clip_testset", "concepts", "noise", "sample_data")

FAULTS = [
    *(
        Fault(f"scripts.make_{name}", "--output-dir @file", "regular file", put("file", "mine"))
        for name in MAKERS
    ),
    *(Fault(f"scripts.make_{name}", "--count 0", "--count") for name in MAKERS),
    *(Fault(f"scripts.make_{name}", "--seed -1", "--seed") for name in MAKERS),
    Fault("scripts.make_noise", "--side 100000", "--side"),
    Fault("scripts.make_noise", "--count 99999999999", "--count"),
    Fault("scripts.make_noise", "", "No space left", full_disk=True),
    Fault("scripts.make_circles", "--circles -1", "--circles"),
    Fault("scripts.make_circles", "--layouts bogus", "--layouts"),
    Fault("scripts.make_clip_testset", "--size 0", "--size"),
    Fault("scripts.make_concepts", "--side 7", "--side"),
    Fault("scripts.make_frames", "--only bogus", "--only"),
    Fault("scripts.make_report", "--html @r.html", "--check|--html"),
    Fault("scripts.demo", "--port 0", "--port"),
    Fault("scripts.demo", "--port 99999", "--port"),
    Fault("scripts.demo", "--auth nobody", "--auth"),
    Fault("scripts.demo", "--noise-side 0", "--noise-side"),
    Fault("scripts.benchmark_clip", "--images @none", "none"),
    Fault("scripts.benchmark_streaming", "--fill50k @none", "none"),
    Fault("scripts.study_faults", "--times 0", "--times"),
    Fault("scripts.study_faults", "--only p1", "--only"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_fault(fault: Fault, check: Check) -> None:
    check(fault)


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_refuses_an_unknown_flag(program: str, check: Check) -> None:
    check(Fault(program, "--no-such-flag 3", "--no-such-flag"))


def test_the_campaign_knows_every_program() -> None:
    folders = ("common", "p1_diffusion", "p2_ddim", "p3_controlnet", "p3_clip", "scripts")
    found = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for name in folders
        for path in (ROOT / name).rglob("*.py")
        if re.search(r"^    cli\.run\(main, Config\)$", path.read_text(), re.MULTILINE)
    }
    assert found == PROGRAMS.keys()
