"""ANIL: adapt only the head."""

from __future__ import annotations

from metareg import hookimpl
from metareg_maml import MAML


class ANIL(MAML):
    """Almost no inner loop: MAML whose inner loop adapts only the head; body and head both learn in the outer loop.

    The body does not change within a task, so its features are computed once per support set.

    Reference:
        Raghu, Raghu, Bengio and Vinyals, Rapid Learning or Feature Reuse? Towards Understanding the Effectiveness of
        MAML, ICLR 2020, arXiv 1909.09157.
    """

    adapts = "head"

    @hookimpl
    def adapted_parameters(self, head: tuple[str, ...]) -> tuple[str, ...]:
        return head
