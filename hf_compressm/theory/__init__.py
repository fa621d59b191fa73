"""This room holds the mathematics, in torch and nothing else: Hankel singular values, statistics, scores, plans."""
