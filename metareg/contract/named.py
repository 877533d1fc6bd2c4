"""Examples that a task contains and that users' tables refer to by name."""

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
    """The column of names in users' tables."""
    names: Sequence[str] | None = None
    """The names in the order of the examples' numbers; None if the numbers themselves are the names."""
    table: Tensor | None = None
    """The inputs of all examples ``[all examples, …]`` if `read` only selects rows; otherwise None."""

    def number(self, names: Sequence[str]) -> Tensor:
        """Return the numbers of the named examples, int64 ``[examples]``.

        Raises:
            KeyError: a name, the error's argument, does not exist.
        """
        raise NotImplementedError

    def read(self, numbers: Tensor) -> Any:
        """Return the model's inputs ``[examples, …]`` for some examples."""
        raise NotImplementedError

    def bind(self, module: nn.Module) -> nn.Module:
        """Wrap a module so that it takes numbers of examples instead of their inputs, for a self-contained program.

        Raises:
            UsageError: this is impossible.
        """
        raise NotImplementedError
