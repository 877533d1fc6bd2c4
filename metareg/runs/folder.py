"""The names of the files in a run's folder, which `metareg.Run` describes."""

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
