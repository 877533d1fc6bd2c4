"""Comparisons: algorithms × augmenters × tasks × seeds, carried out by several processes, and what they show."""
