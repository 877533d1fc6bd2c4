"""The names of what is in a run's folder; `metareg.Run` says what each of them holds."""

from __future__ import annotations

__all__ = [
    "ANALYSIS",
    "BASELINES",
    "CHECKPOINTS",
    "CONFIG",
    "ENVIRONMENT",
    "FINAL",
    "METRICS",
    "PLOTS",
    "RESULTS",
    "TIMING",
]

CONFIG = "config.yaml"
ENVIRONMENT = "environment.json"
METRICS = "metrics.jsonl"
TIMING = "timing.jsonl"
CHECKPOINTS = "checkpoints"
FINAL = f"{CHECKPOINTS}/final.safetensors"
PLOTS = "plots"
RESULTS = "results.json"
BASELINES = "baselines.json"
ANALYSIS = "analysis.json"
