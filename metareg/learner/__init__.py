"""A learner: a model, an algorithm and augmenters, with all that trains, evaluates and stores them."""
