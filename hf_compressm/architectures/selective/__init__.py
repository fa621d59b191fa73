"""Selective families have layers whose maps depend on their input: Mamba-1 and its kin."""
