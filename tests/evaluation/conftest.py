"""Settings of an evaluation that all of this room use."""

import pytest

from atesd.config.eval_config import EvalConfig


@pytest.fixture
def make(tiny_model_path, sums, tmp_path):
    """Settings of an evaluation of 3 problems; keyword arguments change them."""

    def config(**changes) -> EvalConfig:
        settings = {
            "model_name_or_path": str(tiny_model_path),
            "dataset_name": str(sums),
            "num_problems": 3,
            "num_generations": 4,
            "max_completion_length": 8,
            "batch_size": 5,
            "num_bootstrap": 200,
            "output_dir": str(tmp_path / "eval"),
        }
        return EvalConfig(**{**settings, **changes})

    return config
