"""The benchmark of ControlNet's training at a toy's size: every recipe trains, and the table is
complete."""

import subprocess
from pathlib import Path

import pytest
import torch
from tiny import exit_code, refused

from common.files import read_json, write_json
from scripts import benchmark_controlnet as benchmark


@pytest.mark.parametrize(
    "name", ["diffusers", "this project", "base not frozen", "with moving average"]
)
def test_a_step_trains_the_control_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimiser holds as many numbers as diffusers' ControlNet of the base has, and all of them
    move but the base."""
    from diffusers import ControlNetModel

    made = []

    class Spy(torch.optim.AdamW):
        def __init__(self, parameters: object, **options: object) -> None:
            made.append(list(parameters))
            super().__init__(made[-1], **(options | {"lr": 0.1}))

    monkeypatch.setattr(benchmark.torch.optim, "AdamW", Spy)
    torch.manual_seed(0)
    networks, recipe = benchmark.build("tiny"), benchmark.RECIPES[name]
    inputs = benchmark.draw_inputs(networks, 2, 64)
    before = [value.clone() for value in networks.unet.state_dict().values()]
    make = benchmark.diffusers_step if recipe.diffusers else benchmark.own_step
    step = make(networks, inputs, recipe, torch.device("cpu"))
    start = [value.detach().clone() for value in made[0]]
    for _ in range(3):  # the zero convolutions hold the gradient back for two steps
        step()
    assert all(
        torch.equal(a, b) for a, b in zip(before, networks.unet.state_dict().values(), strict=True)
    )
    assert not any(torch.equal(a, b) for a, b in zip(start, made[0], strict=True))
    theirs = ControlNetModel.from_unet(
        networks.unet, conditioning_embedding_out_channels=networks.hint_channels
    )
    assert sum(value.numel() for value in made[0]) == sum(
        value.numel() for value in theirs.parameters()
    )


def test_the_table_has_a_row_for_each_recipe_and_keeps_other_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The measuring itself stays in this process here."""
    turns, found = [], {}

    def here(config: object, name: str) -> dict:
        turns.append(name)
        if name not in found:
            found[name] = benchmark.measure(config, benchmark.RECIPES[name])
        return found[name]

    monkeypatch.setattr(benchmark, "in_own_process", here)
    write_json(tmp_path / "speed.json", {"sd14": {"rows": []}})
    flags = ("--size", "tiny", "--rounds", 2, "--steps", 1, "--result", tmp_path / "speed.json")
    assert exit_code(benchmark.main, benchmark.Config, *flags) == 0
    result = read_json(tmp_path / "speed.json")
    assert result["sd14"] == {"rows": []} and turns == [*benchmark.RECIPES] * 2  # they take turns
    rows = {row["recipe"]: row for row in result["tiny"]["rows"]}
    assert list(rows) == list(benchmark.RECIPES)
    assert rows["diffusers"]["speed"] == rows["diffusers"]["memory"] == 1.0
    assert all(row["peak_gib"] > 0.05 and row["images_per_second"] > 0.0 for row in rows.values())


def test_a_recipe_is_measured_in_its_own_process(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = benchmark.Config(size="tiny", steps=2)
    found = benchmark.in_own_process(config, "this project")
    assert len(found["seconds"]) == 2 and 0.1 < found["peak_gib"] < 4.0
    assert "--recipe must be one of diffusers, this project" in refused(
        capsys, benchmark.main, benchmark.Config, "--recipe", "none"
    )
    failed = subprocess.CompletedProcess([], 1, "", "Traceback\nMemoryError: too large\n")
    monkeypatch.setattr(benchmark.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(
        benchmark.InputError,
        match="recipe 'diffusers' could not be measured: MemoryError: too large",
    ):
        benchmark.in_own_process(config, "diffusers")
    assert "at least 1" in refused(capsys, benchmark.main, benchmark.Config, "--steps", 0)
