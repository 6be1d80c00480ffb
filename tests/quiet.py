"""Runs what warns of things that a test is not about."""

import warnings
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def quietly(make: Callable[[], T]) -> T:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()
