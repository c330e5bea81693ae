"""Speed and size, measured: `python -m benchmarks.steps`."""
