"""The tables of a report in LaTeX, for ``\\input``; they need booktabs, and graphicx to fit the page."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import replace

from metareg.reporting import tables
from metareg.reporting.analysis import Report
from metareg.reporting.tables import Table

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

_LEFT_OUT = {"95 % over tasks", "p"}
_HEADS = {"95 % over seeds": "95 %", "seeds in favour": "in favour"}
"""Paired differences have many columns: without these, and with short heads, they are legible on a page of paper."""


def render(report: Report) -> str:
    """The results, the paired differences and the costs of every task, a table each."""
    lines = [rf"% {_escaped(report.title)}", r"% \usepackage{booktabs,graphicx}", ""]
    explained: dict[str, str] = {}
    for number, task in enumerate(report.tasks, 1):
        differences = tables.differences(report, task)
        for name, what, table in (
            ("results", "Results", tables.results(report, task)),
            ("differences", "Paired differences", differences and _narrow(differences)),
            ("costs", "Time and memory", tables.costs(task)),
        ):
            if table is not None:
                lines += [*_table(table, what, f"tab:{name}-{number}", explained), ""]
    return "\n".join(lines)


def _narrow(table: Table) -> Table:
    places = [number for number, column in enumerate(table.columns) if column not in _LEFT_OUT]
    return replace(
        table,
        columns=[_HEADS.get(table.columns[place], table.columns[place]) for place in places],
        rows=[[row[place] for place in places] for row in table.rows],
        texts=[places.index(place) for place in table.texts],
    )


def _table(table: Table, what: str, label: str, explained: dict[str, str]) -> list[str]:
    """A table; `explained` has the label of the first table with a key, where the others find it."""
    title = f"{what}: {_escaped(table.title)}"
    first = explained.setdefault(table.key, label)
    key = _escaped(table.key) if first == label else rf"The rest is as in Table~\ref{{{first}}}."
    columns = [
        "r" if number >= table.headers and number not in table.texts else "l" for number in range(len(table.columns))
    ]
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption[{{{title}}}]{{{title}. {_escaped(table.note)} {key}}}",
        rf"\label{{{label}}}",
        r"\medskip",
        r"\small\setlength{\tabcolsep}{4pt}",
        # As wide as the text at most, whatever the number of columns.
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{{''.join(columns)}}}",
        r"\toprule",
        _row(table.columns),
        r"\midrule",
    ]
    before = None
    for row in table.rows:
        if before is not None and row[0] != before:
            lines.append(r"\addlinespace")
        before = row[0]
        lines.append(_row(row))
    return [*lines, r"\bottomrule", r"\end{tabular}}", r"\end{table}"]


def _row(cells: Sequence[str]) -> str:
    return " & ".join(map(_escaped, cells)) + r" \\"


def _escaped(text: str) -> str:
    return "".join(_SIGNS.get(sign) or _plain(sign) for sign in " ".join(text.split()))


def _plain(sign: str) -> str:
    """A sign that stands for itself; one that would stop LaTeX, as its number."""
    parts = unicodedata.normalize("NFD", sign)
    accented = sign < "\u0180" and parts[0].isascii() and _OGONEK not in parts
    return sign if accented or sign in _KNOWN else f"[U+{ord(sign):04X}]"
