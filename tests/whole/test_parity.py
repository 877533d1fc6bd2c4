"""Meta-gradients against loops written out by hand (reference.py), in float64."""

from __future__ import annotations

from itertools import product

import pytest

from parity import ALGORITHMS, check
from samples import MODELS

CASES = list(product(MODELS, ALGORITHMS, ("none", "cml"), ("store", "recompute"), (1, 3)))
# One of each algorithm: compiling costs ten seconds a case and more. The others are marked slow.
COMPILED = [
    ("mlp", "maml", "none", "recompute", 3),
    ("conv", "anil", "cml", "store", 1),
    ("mlp", "boil", "cml", "recompute", 1),
    ("mlp", "metasgd", "cml", "store", 1),
]


@pytest.mark.parametrize(("net", "algo", "augment", "memory", "inner_steps"), CASES)
def test_meta_gradient_serial(net: str, algo: str, augment: str, memory: str, inner_steps: int) -> None:
    check(net, algo, augment, inner_steps, memory=memory, strategy="serial")


@pytest.mark.parametrize(("net", "algo", "augment", "memory", "inner_steps"), CASES)
def test_meta_gradient_vectorized(net: str, algo: str, augment: str, memory: str, inner_steps: int) -> None:
    traced = net == "mlp" or (net, algo, augment, memory, inner_steps) in COMPILED
    check(net, algo, augment, inner_steps, calls=2 if traced else 1, memory=memory, strategy="vectorized")


@pytest.mark.parametrize(
    ("net", "algo", "augment", "memory", "inner_steps"),
    # Whole compiled steps are in test_steps: one gradient by default, for compiling takes long.
    [case if case == COMPILED[-1] else pytest.param(*case, marks=pytest.mark.slow) for case in CASES],
)
def test_meta_gradient_compiled(net: str, algo: str, augment: str, memory: str, inner_steps: int) -> None:
    check(net, algo, augment, inner_steps, memory=memory, strategy="compiled")
