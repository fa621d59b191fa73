"""These modules hold the studies of `reproduce.py`: LRUs on images, and Mamba on recall, copying and text."""
