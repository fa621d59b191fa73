"""Inside Trainer: when to cut, what to watch, and how to go back."""
