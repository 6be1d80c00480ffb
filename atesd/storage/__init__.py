"""Folders that one process at a time owns, and checkpoints that are whole or absent."""
