"""The tables of a report in LaTeX, for ``\\input``; they need booktabs, and graphicx to fit the page."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from metareg.reporting import tables
from metareg.reporting.analysis import Report
from metareg.reporting.tables import Table

__all__ = ["render"]

_SIGNS = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\ensuremath{<}", ">": r"\ensuremath{>}",
    "|": r"\textbar{}", '"': "''", "±": r"\ensuremath{\pm}", "\N{MINUS SIGN}": r"\ensuremath{-}",
    "–": "--", "×": r"\ensuremath{\times}", "…": r"\ldots{}", "→": r"\ensuremath{\to}",
}  # fmt: skip
_SIGNS |= {
    unicodedata.lookup(f"GREEK SMALL LETTER {name}"): rf"\ensuremath{{\{name.lower().replace('lamda', 'lambda')}}}"
    for name in (
        "ALPHA", "BETA", "GAMMA", "DELTA", "EPSILON", "ZETA", "ETA", "THETA", "IOTA", "KAPPA", "LAMDA", "MU", "NU",
        "XI", "PI", "RHO", "SIGMA", "TAU", "UPSILON", "PHI", "CHI", "PSI", "OMEGA",
    )
}  # fmt: skip


def render(report: Report) -> str:
    """The results, the paired differences and the costs of every task, a table each."""
    lines = [rf"% {_escaped(report.title)}", r"% \usepackage{booktabs,graphicx}", ""]
    for number, task in enumerate(report.tasks, 1):
        for name, what, table in (
            ("results", "Results", tables.results(report, task)),
            ("differences", "Paired differences", tables.differences(report, task)),
            ("costs", "Time and memory", tables.costs(task)),
        ):
            if table is not None:
                lines += [*_table(table, what, f"tab:{name}-{number}"), ""]
    return "\n".join(lines)


def _table(table: Table, what: str, label: str) -> list[str]:
    columns = [
        "r" if number >= table.headers and number not in table.texts else "l" for number in range(len(table.columns))
    ]
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{what}: {_escaped(f'{table.title}. {table.note} {table.key}')}}}",
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
    return "".join(_SIGNS.get(sign, sign) for sign in " ".join(text.split()))
