"""A run on images, and its test on another image task."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pictures
import pytest
import torch
from PIL import Image

import metareg
from metareg.cli.app import run as command
from metareg_image import Glyphs


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> metareg.Run:
    with pictures.drawn():
        return metareg.train(
            "maml", "cml", "glyphs", out=tmp_path_factory.mktemp("runs") / "run", steps=4, ways=3, query=2, eval_query=2,
            test_tasks=4, eval_tasks=2, test_inner_steps=[0, 1], strategy="serial", **{"model.width": 4},
        )  # fmt: skip


def test_a_run_on_glyphs(trained: metareg.Run) -> None:
    assert trained.evaluation is not None
    assert trained.evaluation.metric == "accuracy"
    assert (trained.path / "plots" / "episodes.png").is_file()
    assert trained.config.model is not None
    assert trained.config.model.name == "conv4"
    assert {"cml.colearner_metric", "query_loss", "accuracy"} <= next(
        line for line in trained.metrics() if line["split"] == "train"
    ).keys()


def test_a_run_is_tested_on_another_task(
    trained: metareg.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    colours = np.random.default_rng(0).integers(0, 255, (4, 5, 20, 30, 3), dtype=np.uint8)
    for kind, images in enumerate(colours):
        for number, image in enumerate(images):
            path = tmp_path / "photos" / f"kind{kind}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    loaded = metareg.Run.load(trained.path)
    options = {"data": str(tmp_path / "photos"), "ratios": [0, 0, 1]}
    # Ways, shots, queries, and the model's image size and channels come from the run: grey 20×20 images.
    evaluation = loaded.evaluate(5, [0, 1], "image-folder", options)
    assert evaluation.scores.shape == (5, 2)
    arguments = ["eval", str(trained.path), "--task", "image-folder", "--data", str(tmp_path / "photos"), "--json"]
    assert command([*arguments, "--tasks", "3", "--set", "ratios=[0, 0, 1]"]) == 0
    capsys.readouterr()
    assert command([*arguments, "--set", "channels=3", "--set", "ratios=[0, 0, 1]"]) == 2
    assert "The model cannot be run on the task 'image-folder'" in " ".join(capsys.readouterr().err.split())


def test_a_test_on_a_task_of_another_kind_is_one_sentence(trained: metareg.Run) -> None:
    with pytest.raises(
        metareg.UsageError, match=r"The run's learner is not for the task 'sinusoid'.*: support_y has the shape"
    ):
        trained.evaluate(5, [1], "sinusoid")


# ------------------------------------------------------------------------------------------------------------- defaults


def nearest_centroid(episodes: metareg.Episodes, ways: int) -> float:
    """Return the accuracy of the class with the nearest mean of the support images' pixels."""
    support, query = episodes.support_x.flatten(2), episodes.query_x.flatten(2)
    means = torch.stack(
        [support[episodes.support_y == way].view(len(support), -1, support.shape[-1]).mean(1) for way in range(ways)], 1
    )
    return float((torch.cdist(query, means).argmin(-1) == episodes.query_y).double().mean())


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["maml", "anil", "boil", "metasgd"])
def test_every_algorithm_learns_by_the_defaults(algorithm: str, tmp_path: Path) -> None:
    """After a small part of the training, the run is better than an untrained model and the nearest centroid."""
    run = metareg.train(algorithm, task="glyphs", out=tmp_path / "run", steps=400, eval_tasks=2, test_tasks=100)
    untrained = metareg.train(
        algorithm, task="glyphs", out=tmp_path / "untrained", steps=1, eval_tasks=2, test_tasks=100
    )
    assert run.evaluation is not None
    assert untrained.evaluation is not None
    task = Glyphs(Glyphs.Config())
    least = max(
        untrained.evaluation.mean(run.config.inner_steps), nearest_centroid(task.episodes("test", range(100), 0), 5)
    )
    assert run.evaluation.mean(run.config.inner_steps) > least + 0.05
