"""Configuration files: YAML without code execution, aliases and repeated keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from metareg.errors import UsageError
from metareg.util.files import MALFORMED, read_text

__all__ = ["parse_yaml", "read_yaml"]

_LONGEST_YAML = 1 << 20
_MOST_VALUES = 200_000


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a configuration file as a dict, without executing anything.

    Raises:
        UsageError: the file is missing, unreadable, not YAML, or not a mapping.
    """
    try:
        if path.stat().st_size > _LONGEST_YAML:
            raise UsageError(f"The configuration file {path} is larger than {_LONGEST_YAML >> 20} MiB.")
        text = read_text(path)
    except FileNotFoundError:
        raise UsageError(f"There is no configuration file {path}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"The configuration file {path} cannot be read: {getattr(error, 'strerror', None) or error}."
        ) from error
    try:
        content = parse_yaml(text)
    except ValueError as error:
        raise UsageError(f"The configuration file {path} is malformed{error}.") from error
    if not isinstance(content, dict):
        found = "empty" if content is None else f"a {type(content).__name__}"
        raise UsageError(f"The configuration file {path} must contain 'key: value' lines; it is {found}.")
    return {str(key): value for key, value in content.items()}


def parse_yaml(text: str, *, texts: bool = False) -> Any:
    """Parse a YAML text, without code execution and aliases.

    Args:
        text: the YAML.
        texts: whether to read numbers, dates and so on as strings.

    Raises:
        ValueError: the text is malformed; the message says where and how, and begins with a space or a colon.
    """
    try:
        return yaml.load(text, _TextLoader if texts else _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"{at}: {getattr(error, 'problem', None) or 'it is not valid YAML'}") from error
    except RecursionError as error:
        raise ValueError(": it is nested too deeply") from error
    except MALFORMED as error:  # an impossible date or number
        raise ValueError(f": {error}") from error


class _Composer:
    """Refuses aliases, a few of which can expand to gigabytes, repeated keys, and more values than a configuration has."""

    _values = 0

    def compose_node(self: Any, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._values += 1
        if self._values > _MOST_VALUES:
            raise yaml.composer.ComposerError(None, None, f"there are more than {_MOST_VALUES} values")
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, f"the alias '*{event.anchor}' is not allowed", event.start_mark
            )
        return yaml.composer.Composer.compose_node(self, parent, index)

    def construct_mapping(self: Any, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                problem = f"the key '{key.value}' occurs twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)  # type: ignore[misc]


class _Loader(_Composer, yaml.SafeLoader):
    """Loads values with YAML's types."""


class _TextLoader(_Composer, yaml.BaseLoader):
    """Loads all values as strings."""
