"""Presets on the command line: their values, what changes them, and what --help says of them."""

import dataclasses
from pathlib import Path
from typing import Annotated, ClassVar

import pytest
import tyro

import p1_diffusion.train
import p2_ddim.train
import p3_clip.train
import p3_controlnet.base.train_autoencoder
import p3_controlnet.base.train_text
import p3_controlnet.base.train_unet
import p3_controlnet.train
from common import cli
from common.cli import Preset
from p3_clip.personalisation.config import CustomDiffusion, TextualInversion


@dataclasses.dataclass(frozen=True)
class Inner:
    """Settings inside."""

    steps: int = 100
    """Steps."""
    lr: float = 0.1
    """Rate."""


@dataclasses.dataclass(frozen=True)
class Outer:
    """Does nothing."""

    out: Path
    """Folder."""
    count: int = 5
    """Count, of which
    `two lines` are in the source."""
    inner: Annotated[Inner, tyro.conf.arg(name="")] = Inner()
    PRESETS: ClassVar = {
        "smoke": Preset("a try that takes seconds", {"count": 1, "inner": Inner(steps=2)}),
        "large": Preset("the real thing", {"count": 500}),
    }


def parsed(*arguments: str) -> Outer:
    seen: list[Outer] = []
    cli.run(seen.append, Outer, arguments)
    return seen[0]


def test_a_preset_sets_what_it_names_and_flags_change_that() -> None:
    assert parsed("--out", "x") == Outer(Path("x"))
    assert parsed("--preset", "smoke", "--out", "x") == Outer(Path("x"), 1, Inner(2))
    assert parsed("--out", "x", "--lr", "3", "--preset=smoke") == Outer(Path("x"), 1, Inner(2, 3.0))
    assert parsed("--preset", "large", "--out", "x", "--count", "7") == Outer(Path("x"), 7)


def test_help_lists_presets_and_shows_the_chosen_ones_values(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for arguments, shown in (((), "(default: 100)"), (("--preset", "smoke"), "(default: 2)")):
        with pytest.raises(SystemExit) as ended:
            cli.run(print, Outer, [*arguments, "--help"])
        said = capsys.readouterr().out
        assert (
            ended.value.code == 0 and "- smoke: a try that takes seconds" in said and shown in said
        )


def test_help_has_no_line_breaks_of_the_source(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    with pytest.raises(SystemExit):
        cli.run(print, Outer, ["--help"])
    assert "Count, of which `two lines` are in the source. (default: 5)" in capsys.readouterr().out
    text = """First line
    second line.

    - an item
      goes on
    - another

        an example
    """
    joined = "First line second line.\n\n- an item goes on\n- another\n\n    an example"
    assert cli._joined_lines(text) == joined


@pytest.mark.parametrize("arguments", [("--preset",), ("--preset", "huge"), ("--preset=",)])
def test_an_unknown_preset_is_refused_with_the_known_names(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.run(print, Outer, arguments)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "--preset must be one of smoke, large, not" in said


def test_a_preset_does_not_stand_in_for_what_is_required() -> None:
    with pytest.raises(SystemExit) as ended:
        cli.run(print, Outer, ["--preset", "smoke"])
    assert ended.value.code == 2


TRAINERS = (
    p1_diffusion.train.Config,
    p2_ddim.train.Config,
    p3_controlnet.base.train_autoencoder.Config,
    p3_controlnet.base.train_text.Config,
    p3_controlnet.base.train_unet.Config,
    p3_controlnet.train.Config,
    p3_clip.train.Config,
    TextualInversion,
    CustomDiffusion,
)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_every_trainers_presets_fit_its_settings(trainer: type) -> None:
    known = {field.name for field in dataclasses.fields(trainer)}
    assert {"small", "smoke"} <= set(trainer.PRESETS)
    for name, preset in trainer.PRESETS.items():
        assert set(preset.settings) <= known and preset.what
        seen: list[object] = []
        needed = [
            part
            for field in dataclasses.fields(trainer)
            if field.default is dataclasses.MISSING  # a required flag
            for part in (f"--{field.name.replace('_', '-')}", "x")
        ]
        cli.run(seen.append, trainer, ["--preset", name, *needed])
        assert all(getattr(seen[0], key) == value for key, value in preset.settings.items())
