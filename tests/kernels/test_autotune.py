"""Which tile sizes the opt-in tuner tries, and that it asks a machine once. The timing itself needs a GPU."""

import json

import pytest

from atesd_kernels import autotune, tuning
from atesd_kernels.tuning import TileConfig


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ATESD_CACHE_DIR", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("table", (tuning.TILES, tuning.SECOND_PASS_TILES, tuning.ONE_MODEL_TILES))
@pytest.mark.parametrize("arch", autotune.SHARED_BYTES)
def test_few_configurations_are_tried_and_all_fit_the_gpu(arch, table):
    configs = autotune.candidates(table[arch], arch, itemsize=2, operands=2)
    assert configs[0] == table[arch]
    assert 2 <= len(configs) == len(set(configs)) <= 19
    for c in configs:
        assert c.num_stages * c.block_k * 2 * (2 * c.block_m + c.block_n) <= autotune.SHARED_BYTES[arch]


def test_the_fastest_is_taken_and_remembered(cache):
    slow, fast, broken = (TileConfig(64, n, 64, 4, 2) for n in (16, 32, 64))
    tried = []

    def launch(config):
        tried.append(config)
        if config == broken:
            raise RuntimeError("out of resource: shared memory")

    def milliseconds(run):
        run()
        return 1.0 if tried[-1] == fast else 2.0

    assert autotune.fastest("a kernel", [slow, broken, fast], launch, milliseconds) == fast
    assert tried == [slow, broken, fast]
    assert autotune.fastest("a kernel", [slow, broken, fast], launch, milliseconds) == fast
    assert len(tried) == 3
    autotune.fastest("another", [slow], launch, milliseconds)
    assert set(json.loads((cache / "tile_sizes.json").read_text())) == {"a kernel", "another"}


def test_a_default_that_cannot_run_is_an_error():
    def launch(config):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        autotune.fastest("a kernel", [TileConfig(64, 16, 64, 4, 2)], launch, lambda run: run())


def test_tuning_is_off_unless_asked_for(monkeypatch):
    monkeypatch.delenv("ATESD_AUTOTUNE", raising=False)
    assert not autotune.enabled()
    monkeypatch.setenv("ATESD_AUTOTUNE", "1")
    assert autotune.enabled()
