"""Before a run: what it would need and read, how it would scale, and what this machine has."""
