"""The studies that `reproduce.py` repeats: time-invariant layers on images, Mamba on recall, copying and text."""
