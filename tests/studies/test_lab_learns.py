"""What a run is for, on the lab's committed model: its own references teach it what those of other problems do not."""

from __future__ import annotations

from pathlib import Path

import pytest

from atesd.config import load_config
from atesd.reports.learned import read_comparison
from atesd.reports.metrics import METRICS, read_steps
from atesd.studies.lab.pretrain import make_lab
from atesd.trainer import train
from tests.quiet import quietly

pytest.importorskip("math_verify", reason="grading needs math-verify")

MODEL = Path(__file__).parents[2] / "bench" / "results" / "studies" / "lab-model"
FLAGS = (
    "--exposure_policy full --learning_rate 2e-3 --max_steps 40 --save_steps 40 --eval_steps 40 "
    "--num_eval_problems 128 --per_device_train_batch_size 32"
)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return quietly(lambda: make_lab(tmp_path_factory.mktemp("world") / "lab", model=MODEL))


def test_the_own_references_teach_what_those_of_other_problems_do_not(lab, monkeypatch):
    monkeypatch.chdir(lab.parent)
    after, nll = {}, {}
    for source in ("own", "other_problem"):
        flags = [*FLAGS.split(), "--reference_source", source, "--output_dir", f"runs/{source}"]
        run_dir = quietly(lambda flags=flags: train(load_config("lab", flags)))
        after[source] = read_comparison(run_dir)["after"]
        steps = read_steps(run_dir / METRICS)[0]
        nll[source] = steps[-1]["probe_nll"] / steps[1]["probe_nll"]
    assert after["own"]["low"] > after["other_problem"]["high"], after
    assert nll["own"] < 0.5 < nll["other_problem"], nll
