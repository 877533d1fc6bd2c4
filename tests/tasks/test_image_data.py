"""Sources of images: folders, torchvision, downloads; and the messages about problems."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from scipy.io import savemat

from downloads import serve
from metareg import MetaLearner, MetaregError, UsageError
from metareg.cli.app import run
from metareg.runs.training import configure
from metareg_image import (
    CIFARFS,
    CUB,
    FC100,
    SVHN,
    Aircraft,
    Cars,
    ImageFolder,
    MiniImageNet,
    Omniglot,
    OmniglotSmall,
    TieredImageNet,
    TrafficSign,
    VGGFlower,
    standard,
    vision,
)
from metareg_image.splits import read_splits


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("METAREG_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("METAREG_DATA", raising=False)
    return tmp_path / "cache"


def draw(path: Path, value: int = 0, size: tuple[int, int] = (9, 7)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 255 - value, 10)).save(path)


@pytest.fixture
def animals(tmp_path: Path) -> Path:
    """Write ten classes of six images, some of them in nested folders."""
    for number in range(10):
        folder = tmp_path / "animals" / ("wild" if number % 2 else "tame/at home") / f"kind{number}"
        for image in range(6):
            draw(folder / f"{image}.png", 20 * number + image)
    return tmp_path / "animals"


def folder_task(folder: Path, **options: Any) -> ImageFolder:
    return ImageFolder(ImageFolder.Config(data=str(folder), size=16, ways=2, query=2, eval_query=2, **options))


def split_of(task: ImageFolder) -> dict[str, list[str]]:
    return {split: list(index.names) for split, index in task.store.splits.items()}


# --------------------------------------------------------------------------------------------------------- image-folder


def test_images_are_prepared_as_programs_say(animals: Path) -> None:
    """The lines of docs/deployment.md that prepare images without metareg."""
    task = folder_task(animals)
    noise = np.random.default_rng(0).integers(256, size=(40, 61, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was rotated
    Image.fromarray(noise).save(animals.parent / "photo.jpg", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(animals.parent / "photo.jpg")).convert("RGB")
    pixels = np.array(upright.resize((16, 16), Image.Resampling.BILINEAR))
    assert torch.equal(task.read_image(animals.parent / "photo.jpg"), torch.from_numpy(pixels).permute(2, 0, 1) / 255)
    assert "BILINEAR" in task.image_preparation


def test_the_default_inner_step_is_not_far_too_long(tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    for number in range(5):
        (tmp_path / f"kind{number}").mkdir(parents=True)
        for image in range(2):
            pixels = noise.integers(256, size=(84, 84, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"kind{number}" / f"{image}.png")
    defaults = configure(task="image-folder", data=str(tmp_path))
    task = ImageFolder(ImageFolder.Config(data=str(tmp_path), query=1, ratios=[1, 0, 0]))
    learner = MetaLearner(
        "conv4", spec=task.spec, loss="cross_entropy", inner_steps=defaults.inner_steps, **defaults.algo.config
    )
    loss, _ = learner.meta_gradient(task.episodes("train", [0], 0))
    assert loss < 2 * math.log(5)  # twice that of chance


def test_nested_folders_and_a_seeded_split(animals: Path) -> None:
    split = split_of(folder_task(animals))
    assert [len(names) for names in split.values()] == [6, 2, 2]
    assert "tame/at home/kind4" in [*split["train"], *split["validation"], *split["test"]]
    assert split == split_of(folder_task(animals))
    assert split != split_of(folder_task(animals, split_seed=1))
    assert [len(names) for names in split_of(folder_task(animals, ratios=[1, 0, 1])).values()] == [5, 0, 5]
    batch = folder_task(animals).episodes("test", range(3), 0)
    assert batch.support_x.shape == (3, 2, 3, 16, 16)
    assert batch.support_x[0].is_contiguous(memory_format=torch.channels_last)
    reds = (batch.query_x[..., 0, 0] * 255).round()[:, :, 0].reshape(3, 2, 2)
    assert ((reds // 20)[..., 0] == (reds // 20)[..., 1]).all()  # images of a class have one label


@pytest.mark.parametrize("wrapping", ["", "my data"])
@pytest.mark.parametrize(
    "folders",
    [("train", "val", "test"), ("Train", "VALID", "Test"), ("training", "dev", "testing"), ("train", "", "test")],
)
def test_folders_that_are_a_split(
    folders: tuple[str, ...], wrapping: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "metareg")
    for folder in filter(None, folders):
        for kind in "ab":
            draw(tmp_path / "set" / wrapping / folder / f"{folder}-{kind}" / "1.jpg")
    parts = dict(zip(("train", "validation", "test"), folders, strict=True))
    task = folder_task(tmp_path / "set")
    expected = {part: [f"{folder}/{folder}-{kind}" for kind in "ab" if folder] for part, folder in parts.items()}
    assert split_of(task) == expected
    assert f"/{2 if folders[1] else 0}/2 classes" in caplog.text


@pytest.mark.parametrize(
    ("folders", "words"),
    [
        (["train/cat", "val/dog", "test/emu", "misc"], "also misc"),
        (["train/cat", "val/dog", "valid/fox", "test/emu"], "val and valid, which mean the same"),
        (["train/cat", "val/dog", "test"], "contains images itself"),
        (["train", "test"], "contains images itself"),
        (["train_set/cat", "test_set/dog"], "test_set and train_set, which look like a split"),
        (["train/cat", "train/dog", "val/emu", "test/Dog", "test/cat"], "has cat and dog in train and in test"),
        (["all/train/cat", "all/val/cat"], "--data .*/set/all/train;"),
    ],
)
def test_what_looks_like_a_split_and_is_none_is_refused(folders: list[str], words: str, tmp_path: Path) -> None:
    for folder in folders:
        draw(tmp_path / "set" / folder / "1.jpg")
    with pytest.raises(UsageError, match=words):
        folder_task(tmp_path / "set").episodes("train", [0], 0)


def test_a_class_may_be_called_test(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for folder in ("test", "control", "placebo", "placebo/sugar"):
        draw(tmp_path / "set" / folder / "1.jpg")
    (tmp_path / "set" / "placebo" / "notes.txt").write_text("none")
    names = {name for part in split_of(folder_task(tmp_path / "set")).values() for name in part}
    assert names == {"test", "control", "placebo", "placebo/sugar"}
    left_out, nested = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert "1 .txt" in left_out
    assert "placebo/sugar" in nested


@pytest.mark.skipif(os.name == "nt" or sys.platform == "darwin", reason="file names there are Unicode")
def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    for number in range(3):
        folder = os.fsencode(tmp_path / "set") + b"/caf\xe9%d" % number
        os.makedirs(folder)  # noqa: PTH103
        Image.new("RGB", (4, 4)).save(Path(os.fsdecode(folder + b"/\xff.png")))
    task = folder_task(tmp_path / "set")
    assert sum(len(names) for names in split_of(task).values()) == 3
    assert split_of(task) == split_of(folder_task(tmp_path / "set"))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("split.json", json.dumps({"train": ["wild/kind1"], "val": ["wild/kind3"], "test": ["wild/kind5"]})),
        ("split.yaml", "train: [wild/kind1]\nvalidation: [wild/kind3]\ntest: [wild/kind5]\n"),
        ("split.csv", "class,split\nwild/kind1,train\nwild/kind3,validation\nwild/kind5,test\n"),
    ],
)
def test_split_files(animals: Path, tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert split_of(folder_task(animals, split_file=str(tmp_path / name))) == {
        "train": ["wild/kind1"], "validation": ["wild/kind3"], "test": ["wild/kind5"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("s.json", '{"train": ["wild/kind99"]}', "no class .* named 'wild/kind99'; did you mean"),
        ("s.json", '{"trian": ["wild/kind1"]}', "no split .* named 'trian'; did you mean 'train'"),
        ("s.json", '{"train": ["wild/kind1"], "test": ["wild/kind1"]}', "into train and into test"),
        ("s.json", "{", "is not valid JSON"),
        ("s.yaml", "[train]", "must map train, validation and test"),
        ("s.yaml", "a: [", "is not valid YAML"),
        ("s.csv", "wild/kind1\n", "must have the columns 'class' and 'split'"),
    ],
)
def test_bad_split_files_are_one_sentence(animals: Path, tmp_path: Path, name: str, text: str, sentence: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=sentence):
        folder_task(animals, split_file=str(tmp_path / name)).episodes("train", [0], 0)
    with pytest.raises(UsageError, match="There is no file"):
        folder_task(animals, split_file=str(tmp_path / "no")).episodes("train", [0], 0)


def test_unreadable_images_are_named_and_nothing_is_kept(animals: Path, cache: Path) -> None:
    whole = (animals / "wild/kind1/1.png").read_bytes()
    (animals / "wild/kind1/1.png").write_bytes(whole[: len(whole) // 2])
    (animals / "wild/kind3/2.png").write_text("no image", encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        folder_task(animals).episodes("train", [0], 0)
    assert str(caught.value).startswith("2 images cannot be read: ")
    assert "wild/kind1/1.png (" in str(caught.value)
    assert "wild/kind3/2.png (it is not an image)" in str(caught.value)
    assert not list((cache / "images").iterdir())


def test_the_cache_is_used_until_the_images_change(animals: Path, cache: Path) -> None:
    before = folder_task(animals).episodes("train", [0], 0)
    (store,) = (cache / "images").iterdir()
    assert torch.equal(before.query_x, folder_task(animals).episodes("train", [0], 0).query_x)
    assert list((cache / "images").iterdir()) == [store]
    for path in animals.rglob("*.png"):
        draw(path, 255)
    assert not torch.equal(before.query_x, folder_task(animals).episodes("train", [0], 0).query_x)
    assert len(list((cache / "images").iterdir())) == 2


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"shots": 5},
            r"has 6 images; 5 support and 2 query images need 7: .*for all splits: --query 1 --set eval_query=1",
        ),
        ({"ratios": [0.1, 0.1, 0.8]}, "has 1 train class; 2-way tasks need 2: ask for fewer ways, or give the split"),
    ],
)
def test_too_few_of_something(animals: Path, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        folder_task(animals, **options).episodes("train", [0], 0)


def test_a_split_that_is_needed_later_is_missed_before_anything_is_written(
    animals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("size=16", "ways=2", "query=2", "eval_query=2", "model.width=4", "ratios=[0.8, 0.1, 0.1]")
    given = [part for option in options for part in ("--set", option)]
    arguments = ["train", "--task", "image-folder", "--data", str(animals), *given, "--out", str(tmp_path / "run")]
    assert run(arguments) == 2
    assert "has 1 validation class; 2-way tasks need 2" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_paths_are_kept_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    config = ImageFolder.Config(data="photos", split_file="~/split.yaml")
    assert config.data == str(tmp_path / "photos")
    assert config.split_file == str(Path("~/split.yaml").expanduser())


def test_a_folder_without_images(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="There are no images in the folders inside"):
        folder_task(tmp_path / "empty").episodes("train", [0], 0)


def test_grey_transparent_and_palette_images(tmp_path: Path) -> None:
    for mode, colour in (("L", 100), ("RGBA", (0, 0, 0, 0)), ("P", 3), ("I;16", 25700), ("LA", (50, 255)), ("1", 1)):
        for image in range(4):
            path = tmp_path / "modes" / mode.replace(";", "") / f"{image}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new(mode, (16, 16), colour).save(path)
    for channels in (1, 3):
        store = folder_task(tmp_path / "modes", channels=channels, ratios=[1, 0, 0]).store
        assert store.pixels.shape == (24, 16, 16, channels)
        index = store.splits["train"]
        first = dict(zip(index.names, store.pixels[index.starts], strict=True))
        assert first["RGBA"].min() == 255  # transparent is white
        assert np.unique(first["I16"]) == [100]


# ----------------------------------------------------------------------------------------------------- standard data sets


def test_standard_splits_are_disjoint_and_complete() -> None:
    sizes = {
        "omniglot": (1028, 172, 423), "cifar-fs": (64, 16, 20), "fc100": (60, 20, 20), "aircraft": (70, 15, 15),
        "vgg-flower": (71, 15, 16), "miniimagenet": (64, 16, 20), "tieredimagenet": (351, 97, 160), "cub": (100, 50, 50),
        "cars": (98, 49, 49),
    }  # fmt: skip
    for name, expected in sizes.items():
        split = read_splits(name)
        assert tuple(len(split[part]) for part in ("train", "validation", "test")) == expected
        assert len({each for names in split.values() for each in names}) == sum(expected)


def every_class(name: str) -> list[str]:
    return [each for names in read_splits(name).values() for each in names]


def fakes(location: Path) -> dict[type, Callable[[], Any]]:
    """Stand-ins for torchvision's data sets, with two images per class."""
    names = sorted(every_class("cifar-fs"))

    def cifar(*_: Any, train: bool, **__: Any) -> Any:
        data = np.full((100, 32, 32, 3), int(train), np.uint8) + np.arange(100, dtype=np.uint8)[:, None, None, None]
        return SimpleNamespace(classes=names, data=data, targets=list(range(100)), root=location)

    def listed(paths: list[tuple[Path, int]], **attributes: Any) -> Any:
        class Listed(list[tuple[Path, int]]):
            pass

        result = Listed(paths)
        for key, value in (attributes | {"root": location}).items():
            setattr(result, key, value)
        return result

    def aircraft(*_: Any, split: str, **__: Any) -> Any:
        variants = sorted(every_class("aircraft"))
        paths = [(location / "air" / f"{split}{n:03}.jpg", n) for n in range(100)]
        boxes = location / "fgvc-aircraft-2013b" / "data" / "images_box.txt"
        boxes.parent.mkdir(parents=True, exist_ok=True)
        for path, n in paths:
            draw(path, n, (40, 20))
            with boxes.open("a", encoding="utf-8") as file:
                file.write(f"{path.stem} 1 1 20 20\n")
        return listed(paths, classes=variants)

    def flowers(*_: Any, split: str, **__: Any) -> Any:
        paths = [(location / split / f"{n}.jpg", n) for n in range(102)]
        for path, n in paths:
            draw(path, n)
        return listed(paths if split != "val" else [])

    def signs(*_: Any, **__: Any) -> Any:
        for n in range(86):
            draw(location / "gtsrb/GTSRB/Training" / f"{n % 43:05}" / f"{n}.ppm", n)
        return listed([])

    def numbers(*_: Any, **__: Any) -> Any:
        data = np.arange(20, dtype=np.uint8)[:, None, None, None] * np.ones((1, 3, 32, 32), np.uint8)
        return SimpleNamespace(data=data, labels=np.arange(20) % 10, root=location)

    def characters(*_: Any, background: bool, **__: Any) -> Any:
        part = "background" if background else "evaluation"
        paths = []
        for name in every_class("omniglot"):
            if name.startswith(part):
                path = location / "omniglot-py" / f"images_{name}" / "1.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("1", (28, 28), 1).save(path)
                paths.append((path, 0))
        return listed(paths)

    return {
        CIFARFS: cifar, FC100: cifar, Aircraft: aircraft, VGGFlower: flowers, TrafficSign: signs, SVHN: numbers,
        Omniglot: characters,
    }  # fmt: skip


