"""Grading: compares the final answer of a response with the reference answer."""
