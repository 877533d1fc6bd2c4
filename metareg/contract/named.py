"""Examples that a task holds itself and that a user's tables name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["NamedExamples"]


class NamedExamples:
    """Examples that a task holds, such as the nodes of its graph: users' tables name them and contain no inputs.

    ``metareg predict`` and ``metareg export`` then take a support table with the columns `column` and ``label``, and a
    query table with `column`. A subclass implements all methods.
    """

    column: ClassVar[str]
    """What the column of their names is called."""
    names: Sequence[str] | None = None
    """The names in the order of the examples' numbers; None where the numbers from 0 on are the names."""
    table: Tensor | None = None
    """The inputs of all examples ``[all examples, …]``, where `read` takes rows of it; None where it does more."""

    def number(self, names: Sequence[str]) -> Tensor:
        """The numbers of some examples, int64 ``[examples]``.

        Raises:
            KeyError: there is no example of a name, which is the error's argument.
        """
        raise NotImplementedError

    def read(self, numbers: Tensor) -> Any:
        """The model's inputs for some examples ``[examples, …]``."""
        raise NotImplementedError

    def bind(self, module: nn.Module) -> nn.Module:
        """Wrap a module so that it takes numbers of examples instead of their inputs, for a self-contained program.

        Raises:
            UsageError: this is impossible.
        """
        raise NotImplementedError
