"""The tables of a report in LaTeX, for ``\\input``; they need booktabs, and graphicx to fit the page."""

from __future__ import annotations

import unicodedata
from dataclasses import replace

from metareg.reporting import tables
from metareg.reporting.analysis import Report
from metareg.reporting.tables import Table
from metareg.reporting.templating import load_template

__all__ = ["render"]

_SIGNS = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\ensuremath{<}", ">": r"\ensuremath{>}",
    "|": r"\textbar{}", '"': "''", "±": r"\ensuremath{\pm}", "\N{MINUS SIGN}": r"\ensuremath{-}",
    "–": "--", "×": r"\ensuremath{\times}", "…": r"\ldots{}", "→": r"\ensuremath{\to}", "←": r"\ensuremath{\gets}",
    "≤": r"\ensuremath{\le}", "≥": r"\ensuremath{\ge}", "≈": r"\ensuremath{\approx}", "∞": r"\ensuremath{\infty}",
    "ο": "o", "ς": r"\ensuremath{\varsigma}",
}  # fmt: skip
_SIGNS |= {
    unicodedata.lookup(f"GREEK SMALL LETTER {name}"): rf"\ensuremath{{\{name.lower().replace('lamda', 'lambda')}}}"
    for name in (
        "ALPHA", "BETA", "GAMMA", "DELTA", "EPSILON", "ZETA", "ETA", "THETA", "IOTA", "KAPPA", "LAMDA", "MU", "NU",
        "XI", "PI", "RHO", "SIGMA", "TAU", "UPSILON", "PHI", "CHI", "PSI", "OMEGA",
    )
}  # fmt: skip
_SIGNS |= {
    unicodedata.lookup(
        f"GREEK CAPITAL LETTER {name}"
    ): rf"\ensuremath{{\{name.capitalize().replace('Lamda', 'Lambda')}}}"
    for name in ("GAMMA", "DELTA", "THETA", "LAMDA", "XI", "PI", "SIGMA", "UPSILON", "PHI", "PSI", "OMEGA")
}
_SIGNS |= dict(zip("ΑΒΕΖΗΙΚΜΝΟΡΤΧ", "ABEZHIKMNOPTX", strict=True))

_KNOWN = frozenset("¡¿£¥€§¶©®°·²³µ†‡•‘’“”—ßÆæØøŒœŁłı")
"""Signs that LaTeX sets as they are in any of its fonts, beside accented letters."""

_OGONEK = "\N{COMBINING OGONEK}"

_OMITTED_COLUMNS = {"95 % over tasks", "p"}
_SHORT_HEADINGS = {"95 % over seeds": "95 %", "seeds in favour": "in favour"}
"""Paired differences have many columns: without these, and with short heads, they are legible on a page of paper."""


def render(report: Report) -> str:
    """Render the results, the paired differences and the costs of every task, a table each."""
    entries = []
    first: dict[str, str] = {}
    """For every key, the label of the first table that has it, which the others refer to."""
    for number, task in enumerate(report.tasks, 1):
        differences = tables.build_differences(report, task)
        for name, what, table in (
            ("results", "Results", tables.build_results(report, task)),
            ("differences", "Paired differences", differences and _drop_columns(differences)),
            ("costs", "Time and memory", tables.build_costs(task)),
        ):
            if table is not None:
                label = f"tab:{name}-{number}"
                entries.append((what, label, table, first.setdefault(table.key, label)))
    delimiters = {
        "block_start_string": "<%", "block_end_string": "%>", "variable_start_string": "<<", "variable_end_string": ">>",
        "comment_start_string": "<#", "comment_end_string": "#>",
    }  # fmt: skip
    return load_template("report.tex", escape, **delimiters).render(report=report, entries=entries)


def _drop_columns(table: Table) -> Table:
    places = [number for number, column in enumerate(table.columns) if column not in _OMITTED_COLUMNS]
    return replace(
        table,
        columns=[_SHORT_HEADINGS.get(table.columns[place], table.columns[place]) for place in places],
        rows=[[row[place] for place in places] for row in table.rows],
        texts=[places.index(place) for place in table.texts],
    )


def escape(text: str) -> str:
    """Make LaTeX show text as it is."""
    return "".join(_SIGNS.get(sign) or _replace_unknown(sign) for sign in " ".join(text.split()))


def _replace_unknown(sign: str) -> str:
    """A sign that stands for itself; one that would stop LaTeX, as its number."""
    parts = unicodedata.normalize("NFD", sign)
    accented = sign < "\u0180" and parts[0].isascii() and _OGONEK not in parts
    return sign if accented or sign in _KNOWN else f"[U+{ord(sign):04X}]"
