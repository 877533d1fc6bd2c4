"""BOIL: adapt only the body."""

from __future__ import annotations

from metareg import hookimpl
from metareg_maml import MAML


class BOIL(MAML):
    """Body only update in the inner loop: MAML whose head has step size 0; both learn in the outer loop.

    Reference:
        Oh, Yoo, Kim and Yun, BOIL: Towards Representation Change for Few-shot Learning, ICLR 2021, arXiv 2008.08882.
    """

    adapts = "body"

    @hookimpl
    def adapted_parameters(self, body: tuple[str, ...]) -> tuple[str, ...]:
        return body
