"""From images to inputs in training, predictions and exported programs, against Pillow and NumPy."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import metareg
from metareg import TaskSpec, UsageError
from metareg.runs.options import assemble
from metareg_image import CUB, Glyphs, ImageFolder, TorchvisionModel

SIZE, SPLITS = 12, {"train": 3, "validation": 2, "test": 2}
IMAGENET = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write classes of random images, wide and high, brighter in the test than in training, in folders of the splits."""
    root, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, classes in SPLITS.items():
        for number in range(classes):
            folder = root / split / f"{split}-kind{number}"
            folder.mkdir(parents=True)
            for image in range(4):
                height, width = random.integers(SIZE, 40, 2)
                low = 100 if split == "test" else 0
                pixels = random.integers(low, 200 + 50 * (split == "test"), (height, width, 3), dtype=np.uint8)
                pixels[..., 1] //= 2
                Image.fromarray(pixels).save(folder / f"{image}.png")
    return root


def create_task(photos: Path, **options: Any) -> ImageFolder:
    return ImageFolder(ImageFolder.Config(data=str(photos), size=SIZE, ways=2, query=2, eval_query=2, **options))


def prepare(path: Path, crop: bool, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """Return the input ``[3, size, size]`` of a file."""
    image = Image.open(path).convert("RGB")
    if crop:
        width, height = image.size
        scale = SIZE / min(width, height)
        wide, high = round(scale * width), round(scale * height)
        image = image.resize((wide, high), Image.Resampling.BILINEAR)
        pixels = np.asarray(image)[(high - SIZE) // 2 :, (wide - SIZE) // 2 :][:SIZE, :SIZE]
    else:
        pixels = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR))
    return np.moveaxis((pixels / 255 - mean) / std, -1, 0)


def list_files(photos: Path, split: str) -> list[Path]:
    return sorted((photos / split).glob("*/*.png"))


def measure(photos: Path, split: str, crop: bool) -> tuple[np.ndarray, np.ndarray]:
    images = np.stack([prepare(path, crop, np.zeros(3), np.ones(3)) for path in list_files(photos, split)])
    return images.mean((0, 2, 3)), images.std((0, 2, 3))


