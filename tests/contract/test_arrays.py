"""Arrays and data frames in place of tensors give the same numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from metareg import Episodes, MetaLearner, UsageError

X = np.random.default_rng(0).normal(size=(3, 8, 2))
Y = X.sum(2, keepdims=True)


class Frame:
    """The common interface of pandas and similar libraries."""

    def __init__(self, values: np.ndarray) -> None:
        self._values = values

    def to_numpy(self) -> np.ndarray:
        return self._values


def step(parts: list[Any]) -> list[float]:
    """Return the weights after a training step, adapted to the first task."""
    torch.manual_seed(0)
    learner = MetaLearner(nn.Linear(2, 1).double(), loss="mse", inner_lr=0.1, strategy="serial")
    learner.step(Episodes(*parts))
    weight: list[float] = learner.adapt(parts[0][0], parts[1][0]).weight.flatten().tolist()
    return weight


@pytest.mark.parametrize(
    "convert",
    [
        lambda array: array,
        lambda array: array.astype(">f8"),
        lambda array: np.asfortranarray(array),
        lambda array: np.broadcast_to(array, array.shape),  # a read-only array
    ],
)
def test_arrays_are_tensors(convert: Any) -> None:
    parts = [X, Y, X[:, ::-1].copy(), Y[:, ::-1].copy()]
    assert step([convert(part) for part in parts]) == step([torch.from_numpy(part) for part in parts])


def test_frames_are_tensors() -> None:
    learner = MetaLearner(nn.Linear(2, 1), loss="mse", inner_lr=0.1)
    by_frame = learner.adapt(Frame(X[0]), Frame(Y[0]))
    by_tensor = learner.adapt(torch.from_numpy(X[0]), torch.from_numpy(Y[0]))
    assert torch.equal(by_frame.weight, by_tensor.weight)
    stacks = Episodes.group([(X[0], Y[0], X[0], Y[0]), (X[1, :3], Y[1, :3], X[1], Y[1])])
    assert [len(stack) for stack in stacks] == [1, 1]
    assert torch.equal(stacks[1].support_x[0], torch.from_numpy(X[1, :3]))


def test_what_is_given_is_not_shared() -> None:
    x = X.copy()
    episodes = Episodes(x, Y, x, Y)
    x[:] = 0
    assert torch.equal(episodes.support_x, torch.from_numpy(X))


@pytest.mark.parametrize(
    ("x", "says"),
    [
        (np.array([["a"]]), "type <U1"),
        (np.array([[1j]]), "type complex128"),
        (np.array([[None]]), "type object"),
        ([[1.0]], "must contain tensors or arrays, not float"),
        (None, "must contain tensors or arrays, not NoneType|contains no tensor"),
    ],
)
def test_what_is_no_number_is_refused(x: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Episodes(x, Y, X, Y)
