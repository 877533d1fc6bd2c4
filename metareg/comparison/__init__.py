"""Comparisons: algorithms × augmenters × tasks × seeds, run by several processes, and their results."""
