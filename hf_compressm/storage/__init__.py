"""Storage reads and writes checkpoints, the history of cuts, and the formats of other tools."""
