"""Grids of runs, and what they have in common."""
