"""Image tasks: the sampling of episodes, their content, and their figures."""

from __future__ import annotations

import itertools
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from metareg import MetaLearner, MetaregError, UsageError, draw_distinct
from metareg.registry.plugins import resolve
from metareg_image import Glyphs, OmniglotSmall
from metareg_image.figures import _label, _tag


def glyphs(**options: object) -> Glyphs:
    return Glyphs(Glyphs.Config(**options))


# ------------------------------------------------------------------------------------------------------------- sampling


def shuffled(uniform: list[float], population: int) -> list[int]:
    """A reference implementation of Fisher and Yates' shuffle."""
    entries = list(range(population))
    for j, u in enumerate(uniform):
        k = j + int(u * (population - j))
        entries[j], entries[k] = entries[k], entries[j]
    return entries[: len(uniform)]


@pytest.mark.parametrize(("draws", "population"), [(1, 1), (3, 3), (5, 7), (20, 20), (20, 600)])
def test_draws_are_those_of_a_whole_shuffle(draws: int, population: int) -> None:
    uniform = np.random.default_rng(0).random((40, draws))
    drawn = draw_distinct(uniform, population)
    assert drawn.tolist() == [shuffled(row, population) for row in uniform.tolist()]


def test_every_ordered_draw_is_equally_likely() -> None:
    drawn = draw_distinct(np.random.default_rng(0).random((24_000, 2)), 4)
    _, counts = np.unique(drawn, axis=0, return_counts=True)
    assert len(counts) == 12
    assert ((counts - 2000) ** 2 / 2000).sum() < 31.3  # χ² of 11 degrees of freedom, 0.1 %


# ------------------------------------------------------------------------------------------------------------- episodes


def test_shapes_labels_and_range() -> None:
    batch = glyphs(ways=3, shots=2, query=4, eval_query=5, size=32).episodes("train", range(6), 0)
    assert batch.support_x.shape == (6, 6, 1, 32, 32)
    assert batch.query_x.shape == (6, 12, 1, 32, 32)
    assert batch.support_y.tolist() == [[0, 0, 1, 1, 2, 2]] * 6
    assert batch.query_y[0].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert batch.query_x.min() == 0
    assert 0.9 < batch.query_x.max() <= 1
    assert glyphs(ways=3, eval_query=5).episodes("test", [0], 0).query_x.shape[1] == 15


def test_a_task_depends_on_seed_split_and_number_alone() -> None:
    task = glyphs(rotations=True, query=3)
    one, other = task.episodes("train", [7], 3), glyphs(rotations=True, query=3).episodes("train", [2, 7], 3)
    for a, b in zip(one.parts, other.parts, strict=True):
        assert torch.equal(a[0], b[1])
    for different in (task.episodes("train", [7], 4), task.episodes("train", [8], 3), task.episodes("test", [7], 3)):
        assert not torch.equal(one.support_x[0], different.support_x[0])


def test_no_image_is_in_support_and_query() -> None:
    batch = glyphs(ways=5, shots=5, query=15).episodes("train", range(20), 0)
    for support, query in zip(batch.support_x, batch.query_x, strict=True):
        images = torch.cat([support, query]).flatten(1)
        assert len(images.unique(dim=0)) == len(images)


def test_rotations_are_further_classes() -> None:
    task = glyphs(rotations=True, ways=20, query=1)
    upright = {image.numpy().tobytes() for image in torch.from_numpy(np.array(task.store.pixels)).movedim(-1, 1)}
    support = (task.episodes("test", range(30), 0).support_x * 255).round().to(torch.uint8).flatten(0, 1)
    turns = [
        next(turn for turn in range(4) if image.rot90(-turn, (-2, -1)).contiguous().numpy().tobytes() in upright)
        for image in support
    ]
    counts = np.bincount(turns, minlength=4)
    assert counts.min() > 100  # 150 of each are expected
    _, names = task._draw_tasks("test", range(30), 0)
    assert [turn for turn in turns if turn] == [
        int(name.rsplit(" ", 1)[1].removesuffix("°")) // 90 for name in itertools.chain(*names) if name.endswith("°")
    ]


