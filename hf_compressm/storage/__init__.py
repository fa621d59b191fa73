"""Files: checkpoints, the history of cuts, and the formats of other tools."""
