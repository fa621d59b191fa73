"""Surgery resizes the state of a model in place, with its optimizer and config: as a whole or not at all."""
