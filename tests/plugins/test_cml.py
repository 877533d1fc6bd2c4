"""What CML says of models that it cannot help."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from metareg import MetaLearner, UsageError


def test_outputs_need_a_dimension_of_their_own() -> None:
    class Scalar(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(1, 4), nn.ReLU())
            self.head = nn.Sequential(nn.Linear(4, 1), nn.Flatten(0))

    with pytest.raises(UsageError, match=r"\(3, 4\) and \(3,\)"):
        MetaLearner(Scalar(), augment=["cml"], loss="mse").initialize(torch.zeros(3, 1))
