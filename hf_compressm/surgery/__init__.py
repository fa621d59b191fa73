"""Resizing the state of a model in place, with everything that hangs on it: all at once or not at all."""
