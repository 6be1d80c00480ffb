"""Samples, grades and summarises answers: `atesd eval`, `atesd eval --compare` and evaluation during training."""
