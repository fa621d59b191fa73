"""Families with scalar decay have one decay rate for all states of a head: Mamba-2 and the hybrids."""
