"""This package works inside Trainer: it decides when to cut, watches the states, and takes back what did harm."""
