"""Answers to problems, graded and counted: `atesd eval`, `atesd eval --compare` and evaluations during training."""