@pytest.mark.parametrize("crop", [False, True])
@pytest.mark.parametrize("normalisation", ["none", "imagenet", "train", "numbers"])
def test_inputs_are_those_of_pillow_and_numpy(photos: Path, crop: bool, normalisation: str) -> None:
    options: dict[str, Any] = {"resize": "crop"} if crop else {}
    if normalisation == "numbers":
        options |= {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
        mean, std = np.array(options["mean"]), np.array(options["std"])
    else:
        options["normalisation"] = normalisation
        known = {"none": (np.zeros(3), np.ones(3)), "imagenet": tuple(IMAGENET)}
        mean, std = known.get(normalisation) or measure(photos, "train", crop)
    task = create_task(photos, **options)
    for split in SPLITS:
        files = list_files(photos, split)
        expected = np.stack([prepare(path, crop, mean, std) for path in files])
        episodes = task.episodes(split, range(3), 0)
        for image in torch.cat([episodes.support_x, episodes.query_x], 1).flatten(0, 1).numpy():
            assert np.abs(expected - image).max((1, 2, 3)).min() < 1e-4
        assert np.allclose(task.read_image(files[0]).numpy(), expected[0], atol=1e-4)
    assert (normalisation != "none") == ("mean" in task.image_preparation)
    assert crop == ("cropped" in task.image_preparation)


def test_the_numbers_of_the_training_classes_are_kept(photos: Path, tmp_path: Path) -> None:
    config = create_task(photos, normalisation="train").stored_config
    mean, std = measure(photos, "train", crop=False)
    assert np.allclose([config.mean, config.std], [mean, std], atol=1e-6)
    assert not np.allclose(config.mean, measure(photos, "test", crop=False)[0], atol=0.05)
    elsewhere = ImageFolder(config.model_copy(update={"data": str(tmp_path)}))
    path = list_files(photos, "test")[0]
    assert elsewhere.read_image(path).equal(create_task(photos, normalisation="train").read_image(path))


def test_a_prediction_is_the_exported_programs(photos: Path, tmp_path: Path) -> None:
    """Inputs prepared by the description in the program's file give the same predictions as predict, which reads images."""
    run = metareg.train(
        "maml", task="image-folder", out=tmp_path / "run", data=str(photos), size=16, ways=2, query=2, eval_query=2, steps=2,
        meta_batch=1, eval_tasks=2, test_tasks=2, test_inner_steps=[1], strategy="serial", resize="crop",
        normalisation="train", **{"model.width": 4},
    )  # fmt: skip
    assert run.config.task.config["mean"] == pytest.approx(measure_at(photos, 16), abs=1e-6)
    support, query = photos / "test", photos / "validation" / "validation-kind0"
    answer = list(csv.reader(io.StringIO(run.predict(support, query))))[1:]
    run.export(tmp_path / "program.pt2", support=support)
    facts = {"metareg.json": ""}
    program = torch.export.load(tmp_path / "program.pt2", extra_files=facts).module()
    image = json.loads(facts["metareg.json"])["image"]
    assert "cropped in the middle" in image["prepared"]
    black, white = (np.array(image[name])[:, None, None] for name in ("black", "white"))
    inputs = [black + (white - black) * crop_to(path, image["height"]) for path in sorted(query.iterdir())]
    with torch.no_grad():
        chances = program(torch.tensor(np.stack(inputs), dtype=torch.float32)).softmax(-1).amax(-1)
    assert [float(line[-1]) for line in answer] == pytest.approx(chances.tolist(), abs=1e-4)
    again = metareg.Run.load(run.path)
    assert run.predict(support, query) == again.predict(support, query)


def crop_to(path: Path, size: int) -> np.ndarray:
    image = Image.open(path).convert("RGB")
    scale = size / min(image.size)
    image = image.resize([round(scale * side) for side in image.size], Image.Resampling.BILINEAR)
    left, top = ((side - size) // 2 for side in image.size)
    return np.moveaxis(np.asarray(image)[top : top + size, left : left + size] / 255, -1, 0)


def measure_at(photos: Path, size: int) -> np.ndarray:
    return np.stack([crop_to(path, size) for path in list_files(photos, "train")]).mean((0, 2, 3))


def test_pretrained_weights_recommend_their_normalisation(tmp_path: Path) -> None:
    base = {"task": "image-folder", "model": "torchvision"}
    assert assemble(base, {"data": str(tmp_path)}).config.task.config["normalisation"] == "none"
    weights = {"weights": str(tmp_path / "some.pth"), "data": str(tmp_path)}
    assert assemble(base, weights).config.task.config["normalisation"] == "imagenet"
    assert assemble(base, weights | {"normalisation": "none"}).config.task.config["normalisation"] == "none"
    assert TorchvisionModel.example_spec == TaskSpec((3, 32, 32), (5,))


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (ImageFolder, {"mean": [0.5, 0.5, 0.5]}, ["mean and std", "missing"]),
        (ImageFolder, {"mean": [0.5], "std": [0.5]}, ["each channel", "3"]),
        (ImageFolder, {"mean": [0.5] * 3, "std": [0.5, 0, 0.5]}, ["std", "greater than 0"]),
        (ImageFolder, {"normalisation": "imagenett"}, ["imagenett", "'imagenet'"]),
        (Glyphs, {"normalisation": "imagenet"}, ["channels = 3"]),
        (ImageFolder, {"normalisation": "train", "train_classes": 2}, ["train_classes"]),
        (CUB, {"resize": "crop"}, ["resize", "has its own crop"]),
    ],
)
def test_what_cannot_be_is_refused(kind: type, options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        metareg.registry.plugins.resolve("tasks", kind, options)
    assert [word for word in words if word not in str(caught.value)] == []
