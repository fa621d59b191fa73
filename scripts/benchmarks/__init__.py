"""The studies that `benchmark.py` runs. Each takes the arguments and returns what goes into the JSON."""
