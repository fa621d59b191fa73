"""The command `hf-compressm`."""
