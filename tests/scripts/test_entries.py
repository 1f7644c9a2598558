"""The bash entries: they find their own folder, check their arguments, and pass the rest on
unharmed."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from tiny import contents, environment, exit_code, refusal, run_process, tiny_network
from tiny_faces import tiny_faces

from common.files import ROOT
from p1_diffusion import inference

PARTS = (
    "common",
    "p1_diffusion",
    "p2_ddim",
    "scripts",
    "hw2_1.sh",
    "hw2_2.sh",
    "hw2_download_ckpt.sh",
    "requirements.txt",
    "constraints.txt",
)
SPACED = "an output folder"


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkout at a path with spaces, with a small network as its shipped weights."""
    root = tmp_path_factory.mktemp("with spaces") / "a clone"
    root.mkdir()
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, root / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, root / part)
    tiny_network().save(root / "checkpoints" / "p1_digits")
    return root


@pytest.fixture
def echo(tmp_path: Path) -> str:
    """A stand-in for Python that prints what it was given, one argument a line."""
    path = tmp_path / "python that echoes"
    path.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    path.chmod(0o755)
    return str(path)


def run_entry(
    entry: Path, *arguments: Any, **environment_changes: str
) -> subprocess.CompletedProcess[str]:
    """Runs an entry from another working directory."""
    folder = environment_changes.pop("cwd", "/")
    return run_process(
        ["bash", entry, *arguments], cwd=folder, env=environment(**environment_changes)
    )


def test_hw2_1_from_another_folder_in_a_clone_with_spaces(clone: Path, tmp_path: Path) -> None:
    """A relative output path is relative to the caller's folder; the clone's own code and weights
    are used."""
    result = run_entry(
        clone / "hw2_1.sh",
        SPACED,
        "--steps",
        1,
        "--device",
        "cpu",
        cwd=str(tmp_path),
        PYTHONPATH="",
    )
    assert result.returncode == 0, result.stderr
    assert "500 images" in result.stdout
    assert "10 of 10 steps" in result.stderr  # progress is shown
    checkpoint = clone / "checkpoints" / "p1_digits"
    arguments = ("--steps", 1, "--device", "cpu", "--checkpoint", checkpoint, "--classes", "svhn/7")
    assert (
        exit_code(inference.main, inference.Config, "--output-dir", tmp_path / "again", *arguments)
        == 0
    )
    files, again = contents(tmp_path / SPACED), contents(tmp_path / "again")
    assert len(files) == 500 and len(again) == 50
    assert again.items() <= files.items()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", SPACED]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([SPACED], ["--output-dir", SPACED, "--edition", "2025"]),
        ([SPACED, "2024"], ["--output-dir", SPACED, "--edition", "2024"]),
        (
            [SPACED, "2025", "--seed", "3"],
            ["--output-dir", SPACED, "--edition", "2025", "--seed", "3"],
        ),
        (
            [SPACED, "--guide_w", "2"],
            ["--output-dir", SPACED, "--edition", "2025", "--guide_w", "2"],
        ),
        ([SPACED, "--edition=2024"], ["--output-dir", SPACED, "--edition=2024"]),
    ],
)
def test_hw2_1_passes_the_edition_and_flags_on(
    clone: Path, echo: str, arguments: list[str], expected: list[str]
) -> None:
    result = run_entry(clone / "hw2_1.sh", *arguments, PYTHON=echo)
    assert result.stdout.splitlines() == ["-m", "p1_diffusion.inference", *expected]


