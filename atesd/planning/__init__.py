"""Checks before a run: its memory and prompts, its scaling, and this machine's hardware and software."""
