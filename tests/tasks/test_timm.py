"""timm's classifiers as models: features and whole training steps against timm's own forward, weights, and refusals."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import metareg
from metareg import Episodes, MetaLearner, MetaregError, TaskSpec, UsageError
from metareg.runs.options import assemble
from metareg_image import TimmModel, vision
from metareg_image.vision import import_timm

if importlib.util.find_spec("timm") is None:
    pytest.skip("timm is not installed: pip install 'metareg[timm]'", allow_module_level=True)


SPEC = TaskSpec((3, 32, 32), (3,))
INNER_LR, OUTER_LR = 0.05, 1e-3
# resnet: BatchNorm; efficientnet: BatchNorm with an activation; vit: attention, for a fixed size.
ARCHITECTURES = ("test_resnet", "test_efficientnet", "test_vit")


def build(spec: TaskSpec = SPEC, architecture: str = "test_resnet", **options: Any) -> nn.Module:
    return TimmModel(TimmModel.Config(architecture=architecture, **options)).build(spec)


def create_original(architecture: str, seed: int = 0) -> nn.Module:
    """Create timm's own classifier with random weights."""
    sized = {"img_size": (32, 32)} if architecture == "test_vit" else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return import_timm("a test").create_model(architecture, num_classes=3, **sized)


def save_weights(original: nn.Module, folder: Path) -> Path:
    path = folder / "weights.safetensors"
    save_file({name: value.contiguous() for name, value in original.state_dict().items()}, path)
    return path


def create_episodes(dtype: torch.dtype = torch.float32, seed: int = 3) -> Episodes:
    generator = torch.Generator().manual_seed(seed)
    support, query = (torch.rand(2, 6, 3, 32, 32, generator=generator, dtype=dtype) for _ in range(2))
    labels = torch.arange(6).remainder(3).expand(2, 6)
    return Episodes(support, labels, query, labels)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_features_are_timms(architecture: str, tmp_path: Path) -> None:
    original = create_original(architecture)
    model = build(architecture=architecture, weights=str(save_weights(original, tmp_path)))
    x = create_episodes().support_x[0]
    for module in (original, model):
        module.eval()
    expected = original.forward_head(original.forward_features(x), pre_logits=True)
    torch.testing.assert_close(model.body(x), expected)
    model.head.load_state_dict(original.get_classifier().state_dict())
    torch.testing.assert_close(model(x), original(x))


def train_in_a_loop(original: nn.Module, start: dict[str, Tensor], adapted: Sequence[str], steps: int) -> None:
    """Train `start` in place: one inner step of exact second order for each task, and Adam over the mean of two."""
    optimizer = torch.optim.Adam(start.values(), lr=OUTER_LR)
    for step in range(steps):
        losses = []
        for support_x, support_y, query_x, query_y in zip(*create_episodes(torch.float64, step).parts, strict=True):
            loss = F.cross_entropy(functional_call(original, start, support_x), support_y)
            grads = torch.autograd.grad(loss, [start[name] for name in adapted], create_graph=True)
            moved = {name: start[name] - INNER_LR * grad for name, grad in zip(adapted, grads, strict=True)}
            losses.append(F.cross_entropy(functional_call(original, start | moved, query_x), query_y))
        optimizer.zero_grad()
        (sum(losses) / len(losses)).backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("architecture", "algo", "trainable", "strategy"),
    [
        ("test_resnet", "maml", None, "serial"),
        ("test_resnet", "maml", ["layer4", "bn1"], "serial"),
        ("test_resnet", "anil", [], "serial"),
        ("test_efficientnet", "maml", None, "serial"),
        ("test_efficientnet", "anil", ["bn2"], "vectorized"),
        ("test_vit", "maml", ["blocks.1"], "serial"),
    ],
)
def test_weights_after_training_are_those_of_a_loop_on_timms_own_forward(
    architecture: str, algo: str, trainable: list[str] | None, strategy: str, tmp_path: Path
) -> None:
    original = create_original(architecture).double().train()
    path = save_weights(original.float(), tmp_path)
    original.double()
    model = build(architecture=architecture, weights=str(path), trainable=trainable).double()
    model.head.load_state_dict(original.get_classifier().state_dict())
    learner = MetaLearner(
        model, algo, loss="cross_entropy", inner_lr=INNER_LR, outer_lr=OUTER_LR, strategy=strategy, seed=0
    )
    for module in original.modules():  # the inner loop has no running statistics
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
    head = original.pretrained_cfg["classifier"]
    chosen = {
        name: parameter.detach().clone().requires_grad_()
        for name, parameter in original.named_parameters()
        if trainable is None or name.startswith(tuple(f"{each}." for each in [*trainable, head]))
    }
    frozen = {name: p.detach() for name, p in original.named_parameters() if name not in chosen}
    original.requires_grad_(False)
    begin = {name: value.detach().clone() for name, value in chosen.items()}
    adapted = [name for name in chosen if algo == "maml" or name.startswith(f"{head}.")]
    for step in range(3):
        learner.step(create_episodes(torch.float64, step))
    with sdpa_kernel(SDPBackend.MATH):  # the other kernels of attention have no second derivative
        train_in_a_loop(original, chosen, adapted, 3)
    # A layer of BatchNorm and activation is two layers here: bn1.weight of timm is body.bn1.0.weight.
    found = {name.removeprefix("body."): value for name, value in learner.meta_parameters.items()}
    places = {name: name.replace(f"{head}.", "head.", 1) if name.startswith(f"{head}.") else name for name in chosen}
    whole = torch.cat([(chosen[name] - begin[name]).flatten() for name in chosen]).norm()
    for name, place in places.items():
        value = found.pop(place) if place in found else found.pop(".0.".join(place.rsplit(".", 1)))
        assert not value.equal(begin[name]), name
        assert (value - chosen[name]).norm() < 1e-8 * whole, name
    assert not found
    assert all(value.equal(original.get_parameter(name)) for name, value in frozen.items())