def test_the_year_in_hw2_1_is_drawn_if_none_is_given(clone: Path, echo: str) -> None:
    entry = clone / "hw2_1.sh"
    text = entry.read_text()
    assert text.count("\nEDITION=2025 ") == 1
    try:
        entry.write_text(text.replace("\nEDITION=2025 ", "\nEDITION=2024 "))
        for given, drawn in (((), "2024"), (("2025",), "2025")):
            result = run_entry(entry, "OUT", *given, PYTHON=echo)
            assert result.stdout.splitlines()[-2:] == ["--edition", drawn]
    finally:
        entry.write_text(text)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["in", SPACED], ["--noises", "in", "--output-dir", SPACED]),
        (
            ["in", SPACED, "a UNet.pt"],
            ["--noises", "in", "--output-dir", SPACED, "--checkpoint", "a UNet.pt"],
        ),
        (["in", SPACED, "--eta", "1"], ["--noises", "in", "--output-dir", SPACED, "--eta", "1"]),
        (
            ["in", SPACED, "UNet.pt", "--eta", "1"],
            ["--noises", "in", "--output-dir", SPACED, "--checkpoint", "UNet.pt", "--eta", "1"],
        ),
    ],
)
def test_hw2_2_passes_the_network_and_flags_on(
    clone: Path, echo: str, arguments: list[str], expected: list[str]
) -> None:
    result = run_entry(clone / "hw2_2.sh", *arguments, PYTHON=echo)
    assert result.stdout.splitlines() == ["-m", "p2_ddim.inference", *expected]


def test_inference_p2_passes_its_flags_on(clone: Path, echo: str) -> None:
    result = run_entry(
        clone / "scripts" / "inference_p2.sh", "a b", SPACED, "--eta", "1", PYTHON=echo
    )
    expected = ["-m", "p2_ddim.inference", "--noises", "a b", "--output-dir", SPACED, "--eta", "1"]
    assert result.stdout.splitlines() == expected
    result = run_entry(clone / "scripts" / "inference_p2.sh", "a b")
    assert result.returncode == 2 and result.stderr.startswith(
        "usage: bash scripts/inference_p2.sh NOISE_DIR OUT"
    )


@pytest.mark.parametrize("arguments", [[], ["in"], ["in", ""], ["", SPACED], ["in", SPACED, ""]])
def test_hw2_2_says_how_it_is_used(arguments: list[str]) -> None:
    """An empty third argument is a variable that was not set, and no wish for the shipped model."""
    result = run_entry(ROOT / "hw2_2.sh", *arguments)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("usage: bash hw2_2.sh NOISE_DIR OUT [UNET.pt]")


def test_hw2_2_without_a_network_takes_the_shipped_faces(
    clone: Path, noises: Path, tmp_path: Path
) -> None:
    """Or says that they are not there; `clone` has the weights of Problem 1 alone."""
    flags = ("--device", "cpu", "--steps", 2)
    result = run_entry(clone / "hw2_2.sh", noises, tmp_path / "out", *flags)
    assert result.returncode == 2
    assert refusal(result.stderr).startswith(
        "checkpoints/p2_faces is missing; it is part of the repository"
    )
    assert not (tmp_path / "out").exists()
    shipped = clone / "checkpoints" / "p2_faces"
    tiny_faces().save(shipped)
    try:
        for folder, network in (("out", ()), ("named", (shipped,))):
            result = run_entry(clone / "hw2_2.sh", noises, tmp_path / folder, *network, *flags)
            assert result.returncode == 0, result.stderr
    finally:
        shutil.rmtree(shipped)
    files = contents(tmp_path / "out")
    assert sorted(files) == ["00.png", "01.png", "02.png"] and files == contents(tmp_path / "named")


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (
            "inference_p1.sh",
            ["-m", "p1_diffusion.inference", "--output-dir", "a b", "--steps", "3"],
        ),
        (
            "train_p2.sh",
            ["-m", "p2_ddim.train", "--run-dir", "RUNS/p2_faces", "a b", "--steps", "3"],
        ),
        (
            "train_p2_features.sh",
            [
                "-m",
                "p2_ddim.study.train_features",
                "--run-dir",
                "RUNS/p2_features",
                "a b",
                "--steps",
                "3",
            ],
        ),
        (
            "train_p1.sh",
            ["-m", "p1_diffusion.train", "--run-dir", "RUNS/p1_digits", "a b", "--steps", "3"],
        ),
        (
            "train_p1_classifier.sh",
            [
                "-m",
                "p1_diffusion.study.train_classifier",
                "--run-dir",
                "RUNS/p1_classifier",
                "a b",
                "--steps",
                "3",
            ],
        ),
    ],
)
def test_scripts_pass_their_flags_on(
    clone: Path, echo: str, entry: str, expected: list[str]
) -> None:
    result = run_entry(
        clone / "scripts" / entry, "a b", "--steps", "3", PYTHON=echo, RUNS_DIR="RUNS"
    )
    assert result.stdout.splitlines() == expected
    runs = run_entry(clone / "scripts" / entry, "a b", PYTHON=echo).stdout.splitlines()
    assert entry.startswith("inference") or f"{clone}/runs/" in runs[3]


