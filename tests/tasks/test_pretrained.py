"""torchvision's classifiers as models: weights, gradients against torchvision's own forward, and frozen parts."""

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

from metareg import Episodes, MetaLearner, TaskSpec, UsageError
from metareg_image import TorchvisionModel
from metareg_image.vision import import_torchvision

# import_torchvision repairs the import of a CUDA build of torchvision with a torch without CUDA.
if importlib.util.find_spec("torchvision") is None:
    pytest.skip("torchvision is not installed", allow_module_level=True)


SPEC = TaskSpec((3, 32, 32), (3,))
INNER_LR = 0.05
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def original() -> nn.Module:
    """torchvision's own resnet18 for 1000 classes, with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return import_torchvision("a test").models.resnet18(weights=None)


@pytest.fixture(scope="module")
def weights(original: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(original.state_dict(), path)
    return path


def build(spec: TaskSpec = SPEC, **options: Any) -> nn.Module:
    return TorchvisionModel(TorchvisionModel.Config(**options)).build(spec)


def create_learner(algo: str, weights: Path, **options: Any) -> MetaLearner:
    return MetaLearner(
        "torchvision", algo, spec=SPEC, model_options={"weights": str(weights), **options}, inner_lr=INNER_LR,
        strategy="serial",
    )  # fmt: skip


def create_episodes(dtype: torch.dtype = torch.float32) -> Episodes:
    generator = torch.Generator().manual_seed(3)
    support, query = (torch.rand(2, 3, 3, 32, 32, generator=generator, dtype=dtype) for _ in range(2))
    labels = torch.arange(3).expand(2, 3)
    return Episodes(support, labels, query, labels)


def compute_gradient(original: nn.Module, meta: Tensors, adapted: Sequence[str]) -> Tensors:
    """Compute the second-order meta-gradient of one inner step with torchvision's own forward."""
    meta = {name: value.detach().double().requires_grad_() for name, value in meta.items()}
    losses = []
    for support_x, support_y, query_x, query_y in zip(*create_episodes(torch.float64).parts, strict=True):
        grads = torch.autograd.grad(
            F.cross_entropy(functional_call(original, meta, support_x), support_y),
            [meta[name] for name in adapted], create_graph=True,
        )  # fmt: skip
        moved = {name: meta[name] - INNER_LR * grad for name, grad in zip(adapted, grads, strict=True)}
        losses.append(F.cross_entropy(functional_call(original, meta | moved, query_x), query_y))
    return dict(zip(meta, torch.autograd.grad(sum(losses) / len(losses), list(meta.values())), strict=True))


@pytest.mark.parametrize("algo", ["maml", "anil", "boil"])
def test_meta_gradients_are_those_of_torchvisions_own_forward(original: nn.Module, weights: Path, algo: str) -> None:
    model = build(weights=str(weights)).double()
    learner = MetaLearner(model, algo, inner_lr=INNER_LR, strategy="serial")
    _, grads = learner.meta_gradient(create_episodes(torch.float64))
    plain = import_torchvision("a test").models.resnet18(weights=None, num_classes=3).double()
    names = {name: name.removeprefix("body.").replace("head.", "fc.") for name in learner.meta_parameters}
    meta = {names[name]: value for name, value in learner.meta_parameters.items()}
    assert meta.keys() == dict(plain.named_parameters()).keys()
    assert all(value.equal(original.get_parameter(name).double()) for name, value in meta.items() if "fc." not in name)
    chosen = {
        "maml": list(meta),
        "anil": ["fc.weight", "fc.bias"],
        "boil": [name for name in meta if "fc." not in name],
    }
    expected = compute_gradient(plain.train(), meta, chosen[algo])
    whole = torch.cat([value.flatten() for value in expected.values()]).norm()
    for name, value in grads.items():
        assert (value - expected[names[name]]).norm() < 1e-9 * whole, name


def test_weights_come_from_files_of_either_kind_and_from_the_hubs_cache(
    original: nn.Module, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(original.state_dict(), tmp_path / "resnet18.safetensors")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(UsageError, match="does not download them"):
        build(weights="hub")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "resnet18-f37072fd.pth").write_bytes(weights.read_bytes())
    for given in (weights, tmp_path / "resnet18.safetensors", "hub"):
        model = build(weights=str(given))
        assert model.body.conv1.weight.equal(original.conv1.weight), given
        assert model.body.bn1.running_mean.equal(original.bn1.running_mean), given
        assert model.head.weight.shape == (3, 512)


def test_a_frozen_backbone_is_trained_in_part_and_saved_whole(
    weights: Path, original: nn.Module, tmp_path: Path
) -> None:
    path = tmp_path / "copy.pth"
    path.write_bytes(weights.read_bytes())
    frozen = create_learner("anil", path, trainable=[])
    assert set(frozen.meta_parameters) == {"head.weight", "head.bias"}
    learner = create_learner("maml", path, trainable=["layer4.1", "bn1"])
    own = set(learner.meta_parameters)
    assert {name for name in own if not name.startswith(("body.layer4.1.", "body.bn1.", "head."))} == set()
    start = {name: value.clone() for name, value in learner.meta_parameters.items()}
    learner.step(create_episodes())
    assert all(not value.equal(start[name]) for name, value in learner.meta_parameters.items())
    assert learner.model.module.body.conv1.weight.equal(original.conv1.weight)
    learner.save(tmp_path / "learner.safetensors")
    path.unlink()
    again = MetaLearner.load(tmp_path / "learner.safetensors")
    scores = [each.evaluate(Source(), 2, inner_steps=[1]).scores for each in (learner, again)]
    assert scores[0].equal(scores[1])
    assert again.model.module.body.conv1.weight.equal(original.conv1.weight)


class Source:
    """The same two tasks in every split."""

    def episodes(self, indices: Sequence[int]) -> Episodes:
        return create_episodes()[: len(indices)]


@pytest.mark.parametrize("architecture", ["mobilenet_v3_small", "convnext_tiny"])
def test_other_architectures_draw_no_random_numbers(architecture: str) -> None:
    model = build(architecture=architecture)
    x = torch.rand(2, 3, 32, 32)
    assert model.train()(x).equal(model(x))
    MetaLearner(model, "anil", strategy="serial", inner_lr=0.01).step(create_episodes())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"architecture": "resnet81"}, ["resnet81", "'resnet18'"]),
        ({"architecture": "squeezenet1_0"}, ["squeezenet1_0", "linear layer"]),
        ({"weights": "/nowhere/resnet18.pth"}, ["/nowhere/resnet18.pth", "does not download them"]),
        ({"trainable": ["layer5"]}, ["layer5", "'layer4'"]),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        build(**options)
    assert [word for word in words if word not in str(caught.value)] == []


def test_other_files_and_images_are_refused(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not fit the architecture 'resnet34'"):
        build(architecture="resnet34", weights=str(weights))
    for content in (b"no weights", b""):
        (tmp_path / "broken.pth").write_bytes(content)
        with pytest.raises(UsageError, match="cannot be read as weights"):
            build(weights=str(tmp_path / "broken.pth"))
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UsageError, match="contains no weights by name"):
        build(weights=str(tmp_path / "list.pth"))
    with pytest.raises(UsageError, match="channels=3"):
        build(TaskSpec((1, 32, 32), (3,)))
