"""Mathematics, in torch and nothing else: Hankel singular values, statistics, scores, plans."""
