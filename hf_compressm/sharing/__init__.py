"""This package shares a model on the Hub, with its card, its pictures and its record."""