def test_training_on_few_classes_leaves_the_other_splits() -> None:
    few, every = glyphs(train_classes=7, query=1), glyphs(query=1)

    def names(task: Glyphs, split: str, seed: int) -> set[str]:
        return set(itertools.chain(*task._draw_tasks(split, range(200), seed)[1]))

    drawn = [names(few, "train", seed) for seed in (0, 1)]
    assert [len(each) for each in drawn] == [7, 7]
    assert drawn[0] != drawn[1]
    assert drawn[0] | drawn[1] <= set(every.store.splits["train"].names)
    for split in ("validation", "test"):
        assert few.episodes(split, [3], 0).support_x.equal(every.episodes(split, [3], 0).support_x)
    # The images belong to the named classes.
    index = every.store.splits["train"]
    images, ((first, *_),) = few._draw_tasks("train", [0], 0)
    rows = index.starts[index.names.index(first)] + np.arange(index.counts[index.names.index(first)])
    own = torch.from_numpy(np.array(every.store.pixels[rows])).movedim(-1, 1)
    assert all((image == own).flatten(1).all(1).any() for image in images[0, 0])


def test_flips_and_crops_change_training_images_only() -> None:
    plain, flipped, cropped = glyphs(query=3), glyphs(query=3, flips=True), glyphs(query=3, crops=3)
    for task in (flipped, cropped):
        assert torch.equal(plain.episodes("test", [0], 0).query_x, task.episodes("test", [0], 0).query_x)
        assert torch.equal(task.episodes("train", [4], 0).query_x[0], task.episodes("train", range(5), 0).query_x[4])
    before, after = (task.episodes("train", range(20), 0).query_x.flatten(0, 1) for task in (plain, flipped))
    mirrored = (after == before.flip(-1)).flatten(1).all(1)
    assert ((after == before).flatten(1).all(1) | mirrored).all()
    assert 0.3 < mirrored.float().mean() < 0.7
    moved = cropped.episodes("train", range(20), 0).query_x.flatten(0, 1)
    inside = torch.nn.functional.pad(before, [3] * 4, mode="reflect")
    windows = inside.unfold(2, 20, 1).unfold(3, 20, 1).flatten(2, 3).squeeze(1)
    matches = (windows == moved.squeeze(1)[:, None]).flatten(2).all(2)
    assert matches.any(1).all()
    assert len(set(matches.float().argmax(1).tolist())) > 30  # of 49 places


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"train_classes": 700}, "has 461 training classes; train_classes = 700 asks for more"),
        ({"train_classes": 4}, "has 4 train classes; 5-way tasks need 5"),
        ({"ways": 700}, "has 461 train classes; 700-way tasks need 700"),
        ({"shots": 10, "query": 15}, "has 20 images; 10 support and 15 query images need 25: lower shots or query"),
    ],
)
def test_too_few_classes_or_images_is_one_sentence(options: dict[str, int], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        glyphs(**options).episodes("train", [0], 0)


def test_crops_must_be_smaller_than_the_image() -> None:
    with pytest.raises(UsageError, match="crops = 20 must be less than the size, 20"):
        resolve("tasks", "glyphs", {"crops": 20, "size": 20})


# --------------------------------------------------------------------------------------------------------------- glyphs


def test_test_scripts_are_not_trained_on() -> None:
    splits = glyphs().store.splits
    scripts = {split: {name.split()[0] for name in index.names} for split, index in splits.items()}
    assert scripts["test"] == {"Greek", "Georgian", "Hebrew"}
    assert not scripts["train"] & (scripts["test"] | scripts["validation"])
    assert len(splits["train"].names) > 400
    assert len(splits["validation"].names) > 45
    assert len(splits["test"].names) > 150
    names = [name for index in splits.values() for name in index.names]
    assert len(set(names)) == len(names)
    assert "Greek capital letter alpha" in names
    alike = {"Latin capital letter a", "Latin capital letter t", "Latin small letter n", "Latin capital letter k"}
    assert not alike & set(names)  # Α, τ, ռ or ո, and Ϗ are in the test or the validation
    assert {"Greek small letter tau", "Greek capital kai symbol", "Greek small letter kappa"} <= set(
        splits["test"].names
    )
    assert {int(count) for index in splits.values() for count in index.counts} == {20}
    assert all(unicodedata.lookup(name.upper()) for name in names)


def test_glyphs_fill_their_images_and_differ() -> None:
    store = glyphs().store
    pixels = np.array(store.pixels).reshape(len(store.pixels), -1)
    assert (pixels.max(1) > 150).all()
    assert len(np.unique(pixels, axis=0)) == len(pixels)
    for edge in (np.array(store.pixels)[:, 0], np.array(store.pixels)[:, -1]):
        assert (edge > 0).any((1, 2)).mean() < 0.05


# ------------------------------------------------------------------------------------------------------- omniglot-small


def test_omniglot_small(data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAREG_DATA", str(data_folder))
    task = OmniglotSmall(OmniglotSmall.Config())
    assert task.verify() == "114/22/106 classes (train/validation/test), 4,840 images"
    alphabets = {split: {name.split("/")[0] for name in index.names} for split, index in task.store.splits.items()}
    assert alphabets == {
        "train": {"Balinese", "Greek", "Korean", "Latin"},
        "validation": {"Early_Aramaic"},
        "test": {"Japanese_(katakana)", "Sanskrit", "Tagalog"},
    }
    images = task.episodes("test", range(4), 0).query_x
    assert images.mean() < 0.3  # ink is bright, the ground dark
    assert Image.fromarray(np.array(task.store.pixels[0, ..., 0])).size == (20, 20)


def test_missing_data_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAREG_DATA", str(tmp_path))
    with pytest.raises(UsageError, match=r"omniglot.*`metareg data omniglot-small --download`"):
        OmniglotSmall(OmniglotSmall.Config(size=24)).episodes("train", [0], 0)
    with pytest.raises(UsageError, match="There is no folder"):
        OmniglotSmall(OmniglotSmall.Config(data=str(tmp_path / "no"), size=24)).episodes("train", [0], 0)


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / f"images_background_small{number}.zip").write_bytes(b"no archive")
    with pytest.raises(UsageError, match=r"images_background_small1\.zip is damaged"):
        OmniglotSmall(OmniglotSmall.Config(data=str(tmp_path), size=24)).episodes("train", [0], 0)


def test_a_users_image_is_read_as_the_task_reads_its_own(tmp_path: Path) -> None:
    Image.new("RGB", (50, 40), (255, 255, 255)).save(tmp_path / "white.png")
    for task, value in ((glyphs(), 1.0), (OmniglotSmall(OmniglotSmall.Config()), 0.0)):
        read = task.read_image(tmp_path / "white.png")
        assert read.shape == task.spec.input_shape
        assert (read == value).all()
    (tmp_path / "no.png").write_bytes(b"no image")
    with pytest.raises(UsageError, match=r"no\.png cannot be read as an image"):
        glyphs().read_image(tmp_path / "no.png")


# -------------------------------------------------------------------------------------------------------------- figures


@pytest.mark.parametrize("shots", [2, 5])
def test_figures_show_support_queries_labels_and_confidence(shots: int) -> None:
    task = glyphs(ways=3, shots=shots, query=4, eval_query=4)
    learner = MetaLearner("conv4", "maml", spec=task.spec, model_options={"width": 4}, inner_lr=0.4)
    figure = task.figures(learner, 0)["episodes"]
    titles = [axes.get_title() for axes in figure.axes]
    assert [title.split(":")[0] for title in titles] == ["test task 0", "test task 1", "test task 2"]
    for number, axes in enumerate(figure.axes):
        assert len(axes.images) == len(axes.patches) == 3 * (min(shots, 3) + 4)
        texts = [text.get_text() for text in axes.texts]
        assert texts[0] == ("support" if shots == 2 else "support: 3 of 5")
        labels = [text for text in texts if "%" in text]
        assert len(labels) == 12
        wrong = sum("(is " in label for label in labels)
        adapted = learner.adapt(*(each[number] for each in task.episodes("test", range(3), 0).parts[:2]))
        batch = task.episodes("test", range(3), 0)
        with torch.no_grad():
            guesses = adapted(batch.query_x[number]).argmax(-1)
        assert wrong == int((guesses != batch.query_y[number]).sum())


def test_short_names_of_classes_stand_over_the_images() -> None:
    assert _tag(["pets/cat", "pets/dog"]) == ["cat", "dog"]
    assert _tag(["a/cat", "b/cat"]) == ["0", "1"]
    assert _tag(["cat", "hippopotamus"]) == ["0", "1"]


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("Japanese_(katakana)/character19 270°", "3 · Japanese_(katakana)\ncharacter19 270°"),
        ("n/animals/a very long name of a dog", "3 · animals\na very long name of…"),
        ("Greek small letter upsilon with hook", "3 · Greek small letter\nupsilon with hook"),
        ("cat", "3 · cat"),
    ],
)
def test_long_names_of_classes_are_shortened_legibly(name: str, label: str) -> None:
    assert _label(3, name) == label


def test_an_unwritable_cache_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("METAREG_CACHE", str(tmp_path / "file"))
    with pytest.raises(MetaregError, match=r"cannot be written.*choose another folder with METAREG_CACHE"):
        glyphs(size=8).episodes("train", [0], 0)