_CLASS_OF = {
    CIFARFS: "CIFAR100", FC100: "CIFAR100", Aircraft: "FGVCAircraft", VGGFlower: "Flowers102", TrafficSign: "GTSRB",
    SVHN: "SVHN", Omniglot: "Omniglot",
}  # fmt: skip


@pytest.mark.parametrize("task_class", _CLASS_OF)
def test_torchvision_tasks(task_class: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = SimpleNamespace(**{_CLASS_OF[task_class]: fakes(tmp_path)[task_class]})
    monkeypatch.setattr(standard, "import_torchvision", lambda _: SimpleNamespace(datasets=fake))
    task = task_class(task_class.Config(data=str(tmp_path), ways=5, query=1, eval_query=1))
    (tmp_path / task.marker).mkdir(parents=True, exist_ok=True)
    classes, _ = task.contents
    fewer = {CIFARFS: 200, FC100: 200, Aircraft: 200, VGGFlower: 204, TrafficSign: 86, SVHN: 20, Omniglot: 1623}
    with pytest.raises(UsageError, match=f"{classes:,} classes.*{fewer[task_class]:,} images"):
        task.episodes("test", [0], 0)
    monkeypatch.setattr(task_class, "contents", (classes, fewer[task_class]))
    if task_class is Omniglot:
        assert [len(index.names) for index in task.store.splits.values()] == [1028, 172, 423]
        assert task.store.pixels.max() == 0  # white paper is dark, ink would be bright
        return
    assert task.episodes("test", range(2), 0).support_x.shape == (2, 5, 3, 32, 32)
    if task_class in (TrafficSign, SVHN):
        with pytest.raises(UsageError, match=rf"train.*metareg eval RUN --task {task.name}"):
            task.episodes("train", [0], 0)
    if task_class is CIFARFS:  # a class's pixels are its number in the order of all names, in both splits
        index = task.store.splits["test"]
        numbers = [sorted(every_class("cifar-fs")).index(name) for name in index.names]
        assert task.store.pixels[index.starts, 0, 0, 0].tolist() == [n + 1 for n in numbers]


def test_a_torchvision_that_cannot_be_import_repaired_costs_only_what_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named '{name}'", name=name)

    def broken(_: str) -> Any:
        raise RuntimeError("undefined symbol: at_foo")

    vision._import_repaired.cache_clear()
    for importer, sentence in (
        (missing, r"needs torchvision, which is not installed: pip install 'metareg\[images\]'"),
        (broken, "import fails with torch .* undefined symbol"),
    ):
        monkeypatch.setattr(vision.importlib, "import_module", importer)
        with pytest.raises(MetaregError, match=sentence):
            vision.import_torchvision("cifar-fs")
    vision._import_repaired.cache_clear()


def test_torchvision_is_import_repaired_by_nothing_that_does_not_need_it(animals: Path, cache: Path) -> None:
    code = (
        "import sys; from metareg_image import ImageFolder; "
        f"ImageFolder(ImageFolder.Config(data={str(animals)!r}, size=16, ways=2, query=2)).episodes('train', [0], 0); "
        "assert 'torchvision' not in sys.modules; from metareg_image.vision import import_torchvision; "
        "tv = import_torchvision('x'); assert tv.transforms.v2 and tv.datasets.CIFAR100"
    )
    environment = os.environ | {"METAREG_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


# ------------------------------------------------------------------------------------------------------ folder benchmarks


def test_miniimagenet_in_both_layouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = every_class("miniimagenet")
    monkeypatch.setattr(MiniImageNet, "contents", (100, 200))
    for number, name in enumerate(names):
        for image in range(2):
            draw(tmp_path / "a" / "images" / f"{name}{image:08}.jpg", number)
            draw(tmp_path / "b" / ("train" if number < 64 else "rest") / name / f"{image}.jpg", number)
    for layout in "ab":
        task = MiniImageNet(MiniImageNet.Config(data=str(tmp_path / layout), size=8, query=1, eval_query=1))
        assert task.verify() == "64/16/20 classes (train/validation/test), 200 images"


def test_cub_takes_the_middle_and_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split, names in read_splits("cub").items():
        for name in names:
            draw(
                tmp_path / "CUB_200_2011" / "images" / name / "1.jpg",
                {"train": 0, "validation": 100, "test": 200}[split],
            )
    task = CUB(CUB.Config(data=str(tmp_path), size=16))
    with pytest.raises(UsageError, match=r"200 images.*11,788"):
        task.verify()
    monkeypatch.setattr(CUB, "contents", (200, 200))
    assert task.verify() == "100/50/50 classes (train/validation/test), 200 images"
    wide = Image.new("RGB", (90, 30))
    wide.paste((255, 255, 255), (35, 0, 55, 30))
    assert np.asarray(task.resize(wide)).mean() > 250  # the middle 20 of 90 columns
    assert task.resize(Image.new("RGB", (17, 200))).size == (16, 16)


def test_tieredimagenet_names_missing_classes(tmp_path: Path) -> None:
    draw(tmp_path / "train" / "n01530575" / "1.jpg")
    with pytest.raises(UsageError, match=r"1 classes and 1 images.*Without images: n0"):
        TieredImageNet(TieredImageNet.Config(data=str(tmp_path), size=8)).verify()


def test_cars_are_cut_at_their_boxes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = every_class("cars")
    kind = [(name, "O") for name in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")]
    rows = [(3, 2, 6, 5, number + 1, f"{number:05}.png") for number in range(len(names))]
    (tmp_path / "devkit").mkdir()
    savemat(tmp_path / "devkit/cars_train_annos.mat", {"annotations": np.array(rows, dtype=kind)})
    savemat(tmp_path / "devkit/cars_meta.mat", {"class_names": np.array(names, dtype=object)})
    for *_, file in rows:
        picture = Image.new("RGB", (8, 8))
        picture.paste((255, 255, 255), (2, 1, 6, 5))
        path = tmp_path / "cars_train" / file
        path.parent.mkdir(exist_ok=True)
        picture.save(path)
    monkeypatch.setattr(Cars, "contents", (196, 196))
    task = Cars(Cars.Config(data=str(tmp_path), size=8))
    assert task.verify() == "98/49/49 classes (train/validation/test), 196 images"
    # The processes that read MATLAB files have finished.
    monkeypatch.setattr("metareg_image.folders.parse_in_child", lambda parser, paths, _: [*map(parser, paths)])
    assert task.store.pixels.min() == 255
    # A data set is verified at its source, although a cache exists.
    damaged = tmp_path / "cars_train" / rows[7][-1]
    damaged.write_bytes(damaged.read_bytes()[:60])
    assert task.store.pixels.min() == 255
    with pytest.raises(UsageError, match=f"An image cannot be read: .*{damaged.name} "):
        task.verify()


# --------------------------------------------------------------------------------------------- downloads and the command


def test_omniglot_small_is_fetched(tmp_path: Path, data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAREG_DATA", str(tmp_path))
    with serve(data_folder / "omniglot") as address:
        monkeypatch.setattr("metareg_image.omniglot._ORIGIN", address)
        assert run(["data", "omniglot-small", "--download"]) == 0
    assert OmniglotSmall(OmniglotSmall.Config()).is_complete()
    assert run(["data", "omniglot-small", "--download"]) == 0  # the data exists


def test_metareg_data(animals: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["data"]) == 0
    table = " ".join(capsys.readouterr().out.split())  # whatever the terminal's width
    assert "cifar-fs" in table
    assert "metareg data cifar-fs --download" in table
    assert "sinusoid" not in table
    assert run(["data", "image-folder", "--verify", "--data", str(animals)]) == 0
    assert "6/2/2 classes (train/validation/test), 60 images" in capsys.readouterr().out
    for arguments, sentence in (
        (["data", "cub", "--download"], "cannot be downloaded"),
        (["data", "sinusoid"], "reads no data"),
        (["data", "--verify"], "Name the task"),
        (["data", "cubb"], "did you mean 'cub'"),
    ):
        assert run(arguments) == 2
        assert sentence in " ".join(capsys.readouterr().err.split())
