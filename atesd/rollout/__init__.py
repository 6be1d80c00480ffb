"""Rollout engines: they generate the student's responses. All implement one protocol."""

from atesd.rollout.engine import BaseEngine, Rollout, RolloutEngine, RolloutError, Sampling
from atesd.rollout.make import check_processes, make_engine

__all__ = ["BaseEngine", "Rollout", "RolloutEngine", "RolloutError", "Sampling", "check_processes", "make_engine"]
