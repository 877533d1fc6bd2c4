"""What `device.py` measures: each part is a function that yields rows, which are dicts for JSON."""
