"""This package is the command `hf-compressm`."""
