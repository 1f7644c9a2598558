"""Sampling digits: the grader's names and counts, the same bytes however the work is split, and
clean folders."""

import dataclasses
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import contents, exit_code, refused

from common.errors import InputError
from common.images import to_uint8
from p1_diffusion.inference import Config, main, pick_classes, prepare_output
from p1_diffusion.model import ContextUNet
from p1_diffusion.sampling import ImageKey, SamplingConfig, sample_digits, translate_guide_w

QUICK = SamplingConfig(steps=2)
NAMES_2025 = {f"mnistm/{d}_{n:03d}.png" for d in (0, 2, 4, 6, 8) for n in range(1, 51)} | {
    f"svhn/{d}_{n:03d}.png" for d in (1, 3, 5, 7, 9) for n in range(1, 51)
}
NAMES_2024 = {
    f"{dataset}/{d}_{n:03d}.png"
    for dataset in ("mnistm", "svhn")
    for d in range(10)
    for n in range(1, 51)
}


@pytest.fixture(scope="module")
def network(digit_checkpoint: Path) -> ContextUNet:
    return ContextUNet.load(digit_checkpoint)


def run(out: Path, checkpoint: Path, *flags: str) -> None:
    arguments = (
        "--output-dir",
        out,
        "--checkpoint",
        checkpoint,
        "--device",
        "cpu",
        "--steps",
        1,
        *flags,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "os.fsync", lambda _: None
        )  # hundreds of files; a crash is not the point here
        assert exit_code(main, Config, *arguments) == 0