def test_grade_tells_the_problem_by_the_folder(clone: Path, echo: str, tmp_path: Path) -> None:
    (tmp_path / "a b" / "svhn").mkdir(parents=True)
    result = run_entry(
        clone / "scripts" / "grade.sh", tmp_path / "a b", "--data", "x y", PYTHON=echo
    )
    assert result.stdout.splitlines() == [
        "-m",
        "p1_diffusion.evaluate",
        "--images",
        str(tmp_path / "a b"),
        "--data",
        "x y",
    ]
    for folder, said in (
        (tmp_path, "is not an output folder of this homework"),
        (tmp_path / "none", "none does not exist"),
    ):
        result = run_entry(clone / "scripts" / "grade.sh", folder)
        assert result.returncode == 2
        assert said in refusal(result.stderr)
        assert result.stdout.startswith(f"FAIL: nothing is graded: {folder}")


@pytest.mark.parametrize("entry", ["hw2_1.sh", "scripts/inference_p1.sh", "scripts/grade.sh"])
def test_without_arguments_an_entry_says_how_it_is_used(entry: str) -> None:
    result = run_entry(ROOT / entry)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith(f"usage: bash {entry} OUT")
    assert not result.stdout


def test_an_empty_output_path_is_no_output_path() -> None:
    result = run_entry(ROOT / "hw2_1.sh", "")
    assert result.returncode == 2 and result.stderr.startswith("usage:")


def test_quickstart_knows_its_jobs() -> None:
    """An unknown job is refused before anything is installed."""
    result = run_entry(ROOT / "scripts" / "quickstart.sh", "p9")
    assert result.returncode == 2
    assert "unknown job p9" in refusal(result.stderr)


@pytest.mark.parametrize(
    ("job", "folder"),
    [
        ("p2", "p2_faces"),
        ("clip", "clip_shapes"),
        ("controlnet", "ldm_shapes"),
        ("personalisation", "ldm_shapes"),
    ],
)
def test_quickstart_says_which_weights_are_not_there(job: str, folder: str, clone: Path) -> None:
    """Before anything is installed; `clone` has the weights of Problem 1 alone."""
    result = run_entry(clone / "scripts" / "quickstart.sh", job)
    assert result.returncode == 2
    assert (
        refusal(result.stderr)
        == f"checkpoints/{folder} is missing; it is part of the repository: restore it with git"
    )
    assert not (clone / ".venv").exists()


def test_quickstart_opens_the_demo(tmp_path: Path) -> None:
    """It is an entry of its own, which the jobs and `all` leave out."""
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    for name in ("quickstart.sh", "python.sh"):
        shutil.copy(ROOT / "scripts" / name, scripts)
    (scripts / "demo.sh").write_text('printf "%s\\n" "$@"\n')
    result = run_entry(scripts / "quickstart.sh", "demo", "--port", "7000")
    assert result.stdout.split() == ["--open-browser", "--port", "7000"]


DIGITS = ["p1_diffusion.inference", "p1_diffusion.evaluate", "p1_diffusion.study.figures"]
FACES = ["make_noise", "p2_ddim.inference", "p2_ddim.study.figures"]
SHAPES = ["make_clip_testset", "p3_clip.inference", "p3_clip.evaluate", "p3_clip.study.figures"]
CIRCLES = [
    "make_circles",
    "p3_controlnet.inference",
    "p3_controlnet.evaluate",
    "p3_controlnet.study.figures",
]
CONCEPTS = ["p3_clip.personalisation.study.sweeps", "p3_clip.personalisation.study.figures"]
EVERYTHING = ["p1_digits", "p2_faces", "clip_shapes", "ldm_shapes", "concepts_shapes"]


