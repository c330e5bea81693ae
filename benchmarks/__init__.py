"""Measurements of speed and size: `python -m benchmarks.steps`, `.scale` and `.data`."""
