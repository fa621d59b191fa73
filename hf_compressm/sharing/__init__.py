"""What goes with a model to the Hub: its card, its pictures, its record."""