@pytest.fixture(scope="module")
def out_2025(digit_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 2025 set."""
    out = tmp_path_factory.mktemp("out") / "not there yet"
    run(out, digit_checkpoint)
    return out


def draw(
    network: ContextUNet, keys: list[ImageKey], config: SamplingConfig = QUICK, **options: object
) -> torch.Tensor:
    return torch.cat(
        [
            images
            for _, images in sample_digits(network, keys, config, show_progress=False, **options)
        ]
    )


# ----------------------------------------------------------------------------
# What the grader finds.


def test_2025_is_500_images_and_nothing_else(out_2025: Path) -> None:
    assert contents(out_2025).keys() == NAMES_2025
    assert len(NAMES_2025) == 500
    assert sorted(path.name for path in out_2025.iterdir()) == ["mnistm", "svhn"]
    for name in NAMES_2025:
        with Image.open(out_2025 / name) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "RGB", (28, 28))


def test_2024_is_1000_images_with_the_2025_ones_among_them(
    out_2025: Path, digit_checkpoint: Path, tmp_path: Path
) -> None:
    run(tmp_path, digit_checkpoint, "--edition", "2024")
    files = contents(tmp_path)
    assert files.keys() == NAMES_2024
    assert len(NAMES_2024) == 1000
    assert len(set(files.values())) == 1000  # no image twice
    # The 2025 set again, in the same folder: the other edition's files go, and every byte is as
    # before.
    run(tmp_path, digit_checkpoint)
    assert contents(tmp_path) == contents(out_2025)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mnistm", "svhn"]


def test_each_process_takes_its_share_of_the_chunks(network: ContextUNet) -> None:
    """With 5 chunks, the second of 2 processes computes chunks 1 and 3; together they cover all
    once."""
    keys = [("svhn", 3, n) for n in range(1, 10)]
    config = dataclasses.replace(QUICK, chunk_size=2)
    shares = [
        [
            key
            for part, _ in sample_digits(
                network, keys, config, share=(rank, 2), show_progress=False
            )
            for key in part
        ]
        for rank in (0, 1)
    ]
    assert shares[1] == [keys[2], keys[3], keys[6], keys[7]]
    assert sorted(shares[0] + shares[1]) == keys


# ----------------------------------------------------------------------------
# An image depends on its own key and the settings alone.


@pytest.mark.parametrize(
    "config", [QUICK, SamplingConfig(steps=3, sampler="ddim", eta=1.0)], ids=["dpmpp", "eta 1"]
)
def test_an_image_does_not_depend_on_the_jobs_beside_it(
    network: ContextUNet, config: SamplingConfig
) -> None:
    config = dataclasses.replace(config, chunk_size=4)
    keys = [
        ("mnistm", 0, 1),
        ("svhn", 7, 50),
        ("mnistm", 9, 3),
        ("svhn", 0, 1),
        ("svhn", 7, 2),
        ("mnistm", 4, 4),
    ]
    images = draw(network, keys, config)
    order = [4, 2, 0, 5, 1, 3]
    assert torch.equal(draw(network, [keys[i] for i in order], config), images[order])
    assert torch.equal(draw(network, keys[3:], config), images[3:])  # the last chunk padded


def test_chunk_sizes_agree_to_one_grey_level(network: ContextUNet) -> None:
    keys = [("svhn", 3, n) for n in range(1, 8)]
    images = draw(network, keys, dataclasses.replace(QUICK, steps=8, chunk_size=7))
    assert images.float().std() > 20.0
    for size in (1, 3, 20):
        other = draw(network, keys, dataclasses.replace(QUICK, steps=8, chunk_size=size))
        assert int((images.int() - other.int()).abs().max()) <= 1


def test_seed_digit_dataset_and_number_each_give_another_image(network: ContextUNet) -> None:
    keys = [("mnistm", 0, 1), ("mnistm", 0, 2), ("mnistm", 1, 1), ("svhn", 0, 1)]
    images = [*draw(network, keys), *draw(network, keys, dataclasses.replace(QUICK, seed=1))]
    for i, a in enumerate(images):
        for b in images[:i]:
            assert (a.int() - b.int()).abs().float().mean() > 5.0


@pytest.mark.parametrize(
    ("sampler", "steps", "calls"),
    [("dpmpp_2m", 4, 4), ("ddim", 5, 5), ("ddpm", 3, 3), ("heun", 3, 5)],
)
def test_a_guided_pair_is_one_network_call(
    network: ContextUNet, sampler: str, steps: int, calls: int
) -> None:
    batches = []
    hook = network.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    try:
        always = SamplingConfig(
            sampler=sampler, steps=steps, chunk_size=2, guidance_interval=(0, 999)
        )
        draw(network, [("svhn", 3, 1)], always)
        assert batches == [4] * calls  # both halves of a padded chunk of 2
        batches.clear()
        draw(network, [("svhn", 3, 1)], dataclasses.replace(always, guidance_scale=1.0))
        assert batches == [2] * calls
    finally:
        hook.remove()


def test_the_callback_sees_every_step(network: ContextUNet) -> None:
    seen = []
    images = draw(
        network,
        [("svhn", 3, 1)],
        dataclasses.replace(QUICK, steps=4, spacing="trailing", chunk_size=1),
        callback=lambda i, t, x_t, x0: seen.append((i, t, x_t.shape, x0)),
    )
    assert [(i, t, shape) for i, t, shape, _ in seen] == [
        (i, t, (1, 3, 28, 28)) for i, t in enumerate((999, 749, 499, 249))
    ]
    assert torch.equal(
        to_uint8(seen[-1][3]), images
    )  # the last step returns the predicted clean image


# ----------------------------------------------------------------------------
# Guidance by two names.


def test_guide_w_is_the_guidance_scale_less_one() -> None:
    for spelling in (
        ["--guide-w", "2.5"],
        ["--guide_w", "2.5"],
        ["--guide-w=2.5"],
        ["--guide_w=2.5"],
    ):
        arguments = ["--steps", "3", *spelling, "--seed", "1"]
        assert translate_guide_w(arguments) == [
            "--steps",
            "3",
            "--guidance-scale",
            "3.5",
            "--seed",
            "1",
        ]
    assert translate_guide_w(["--guide-w", "-1"]) == ["--guidance-scale", "0.0"]
    assert translate_guide_w(["--guidance-scale", "2"]) == ["--guidance-scale", "2"]


def test_guidance_acts_inside_its_interval_alone(network: ContextUNet) -> None:
    keys = [("svhn", 3, 1)]
    equal = dataclasses.replace(QUICK, steps=4, spacing="trailing", chunk_size=1)
    strong = dataclasses.replace(equal, guidance_scale=6.0, guidance_interval=(0, 999))
    nowhere = dataclasses.replace(strong, guidance_interval=(0, 10))  # below the last t, 249
    everywhere = dataclasses.replace(strong, guidance_interval=(249, 999))
    assert torch.equal(
        draw(network, keys, nowhere),
        draw(network, keys, dataclasses.replace(strong, guidance_scale=1.0)),
    )
    assert torch.equal(draw(network, keys, everywhere), draw(network, keys, strong))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"guidance_scale": float("nan")}, "--guidance-scale must be a finite number"),
        ({"guidance_scale": float("inf")}, "--guidance-scale must be a finite number"),
        ({"guidance_interval": (2, 1)}, "--guidance-interval must give"),
        ({"steps": 0}, "--steps must be between 1 and 1000, not 0"),
        ({"steps": 1001}, "--steps must be between 1 and 1000, not 1001"),
        ({"chunk_size": 0}, "--chunk-size must be between 1 and 4096"),
        ({"eta": 1.5}, "--eta must be between 0 and 1, not 1.5"),
        ({"guidance_rescale": float("nan")}, "--guidance-rescale must be a finite number, not nan"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(values: dict[str, float], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        SamplingConfig(**values).check()


# ----------------------------------------------------------------------------
# The output folder.


def test_only_the_other_editions_files_are_cleared(tmp_path: Path) -> None:
    for name in sorted(NAMES_2024)[::97]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"old")
    (tmp_path / "notes.txt").write_text(
        "mine"
    )  # beside the two folders, where the grader does not look
    before = contents(tmp_path).keys()
    prepare_output(tmp_path, NAMES_2025)
    after = contents(tmp_path).keys()
    assert after == (before & NAMES_2025) | {"notes.txt"}
    assert before - after


@pytest.mark.parametrize(
    "stranger",
    ["mnistm/notes.txt", "svhn/.hidden", "svhn/3_051.png", "mnistm/0_1.png", "svhn/10_001.png"],
)
def test_a_strangers_file_is_refused_by_name_and_everything_stays(
    stranger: str, digit_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (stranger, "mnistm/1_001.png", "svhn/1_001.png", "mnistm/0_001.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"old")
    before = contents(tmp_path)
    sentence = refused(
        capsys,
        main,
        Config,
        "--output-dir",
        tmp_path,
        "--checkpoint",
        digit_checkpoint,
        "--steps",
        2,
        "--device",
        "cpu",
    )
    assert str(tmp_path / stranger) in sentence
    assert contents(tmp_path) == before


def test_a_folder_under_an_images_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "svhn" / "1_001.png").mkdir(parents=True)
    with pytest.raises(InputError, match=r"svhn/1_001\.png was not written by this program"):
        prepare_output(tmp_path, NAMES_2025)


def test_a_third_dataset_breaks_no_checkpoint(
    digit_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shapes of a network come from its configuration; a dataset that it never saw is named."""
    before = draw(ContextUNet.load(digit_checkpoint), [("svhn", 3, 1)])
    monkeypatch.setattr("common.data.digits.DATASETS", ("mnistm", "svhn", "usps"))
    monkeypatch.setattr("p1_diffusion.sampling.DATASETS", ("mnistm", "svhn", "usps"))
    network = ContextUNet.load(digit_checkpoint)
    assert torch.equal(draw(network, [("svhn", 3, 1)]), before)
    with pytest.raises(InputError, match="was not trained on usps, only on mnistm, svhn"):
        draw(network, [("usps", 3, 1)])
    shapes = {name: value.shape for name, value in network.state_dict().items()}
    three = ContextUNet(dataclasses.replace(network.config, datasets=3)).state_dict()
    assert {name for name in shapes if three[name].shape != shapes[name]} <= {
        "dataset.weight",
        "class_embedding.weight",
    }


def test_a_class_given_twice_counts_once() -> None:
    assert pick_classes("2025", ["svhn/7", "mnistm/0", "svhn/7"]) == [("svhn", 7), ("mnistm", 0)]
