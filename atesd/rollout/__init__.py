"""Engines that write the student's responses, behind one protocol."""

from atesd.rollout.engine import BaseEngine, Rollout, RolloutEngine, RolloutError, Sampling
from atesd.rollout.make import check_processes, make_engine

__all__ = ["BaseEngine", "Rollout", "RolloutEngine", "RolloutError", "Sampling", "check_processes", "make_engine"]
