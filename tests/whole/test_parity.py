"""Meta-gradients against reference loops (reference.py), in float64."""

from __future__ import annotations

from itertools import product

import pytest

from parity import ALGORITHMS, check
from samples import MODELS

CASES = list(product(MODELS, ALGORITHMS, ("none", "cml"), ("store", "recompute"), (1, 3)))


@pytest.mark.parametrize(("net", "algo", "augment", "memory", "inner_steps"), CASES)
def test_meta_gradient_serial(net: str, algo: str, augment: str, memory: str, inner_steps: int) -> None:
    check(net, algo, augment, inner_steps, memory=memory, strategy="serial")


@pytest.mark.parametrize(("net", "algo", "augment", "memory", "inner_steps"), CASES)
def test_meta_gradient_vectorized(net: str, algo: str, augment: str, memory: str, inner_steps: int) -> None:
    # The second call with a shape traces, which takes a second.
    traced = (net, memory, inner_steps) in (("mlp", "store", 1), ("mlp", "recompute", 3))
    traced = traced or (net, algo, augment, memory, inner_steps) == ("conv", "anil", "cml", "store", 1)
    check(net, algo, augment, inner_steps, calls=2 if traced else 1, memory=memory, strategy="vectorized")


@pytest.mark.slow  # test_steps compiles whole steps by default
@pytest.mark.parametrize(("net", "algo", "augment", "memory", "inner_steps"), CASES)
def test_meta_gradient_compiled(net: str, algo: str, augment: str, memory: str, inner_steps: int) -> None:
    check(net, algo, augment, inner_steps, memory=memory, strategy="compiled")
