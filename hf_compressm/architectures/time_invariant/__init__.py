"""Time-invariant families have layers whose Hankel singular values follow from their weights: the paper's LRU."""
