"""Chooses how much of the reference the teacher reads: policies, the learned controller, its signals and rewards."""
