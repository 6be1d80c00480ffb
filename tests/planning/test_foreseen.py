"""Warnings before the first step."""

from __future__ import annotations

import shutil
import warnings
from collections import namedtuple

import pytest

from atesd.run import Run
from atesd.trainer import train

Usage = namedtuple("Usage", "total used free")


def warnings_of(config) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Run.build(config).close()
    return "\n".join(str(each.message) for each in caught)


@pytest.mark.parametrize(("steps", "told"), [(1, "its only step has a learning rate of 0"), (2, "step 1 has"), (3, "")])
def test_a_run_that_is_all_warm_up_is_warned_of(tiny_config, steps, told):
    found = warnings_of(tiny_config(max_steps=steps, warmup_steps=2))
    assert told in found and ("learning rate of 0" in found) == bool(told)


@pytest.mark.parametrize("use_peft", [True, False])
def test_checkpoints_that_will_not_fit_are_warned_of(tiny_config, monkeypatch, use_peft):
    settings = {"use_peft": use_peft, "lora_r": 64, "save_total_limit": 2}
    config = tiny_config(**settings)
    config.max_steps = 1
    one = sum(path.stat().st_size for path in (train(config) / "checkpoints").rglob("*.*"))
    for share, warned in ((2.5, True), (4.5, False)):  # three checkpoints are needed
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=share * one: Usage(1e12, 0, free))
        found = warnings_of(tiny_config(**settings, output_dir=f"{config.output_dir}-{share}"))
        assert ("checkpoints of about" in found) == warned
