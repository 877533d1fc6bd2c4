"""``metareg analyse``: where a run's learner adapts, as JSON, a plot and tables."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from metareg.runs.adaptation import Analysis, measure_adaptation
from metareg.runs.analysis_plots import plot_analysis
from metareg.runs.folder import ANALYSIS, PLOTS
from metareg.runs.run import Run
from metareg.util.files import replace_file, write_json

__all__ = ["analyse"]


def analyse(run: Run | str | Path, tasks: int = 100, inner_steps: int | None = None) -> Analysis:
    """Analyse where a finished run's learner adapts; writes ``analysis.json`` and ``plots/analysis.png`` into its folder.

    Args:
        run: the run, or its folder.
        tasks: the number of tasks per split.
        inner_steps: inner steps of the analysis; by default, as many as in training.

    Raises:
        UsageError: the run is not finished, or its algorithm adapts nothing.
    """
    run = run if isinstance(run, Run) else Run.load(run)
    found = measure_adaptation(run, tasks, run.config.inner_steps if inner_steps is None else inner_steps)
    write_json(run.path / ANALYSIS, asdict(found))
    with replace_file(run.path / PLOTS / "analysis.png") as temporary:
        plot_analysis(found, run.config.title).savefig(temporary, format="png", dpi=120)
    return found
