"""The errors that users can see: one sentence that says what is wrong, where, and what would be right.

The command prints only the sentence and exits with the error's ``exit_code``; ``METAREG_TRACEBACK=1`` shows the
traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from metareg.printable import show_controls

__all__ = [
    "DivergenceError",
    "ExamplesError",
    "Interrupted",
    "LostProcessError",
    "MetaregError",
    "NonfiniteExamplesError",
    "PluginError",
    "UnknownNameError",
    "UsageError",
    "describe_error",
    "nearest",
]


class MetaregError(Exception):
    """Base of all errors that metareg raises; control characters in its message are made visible."""

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        super().__init__(show_controls(message))


class UsageError(MetaregError):
    """The user's input is wrong: a name, a number, a file, a combination. Nothing was changed."""

    exit_code = 2


_MOST_LISTED = 40
"""Maximum number of names to list, if another command lists all of them."""


class UnknownNameError(UsageError):
    """There is nothing with this name."""

    def __init__(self, what: str, name: str, known: Iterable[str], hint: str = "") -> None:
        self.name = name
        self.known = sorted(known)
        parts = [f"There is no {what} named '{name}'"]
        close = nearest(name, self.known)
        if close:
            parts.append(f"; did you mean {_either(close)}?")
        elif self.known and not (hint and len(self.known) > _MOST_LISTED):
            parts.append(f"; there {'are' if len(self.known) > 1 else 'is'} {', '.join(self.known)}.")
        else:
            parts.append(".")
        super().__init__("".join(parts) + (f" {hint}" if hint else ""))


class PluginError(UsageError):
    """A plugin cannot be used: it cannot be imported, breaks the contract, or clashes with another."""


class DivergenceError(MetaregError):
    """Training produced a number that is not finite."""


class ExamplesError(UsageError):
    """The examples of a task do not fit the learner."""


class NonfiniteExamplesError(ExamplesError, DivergenceError):
    """Examples of a task contain NaN or infinite values; training can skip them like steps that diverge."""


class LostProcessError(MetaregError):
    """Another process of the same training ended or hangs."""


class Interrupted(MetaregError):
    """A run was stopped by Ctrl-C or SIGTERM; it can be resumed."""

    exit_code = 130


def describe_error(error: BaseException) -> str:
    """Describe an error that is not metareg's by its type and message, even if its own text fails."""
    try:
        text = str(error)
    except Exception:
        text = "its message cannot be shown"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """Find entries of `known` that are similar to `name` or contain it, most similar first."""
    folded = name.casefold()
    by_folded = {candidate.casefold(): candidate for candidate in known}
    found = difflib.get_close_matches(folded, by_folded, n=count, cutoff=0.6)
    containing = [candidate for candidate in by_folded if len(folded) > 2 and folded in candidate]
    return [by_folded[candidate] for candidate in dict.fromkeys((*found, *containing))][:count]


def _either(names: list[str]) -> str:
    quoted = [f"'{name}'" for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} or {quoted[-1]}"
