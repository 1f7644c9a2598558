"""The benchmark of streamed data, on few small pictures."""

from pathlib import Path

from tiny import exit_code
from tiny_pairs import write_pairs

from common.files import read_json
from scripts import benchmark_streaming


def test_it_measures_memory_disk_and_waiting(tmp_path: Path) -> None:
    write_pairs(tmp_path / "training", 2)
    flags = ("--fill50k", tmp_path, "--pairs", 5, "--steps", 3, "--seconds", 0.01)
    result = tmp_path / "streaming.json"
    program = (benchmark_streaming.main, benchmark_streaming.Config)
    assert exit_code(*program, *flags, "--result", result) == 0
    measured = read_json(result)
    assert measured["distinct_captions"] == 5 and measured["hint_bytes"] == 512**2 / 8
    latents, contexts = 2 * 4 * 64 * 64, 2 * 77 * 768
    assert measured["disk_gb"] * 1e9 == 5 * (latents + 512**2 // 8 + 24) + 6 * contexts
    assert 0.0 < measured["waiting_fraction"] < 1.0
    assert measured["anonymous_gb"] > 0.0 and measured["anonymous_largest_gb"] > 0.0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["streaming.json", "training"]
