"""Thin adapters between the losses and other people's models and trainers."""