@pytest.mark.parametrize(
    ("job", "shipped", "runs", "left_out"),
    [
        ("p1", ["p1_digits", "p2_faces", "ldm_shapes"], [DIGITS], []),
        ("p2", ["p1_digits", "p2_faces"], [FACES], []),
        ("clip", ["p1_digits", "clip_shapes"], [SHAPES], []),
        ("controlnet", ["p1_digits", "p2_faces", "ldm_shapes"], [CIRCLES], []),
        ("personalisation", ["ldm_shapes", "concepts_shapes"], [CONCEPTS], []),
        ("all", EVERYTHING, [DIGITS, FACES, SHAPES, CIRCLES, CONCEPTS], []),
        (
            "all",
            ["p1_digits", "clip_shapes"],
            [DIGITS, SHAPES],
            ["p2", "controlnet", "personalisation"],
        ),
        ("all", ["p1_digits", "ldm_shapes"], [DIGITS, CIRCLES], ["p2", "clip", "personalisation"]),
    ],
)
def test_quickstart_runs_each_jobs_programs(
    job: str, shipped: list[str], runs: list[list[str]], left_out: list[str], tmp_path: Path
) -> None:
    """In a checkout whose environment is a stand-in that notes what it is called for, and makes the
    files that entries look for."""
    root, log = tmp_path / "clone", tmp_path / "log"
    shutil.copytree(
        ROOT / "scripts", root / "scripts", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("hw2_1.sh", "hw2_2.sh", "hw2_3.sh", "requirements.txt", "constraints.txt"):
        shutil.copy(ROOT / name, root / name)
    for name in shipped:
        (root / "checkpoints" / name).mkdir(parents=True)
    (root / ".venv" / "bin").mkdir(parents=True)
    stamp = (root / "requirements.txt").read_text() + (root / "constraints.txt").read_text()
    (root / ".venv" / "installed").write_text(stamp)
    python = root / ".venv" / "bin" / "python"
    data = tmp_path / "out" / "controlnet_data"
    made = (
        f'mkdir -p "{tmp_path}/out/p1/svhn" "{data}/source" "{data}/target"; touch'
        f' "{data}/prompt.json"'
    )
    python.write_text(f'#!/bin/sh\n{made}\necho "$@" >> "{log}"\n')
    python.chmod(0o755)
    result = run_entry(root / "scripts" / "quickstart.sh", job, tmp_path / "out", PYTHON="")
    assert result.returncode == 0, result.stderr
    calls, programs = log.read_text().splitlines(), [program for run in runs for program in run]
    assert len(calls) == len(programs)
    assert all(program in call for program, call in zip(programs, calls, strict=True))
    sentences = [
        line.split(" is left out")[0]
        for line in result.stdout.splitlines()
        if "is left out" in line
    ]
    assert sentences == left_out and result.stdout.count("Look at") == len(runs)


def test_the_programs_exit_code_is_the_entrys(clone: Path, tmp_path: Path) -> None:
    failing = tmp_path / "python"
    failing.write_text("#!/bin/sh\nexit 7\n")
    failing.chmod(0o755)
    for entry in ("hw2_1.sh", "scripts/inference_p1.sh", "scripts/train_p1.sh"):
        assert run_entry(clone / entry, "x", PYTHON=str(failing)).returncode == 7


def test_the_environment_in_the_checkout_comes_before_the_machines_python(
    clone: Path, echo: str
) -> None:
    own = clone / ".venv" / "bin" / "python"
    own.parent.mkdir(parents=True)
    try:
        shutil.copy(echo, own)
        result = run_entry(clone / "hw2_1.sh", "x", PYTHON="")
        assert result.stdout.splitlines()[:3] == ["-m", "p1_diffusion.inference", "--output-dir"]
    finally:
        shutil.rmtree(clone / ".venv")


def test_shipped_weights_are_verified(clone: Path) -> None:
    checkpoints = clone / "checkpoints"
    assert run_entry(clone / "scripts" / "checksums.sh").returncode == 0
    lines = (checkpoints / "SHA256SUMS").read_text().splitlines()
    assert [line.split(maxsplit=1)[1] for line in lines] == ["p1_digits/model.safetensors"]
    result = run_entry(clone / "hw2_download_ckpt.sh")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "1 shipped weight files are complete.\n"

    weights = checkpoints / "p1_digits" / "model.safetensors"
    whole = weights.read_bytes()
    try:
        for damage in (lambda: weights.write_bytes(whole[:-1] + b"?"), weights.unlink):
            damage()
            result = run_entry(clone / "hw2_download_ckpt.sh")
            assert result.returncode == 2
            assert (
                "error: a shipped weight file is missing or damaged: clone the repository again"
                in result.stderr
            )
    finally:
        weights.write_bytes(whole)
    assert run_entry(clone / "hw2_download_ckpt.sh").returncode == 0


def test_a_controlnet_of_ones_own_is_downloaded(clone: Path, tmp_path: Path) -> None:
    assert run_entry(clone / "scripts" / "checksums.sh").returncode == 0
    entry, target = clone / "hw2_download_ckpt.sh", clone / "checkpoints" / "controlnet_sd14"
    for name, folder in (("good.zip", ""), ("bad.zip", "best/")):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr(f"{folder}config.json", "{}")
            archive.writestr(f"{folder}diffusion_pytorch_model.safetensors", "weights")
    before = contents(clone / "checkpoints")
    for name, said in (("bad.zip", "in no folder"), ("none.zip", "curl")):
        result = run_entry(entry, CONTROLNET_URL=f"file://{tmp_path}/{name}")
        assert result.returncode != 0 and said in result.stderr
        assert contents(clone / "checkpoints") == before
    try:
        result = run_entry(entry, CONTROLNET_URL=f"file://{tmp_path}/good.zip")
        assert result.returncode == 0, result.stderr
        assert "checkpoints/controlnet_sd14 is downloaded." in result.stdout
        assert contents(target)["config.json"] == b"{}"
        again = run_entry(entry, CONTROLNET_URL="file:///none")  # it is there: nothing is fetched
        assert again.returncode == 0
    finally:
        shutil.rmtree(target, ignore_errors=True)


def test_this_checkouts_weights_are_complete() -> None:
    if not (ROOT / "checkpoints" / "SHA256SUMS").exists():
        pytest.skip("no weights are shipped yet")
    result = run_entry(ROOT / "hw2_download_ckpt.sh")
    assert result.returncode == 0, result.stderr


def test_a_python_without_the_packages_is_told_what_to_install(clone: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bin" / "python3"
    bare.parent.mkdir()
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')  # without site-packages
    bare.chmod(0o755)
    changes = {"PYTHON": "", "PATH": f"{bare.parent}:{os.environ['PATH']}"}
    result = run_entry(clone / "hw2_1.sh", tmp_path / "out", **changes)
    assert result.returncode == 2 and not (tmp_path / "out").exists()
    assert (
        result.stderr.startswith("error: python3 lacks the packages")
        and result.stderr.count("\n") == 1
    )


def test_training_for_a_time_cools_down_from_where_it_came_to(clone: Path, tmp_path: Path) -> None:
    """A stand-in for Python: training without end goes on until it is told to stop, and the state
    says step 40 of 50."""
    fake = tmp_path / "python"
    fake.write_text(
        '#!/bin/sh\ncase "$1" in -c) echo 0.2 ;; -) echo ${STEPS:-50} ;; -m) echo "$@"; '
        'case "$*" in *"--steps 100000000"*) exec sleep 30 ;; esac ;; esac\n'
    )
    fake.chmod(0o755)
    (tmp_path / "runs" / "p1_digits").mkdir(parents=True)
    script, runs = clone / "scripts" / "train_for.sh", str(tmp_path / "runs")
    state = tmp_path / "runs" / "p1_digits" / "state.safetensors"
    for prepare in (lambda: None, state.touch):
        prepare()
        early = run_entry(script, "p1", "4", PYTHON=str(fake), RUNS_DIR=runs, STEPS="0")
        assert early.returncode == 2
        assert early.stderr == "error: 4 minutes ended before the first step: give more\n"
    result = run_entry(script, "p1", "4", "--batch-size", "8", PYTHON=str(fake), RUNS_DIR=runs)
    assert result.returncode == 0, result.stderr
    first, second = result.stdout.splitlines()
    common = f"--run-dir {runs}/p1_digits --lr-schedule constant --batch-size 8"
    assert first.endswith(f"{common} --steps 100000000") and second.endswith(f"{common} --steps 50")
    # Run again it goes on cooling down.
    again = run_entry(script, "p1", "4", "--batch-size", "8", PYTHON=str(fake), RUNS_DIR=runs)
    assert again.stdout.splitlines() == [second]
    for wrong in ((), ("p1",), ("p9", "4"), ("p1", "soon")):
        result = run_entry(script, *wrong, PYTHON=str(fake))
        assert result.returncode == 2 and result.stderr.startswith("usage: scripts/train_for.sh")


# ----------------------------------------------------------------------------
# Help.

ENTRIES = [
    path
    for path in sorted([*ROOT.glob("hw2_*.sh"), *ROOT.glob("scripts/*.sh")])
    if path.name not in ("python.sh", "environment.sh")  # sourced by the others
]


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda path: path.name)
@pytest.mark.parametrize("arguments", [["--help"], ["OUT", "IN", "-h"]])
def test_every_entry_explains_itself_and_starts_nothing(
    entry: Path, arguments: list[str], echo: str, tmp_path: Path
) -> None:
    (tmp_path / "work").mkdir()
    result = run_entry(entry, *arguments, PYTHON=echo, cwd=str(tmp_path / "work"))
    first = entry.read_text().splitlines()[1].removeprefix("# ")
    assert result.returncode == 0 and result.stderr == ""
    assert result.stdout.startswith(first)
    given = result.stdout.partition("\n\n-m\n")[2].splitlines()  # what Python was called with
    assert (
        not given or given[-1] == "--help" and given[0].split(".")[0] in (*ROOT_PACKAGES, "scripts")
    )
    assert "-m" not in given and list((tmp_path / "work").iterdir()) == []


ROOT_PACKAGES = ("p1_diffusion", "p2_ddim", "p3_clip", "p3_controlnet")


def test_train_ldm_passes_flags_to_all_three_trainings(echo: str) -> None:
    flags = ["--steps", "4", "--fill50k", "a folder"]
    result = run_entry(ROOT / "scripts" / "train_ldm.sh", *flags, PYTHON=echo, RUNS_DIR="runs")
    text, autoencoder, unet = result.stdout.split("-m\n")[1:]
    assert text.splitlines() == [
        "p3_controlnet.base.train_text",
        *["--run-dir", "runs/ldm_text", "--steps", "4"],
    ]
    assert autoencoder.splitlines()[3:] == unet.splitlines()[7:] == flags


@pytest.mark.parametrize("code", [0, 1, 2, 70])
def test_grade_ends_with_a_verdict(code: int, tmp_path: Path) -> None:
    """The programs print the verdict themselves, unless they end by a signal or a defect."""
    stand_in = tmp_path / "python"
    stand_in.write_text(f"#!/bin/sh\necho 'a grade'\nexit {code}\n")
    stand_in.chmod(0o755)
    (tmp_path / "out" / "svhn").mkdir(parents=True)
    result = run_entry(ROOT / "scripts" / "grade.sh", tmp_path / "out", PYTHON=str(stand_in))
    assert result.returncode == code
    assert result.stdout.splitlines()[-1] == (
        "a grade"
        if code <= 2
        else f"FAIL: nothing is graded: the program ended with exit code {code}"
    )


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["{}"], "{} lacks 500 of the 500 images"),
        (["{}", "--no-such-flag"], "the flags are wrong, as said above"),
        (["{}/svhn", "{}/svhn"], "{}/svhn holds no image"),
        (["{}/svhn", "{}/a.json", "{}/svhn"], "{}/a.json, line 1 is not valid JSON: it is empty"),
        (["{}/svhn", "{}/a.json", "{}/svhn", "{}/svhn"], "{}/a.json is empty"),
        (["{}/svhn", "{}/b.json", "{}/svhn"], "the file {}/b.json does not exist"),
    ],
)
def test_the_verdict_says_why_nothing_is_graded(
    arguments: list[str], reason: str, tmp_path: Path
) -> None:
    (tmp_path / "svhn").mkdir()
    (tmp_path / "a.json").write_text("")
    given = [argument.format(tmp_path) for argument in arguments]
    result = run_entry(ROOT / "scripts" / "grade.sh", *given)
    last = result.stdout.splitlines()[-1]
    assert result.returncode == 2
    assert last.startswith("FAIL: nothing is graded: ") and reason.format(tmp_path) in last