def test_a_run_trains_saves_and_loads(tmp_path: Path) -> None:
    path = save_weights(create_original("test_efficientnet"), tmp_path)
    run = metareg.train(
        "maml", task="glyphs", model="timm", channels=3, size=32, ways=3, steps=2, meta_batch=2, test_tasks=2,
        eval_tasks=2, out=tmp_path / "run", architecture="test_efficientnet", weights=str(path), trainable=["blocks"],
        strategy="serial",
    )  # fmt: skip
    assert run.config.model.config["architecture"] == "test_efficientnet"
    assert run.config.task.config["normalisation"] == "imagenet"
    path.unlink()
    again = metareg.Run.load(run.path).learner
    assert all(again.meta_parameters[name].equal(value) for name, value in run.learner.meta_parameters.items())
    assert again.model.module.body.conv_stem.weight.equal(run.learner.model.module.body.conv_stem.weight)


def test_hub_is_hugging_faces_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path), raising=False)
    with pytest.raises(UsageError, match=r"create_model\('test_resnet', pretrained=True\).*--set weights=hub"):
        build(weights="hub")
    original = create_original("test_resnet")
    repository = import_timm("a test").get_pretrained_cfg("test_resnet").hf_hub_id.replace("/", "--")
    snapshot = tmp_path / f"models--{repository}" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    save_weights(original, tmp_path).rename(snapshot / "model.safetensors")
    (tmp_path / f"models--{repository}" / "refs").mkdir()
    (tmp_path / f"models--{repository}" / "refs" / "main").write_text("abc")
    assert build(weights="hub").body.conv1[0].weight.equal(original.conv1[0].weight)


def test_pretrained_weights_recommend_what_they_were_trained_with(tmp_path: Path) -> None:
    base = {"task": "image-folder", "model": "timm"}
    common = {"weights": str(tmp_path / "some.pth"), "data": str(tmp_path)}

    def recommended(**options: Any) -> tuple[str, int]:
        config = assemble(base, common | options).config.task.config
        return config["normalisation"], config["size"]

    assert recommended() == ("imagenet", 84)
    assert recommended(weights=None) == ("none", 84)
    assert recommended(architecture="vit_tiny_patch16_224") == ("inception", 224)
    assert recommended(architecture="vit_base_patch32_clip_224", normalisation="none", size=64) == ("none", 64)
    assert recommended(architecture="vit_base_patch32_clip_224.openai") == ("clip", 224)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"architecture": "resnet81"}, ["resnet81", "'resnet18'"]),
        ({"architecture": "resnet18.a1_in2k"}, ["resnet18.a1_in2k", "'resnet18.a1_in1k'"]),
        ({"architecture": "dla34"}, ["dla34", "of timm does not end in a linear layer"]),
        ({"architecture": "crossvit_tiny_240"}, ["crossvit_tiny_240", "of timm does not end in a linear layer"]),
        ({"architecture": "nest_tiny", "spec": TaskSpec((3, 50, 50), (3,))}, ["nest_tiny", "50×50", "size=224"]),
        ({"weights": "/nowhere/weights.pth"}, ["/nowhere/weights.pth", "does not download them", "timm.create_model"]),
        ({"trainable": ["layer5"]}, ["layer5", "'layer4'"]),
        ({"spec": TaskSpec((1, 32, 32), (3,))}, ["'timm'", "channels=3"]),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        build(**options)
    assert [word for word in words if word not in str(caught.value)] == []


def test_a_missing_timm_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named '{name}'", name=name)

    vision._import_timm.cache_clear()
    monkeypatch.setattr(vision.importlib, "import_module", missing)
    with pytest.raises(MetaregError, match=r"'timm' needs timm, which is not installed: pip install 'metareg\[timm\]'"):
        build()
    vision._import_timm.cache_clear()
