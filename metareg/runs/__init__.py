"""A run's folder: configuration, training, checkpoints, provenance, pictures, and what is made of a finished run."""
