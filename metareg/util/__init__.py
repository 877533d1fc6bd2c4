"""Utilities that are independent of the rest of metareg: files, seeds, signals, memory layouts."""
