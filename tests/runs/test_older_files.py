"""Files from before an option was renamed can still be read."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import yaml

import metareg
from metareg import MetaLearner
from metareg.runs.run import Run
from metareg.util.tensorfile import TensorFile, write_tensors

SMALL: dict[str, Any] = {
    "steps": 2, "meta_batch": 2, "eval_tasks": 2, "test_tasks": 2, "test_inner_steps": [1], "strategy": "serial",
    "model.width": 2, "task.query": 2, "bn_statistics": "support",
}  # fmt: skip


def aged(content: dict[str, Any]) -> dict[str, Any]:
    """Return a file's content from when two options were named `norm`."""
    old = {"norm" if key == "bn_statistics" else key: value for key, value in content.items()}
    if isinstance(old.get("model"), dict):
        config = {"norm" if key == "norm_layer" else key: value for key, value in old["model"]["config"].items()}
        old["model"] = old["model"] | {"config": config}
    return old


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Return a run whose files all contain `norm`."""
    pytest.importorskip("metareg_image")
    run = metareg.train("maml", task="glyphs", out=tmp_path / "run", **SMALL)
    for path in (run.path / "results.json", run.path / "environment.json"):
        content = json.loads(path.read_text())
        content.pop("config", None)  # which environments did not have then
        path.write_text(json.dumps(aged(content)))
    path = run.path / "config.yaml"
    path.write_text(yaml.safe_dump(aged(yaml.safe_load(path.read_text()))))
    path = run.path / "checkpoints" / "final.safetensors"
    file = TensorFile(path, "learner")
    write_tensors(path, file.read(), aged(dict(file.header)))
    for name in ("results.json", "environment.json", "config.yaml"):
        assert "bn_statistics" not in (run.path / name).read_text()
    assert aged(TensorFile(path, "learner").header) == TensorFile(path, "learner").header
    return run


def test_a_run_is_read(run: Run) -> None:
    again = Run.load(run.path)
    assert (again.config, again.learner.config) == (run.config, run.learner.config)
    assert again.evaluation is not None
    assert run.evaluation is not None
    assert again.evaluation.to_dict() == run.evaluation.to_dict()
    assert again.evaluation.bn_statistics == "support"
    assert again.evaluate(2, [1]).to_dict() == run.evaluation.to_dict()


def test_a_learner_is_read(run: Run) -> None:
    assert MetaLearner.load(run.path / "checkpoints" / "final.safetensors").bn_statistics == "support"


def test_a_run_goes_on(run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "metareg")
    whole = metareg.train("maml", task="glyphs", out=tmp_path / "whole", **SMALL | {"steps": 4, "eval_every": 2})
    longer = metareg.resume(run.path, steps=4)
    assert longer.evaluation is not None
    assert whole.evaluation is not None
    assert longer.evaluation.to_dict() == whole.evaluation.to_dict()
    assert not caplog.records


def test_a_run_from_before_an_option_continues_with_its_default(tmp_path: Path) -> None:
    settings = {"eval_tasks": 2, "test_tasks": 2, "strategy": "serial", "out": tmp_path / "run"}
    metareg.train("maml", "cml", steps=2, **settings)
    path = tmp_path / "run" / "config.yaml"
    content = yaml.safe_load(path.read_text())
    del content["augment"][0]["config"]["frozen"], content["task"]["config"]["eval_query"]
    path.write_text(yaml.safe_dump(content))
    assert metareg.train("maml", "cml", steps=3, resume=True, **settings).learner.steps_done == 3
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(metareg.UsageError, match="frozen"):
        metareg.train("maml", ("cml", {"frozen": True}), steps=4, resume=True, **settings)
