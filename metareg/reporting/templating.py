"""The templates of the formats; whatever a template inserts is escaped as its format needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

__all__ = ["load_template"]


def load_template(name: str, escape: Callable[[str], str], **delimiters: Any) -> Template:
    """Load a template from ``templates/``.

    Args:
        name: the file's.
        escape: what is done to every value that is inserted, unless it is `Markup`.
        delimiters: of the template's blocks and variables, where they are not Jinja's own.
    """

    def finalize(value: object) -> Markup:
        return value if isinstance(value, Markup) else Markup(escape(str(value)))

    environment = Environment(
        loader=PackageLoader("metareg.reporting"),
        autoescape=True,  # so that what macros return is markup
        finalize=finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        **delimiters,
    )
    return environment.get_template(name)
