"""Configuration files: YAML in which nothing can execute, nor grow when it is read, nor stand twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from metareg.errors import UsageError

__all__ = ["parse_yaml", "read_yaml"]

_LONGEST_YAML = 1 << 20


def read_yaml(path: Path) -> dict[str, Any]:
    """A configuration file as a dict; nothing in it can execute.

    Raises:
        UsageError: it is missing, unreadable, no YAML, or no mapping at the top.
    """
    try:
        if path.stat().st_size > _LONGEST_YAML:
            raise UsageError(f"The configuration file {path} is larger than {_LONGEST_YAML >> 20} MiB.")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"There is no configuration file {path}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The configuration file {path} cannot be read: {error}.") from error
    try:
        content = parse_yaml(text)
    except ValueError as error:
        raise UsageError(f"The configuration file {path} is malformed{error}.") from error
    if not isinstance(content, dict):
        found = "empty" if content is None else f"a {type(content).__name__}"
        raise UsageError(f"The configuration file {path} must hold 'key: value' lines; it is {found}.")
    return {str(key): value for key, value in content.items()}


def parse_yaml(text: str) -> Any:
    """What a YAML text holds; nothing in it can execute, nor grow when it is read.

    Raises:
        ValueError: it is malformed; the message says where and how, and begins with a space or a colon.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"{at}: {getattr(error, 'problem', None) or 'it is not valid YAML'}") from error
    except RecursionError as error:
        raise ValueError(": it is nested too deeply") from error
    except ValueError as error:  # a date or a number that cannot be
        raise ValueError(f": {error}") from error


class _Loader(yaml.SafeLoader):
    """YAML without aliases, a few of which can stand for gigabytes, and without keys that stand twice."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, f"the alias '*{event.anchor}' is not allowed", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                problem = f"the key {key.value!r} stands there twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else "")
        return super().construct_mapping(node, deep)
