"""Thin adapters that connect the losses to models and trainers of other libraries."""
