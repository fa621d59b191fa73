"""What the library knows of each architecture: a file for each, which declares its family."""
