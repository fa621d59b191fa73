"""These modules hold the studies of `benchmark.py`: each takes the arguments and returns what goes into the JSON."""
