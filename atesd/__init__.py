"""ATESD: adaptive teacher exposure for on-policy self-distillation. Importing this package loads nothing heavy."""

__version__ = "0.1.0"
