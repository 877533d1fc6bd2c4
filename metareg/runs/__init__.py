"""A run and its folder: configuration, training, checkpoints, provenance, plots, and uses of a finished run."""
