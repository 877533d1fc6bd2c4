"""The learner: a model with an algorithm and augmenters, its training, evaluation and files."""
