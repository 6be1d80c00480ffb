"""What the teacher reads: how much of a reference, whose, and in which order."""
