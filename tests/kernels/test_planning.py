"""How many rows a chunk of the Triton backend has on a GPU, of which only the memory is asked; and who runs there."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from atesd_kernels import planning
from atesd_kernels.planning import ChunkPlan, choose_backend, gpu_chunk_bytes, gpu_memory

VOCAB = 151_936
GIB = 1 << 30


@pytest.fixture
def gpu(monkeypatch):
    def with_memory(gib: float) -> torch.device:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        properties = SimpleNamespace(total_memory=int(gib * GIB))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        return torch.device("cuda")

    return with_memory


def chunks_of(num_rows: int, bytes_per_logit: int, trained_head: bool, device: torch.device) -> list[int]:
    budget = gpu_chunk_bytes(num_rows, VOCAB, bytes_per_logit, trained_head, gpu_memory(device))
    plan = ChunkPlan.make(num_rows, VOCAB, bytes_per_logit, device, budget)
    sizes = [rows.stop - rows.start for rows in plan.row_chunks(num_rows)]
    assert sum(sizes) == num_rows and max(sizes) * VOCAB * bytes_per_logit <= budget
    return sizes


@pytest.mark.parametrize("num_rows", (7, 1023, 1024, 1500, 5000, 8191, 8192, 100_000))
@pytest.mark.parametrize("trained_head, least", ((False, 1024), (True, 4096)))
def test_chunks_are_neither_short_nor_long_where_memory_allows(num_rows, trained_head, least, gpu):
    *others, last = chunks_of(num_rows, 6, trained_head, gpu(79.2))  # fp32 S and bf16 D
    assert all(size == others[0] >= least and size % 16 == 0 for size in others)
    assert max(last, *others, 0) < 2 * least
    assert last == num_rows if not others else 4 * last >= others[0]


@pytest.mark.parametrize("rows_of_budget", (1, 5, 40, 100, 513, 520, 1000))
def test_chunks_of_a_gpu_keep_to_their_budget_and_the_last_one_is_not_short(rows_of_budget, gpu):
    device = gpu(79.2)
    for num_rows in (12, 33, 1000, 1001, 1539, 2049, 8192):
        plan = ChunkPlan.make(num_rows, VOCAB, 6, device, rows_of_budget * VOCAB * 6)
        sizes = [rows.stop - rows.start for rows in plan.row_chunks(num_rows)]
        assert max(sizes) <= rows_of_budget
        assert 4 * sizes[-1] >= sizes[0] or rows_of_budget < 100  # many small chunks: a row of each adds up


def test_chunks_of_a_gpu_keep_the_alignment_of_what_has_a_value_a_row(gpu):
    device = gpu(79.2)
    for num_rows in (1000, 1001, 8192, 100_000):
        for rows_of_budget in (100, 1000):
            plan = ChunkPlan.make(num_rows, VOCAB, 6, device, rows_of_budget * VOCAB * 6)
            assert plan.rows % 16 == 0 or plan.rows == num_rows, (num_rows, rows_of_budget)


def test_a_small_gpu_gives_an_eighth_of_its_memory(gpu):
    sizes = chunks_of(8192, 6, True, gpu(24))
    assert max(sizes) * VOCAB * 6 <= 3 * GIB < 4096 * VOCAB * 6


def test_a_cpu_keeps_to_its_own_budget():
    assert gpu_chunk_bytes(8192, VOCAB, 6, True, gpu_memory(torch.device("cpu"))) == 128 << 20


def test_without_triton_a_gpu_runs_the_torch_backend_and_no_other(monkeypatch):
    device = torch.device("cuda")
    assert choose_backend("auto", device, torch.bfloat16, True) == "triton"
    monkeypatch.setattr(planning, "HAS_TRITON", False)
    assert choose_backend("auto", device, torch.bfloat16, True) == "torch"
    with pytest.raises(ValueError, match=r"'triton' is not available: .*pip install triton"):
        choose_backend("triton", device, torch.bfloat16, True)


def test_the_retired_backend_is_refused_with_what_to_use_instead():
    with pytest.raises(ValueError, match=r"was retired: .*Use backend='triton'"):
        choose_backend("triton_tiled", torch.device("cpu"), torch.float32, True)


def test_a_missing_triton_is_noticed_and_an_installed_one_is_not_imported():
    told = "planning.HAS_TRITON, bool(sys.modules.get('triton'))"
    code = f"import sys{{}}; from atesd_kernels import planning; print({told})"
    for hidden, printed in (("", "True False"), ("; sys.modules['triton'] = None", "False False")):
        done = subprocess.run([sys.executable, "-c", code.format(hidden)], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == printed
