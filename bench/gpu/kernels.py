"""Stage 4: where the time goes, and the launch table that suits this GPU.

Each part stands alone: the products one by one, the profiler's view of whole calls, rows of a chunk, then blocks and
warps of the row kernels. The last prints the entries that `tuning.py` should have.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial

import torch

import atesd_kernels
from atesd_kernels.backends import tuning
from atesd_kernels.divergences import get_divergence
from atesd_kernels.spec import DivergenceSpec
from bench import entrants, machine
from bench.entrants import DTYPES, Inputs
from bench.gpu import headline
from bench.gpu.clock import first_line, milliseconds
from bench.gpu.products import one_by_one
from bench.gpu.stage import Stage
from bench.shapes import Shape, synthetic

CHUNK, TOY_CHUNK = 1024, 40
# calls whose kernels are timed: name, options, trained head
CALLS = (
    ("forward_kl", dict(divergence="forward_kl"), False),
    ("forward_kl, trained head", dict(divergence="forward_kl"), True),
    ("jsd", dict(divergence="jsd"), False),
    ("entry_clip", dict(divergence="forward_kl", entry_clip=entrants.ENTRY_CLIP), False),
)
# (entries a program reads at once, warps, stages)
ROW_CONFIGS = (
    (1024, 8, 2), (512, 4, 2), (1024, 4, 2), (2048, 8, 2), (2048, 4, 2), (2048, 16, 2), (4096, 8, 2), (4096, 16, 2),
    (8192, 16, 2), (1024, 8, 1), (1024, 8, 3), (4096, 16, 3),
)  # fmt: skip
SWEEPS = (
    ("forward_kl", {}),
    ("jsd", {}),
    ("forward_kl", {"entry_clip": entrants.ENTRY_CLIP}),
)


def run(stage: Stage) -> None:
    shape, tokens = headline.sizes(stage)
    rows = TOY_CHUNK if stage.dry else CHUNK
    x = synthetic(shape, tokens).to(DTYPES["bf16"])
    stage.keep(tokens=tokens, shape=shape._asdict())
    products(stage, x, rows)
    profiles(stage, x)
    if stage.dry:
        return  # the rest is about launches
    chunk_rows(stage, x)
    row_sweep(stage, x, rows)


def products(stage: Stage, x: Inputs, rows: int) -> None:
    hidden, vocab = x.weight.shape[1], x.weight.shape[0]
    found = {}
    for count in dict.fromkeys((rows, min(len(x.student), 4 * rows))):
        for name, product in one_by_one(x, count).items():
            took = statistics.median(milliseconds(product))
            found[f"{name}, {count:,} rows"] = {
                "ms": took,
                "flops_per_second": 2 * count * hidden * vocab / took * 1e3,
            }
    stage.keep(products=found)
    stage.say("products one by one: done")


def profiles(stage: Stage, x: Inputs) -> None:
    """Milliseconds and launches of each kernel of a call, from the profiler."""
    from torch.profiler import ProfilerActivity, profile

    backend = "torch" if stage.dry else "triton"
    jobs: dict[str, Callable] = {}
    for name, options, trained in CALLS:
        call = lambda x, options=options: atesd_kernels.linear_divergence(  # noqa: E731
            x.student, x.weight, x.teacher, backend=backend, **options
        )
        jobs[name] = partial(headline.gradients, call, x, trained)
    jobs["logprobs"] = partial(headline.gradients, partial(entrants.ours, "logprobs", backend=backend), x, False)
    activity = ProfilerActivity.CPU if stage.dry else ProfilerActivity.CUDA
    found = {}
    for name, job in jobs.items():
        job()
        if not stage.dry:
            torch.cuda.synchronize()
        with profile(activities=[activity]) as profiler:
            job()
            if not stage.dry:
                torch.cuda.synchronize()
        total = {}
        for event in profiler.key_averages():
            micro = event.self_cpu_time_total if stage.dry else event.self_device_time_total
            if micro:
                total[event.key[:120]] = {"ms": micro / 1e3, "launches": event.count}
        found[name] = dict(sorted(total.items(), key=lambda item: -item[1]["ms"])[:14])
        stage.keep(profiles=found)
        stage.say(f"profile of {name}:")
        for kernel, row in list(found[name].items())[:10]:
            stage.say(f"    {row['ms']:8.3f} ms  {row['launches']:4d} x  {kernel[:90]}")


def chunk_rows(stage: Stage, x: Inputs) -> None:
    found = {}
    for trained in (False, True):
        for rows in (512, 1024, 2048, 4096, 8192):
            call = lambda x, rows=rows: atesd_kernels.linear_divergence(  # noqa: E731
                x.student, x.weight, x.teacher, backend="triton", chunk_bytes=6 * len(x.weight) * rows
            )
            took = statistics.median(milliseconds(partial(headline.gradients, call, x, trained), rounds=5, warm_up=1))
            found[f"{'trained' if trained else 'frozen'} head, {rows:,} rows"] = took
    stage.keep(chunk_rows=found)
    stage.say("rows of a chunk: " + ", ".join(f"{name} {took:.1f} ms" for name, took in found.items()))


@contextmanager
def launch_config(table: str, config: object):
    """Launch every kernel of a table of `tuning`, such as "row_config", with `config`."""
    kept = getattr(tuning, table)
    setattr(tuning, table, lambda *_: config)
    try:
        yield
    finally:
        setattr(tuning, table, kept)


def sweep_of(name: str, options: dict, vocab: int, rows: int, device: str) -> Callable[[], None]:
    """The row kernels of one chunk, over logits that lie in memory."""
    from atesd_kernels.backends.triton_chunked import Sweeps

    spec = DivergenceSpec(
        backend="triton", divergence=get_divergence(name, 0.5).key, beta=0.5, temperature=1.0, teacher_temperature=1.0,
        softcap=None, entry_clip=options.get("entry_clip"), token_clip=None, logits_dtype=torch.float32,
        compute_dtype=torch.bfloat16, chunk_bytes=None, stats=False, hidden_grad=True,
    )  # fmt: skip
    s = torch.randn(rows, vocab, device=device) * 3
    d = (torch.randn(rows, vocab, device=device) * 0.3).bfloat16()
    sweeps = Sweeps(spec, rows, vocab, 1, (None, None), torch.device(device))
    return lambda: sweeps.run(s, d, d, slice(0, rows), None, None, None, 1.0)


def row_sweep(stage: Stage, x: Inputs, rows: int) -> None:
    vocab, found = len(x.weight), {}
    for config in ROW_CONFIGS:
        if stage.left < 12:
            stage.leave_out(f"row kernels from {config} on", "no time was left")
            break
        for name, options in SWEEPS:
            label = name + ("+entry_clip" if options else "")
            try:
                with launch_config("row_config", tuning.RowConfig(*config)):
                    job = sweep_of(name, options, vocab, rows, stage.device)
                    took = statistics.median(milliseconds(job, rounds=7))
            except Exception as error:  # a configuration that does not fit this GPU is named
                stage.say(f"{label} {config}: {first_line(error)}")
                continue
            moved = headline.BYTES.get(label, headline.OTHER_BYTES) * rows * vocab
            found.setdefault(label, []).append({"config": config, "ms": took, "bytes_per_second": moved / took * 1e3})
        stage.keep(row_kernels=found)
    for label, entries in found.items():
        for entry in sorted(entries, key=lambda e: e["ms"]):
            stage.say(f"{label}: {entry['config']}: {entry['ms']:.3f} ms, {entry['bytes_per_second'] / 1e12:.2f} TB/s")


def warm(shape: Shape = headline.SHAPE) -> list[Callable[[], object]]:
    """Calls that compile what `run` launches."""
    device = entrants.DEVICE

    def rows_of(config: tuple, name: str, options: dict) -> None:
        with launch_config("row_config", tuning.RowConfig(*config)):
            sweep_of(name, options, shape.vocab, headline.ONE_PROGRAM_A_ROW, device)()

    def logprobs() -> None:
        h = torch.zeros(headline.ONE_PROGRAM_A_ROW, 16, dtype=torch.bfloat16, device=device, requires_grad=True)
        w = torch.zeros(shape.vocab, 16, dtype=torch.bfloat16, device=device)
        targets = torch.zeros(len(h), dtype=torch.long, device=device)
        atesd_kernels.linear_logprobs(h, w, targets, backend="triton").mean().backward()

    return [
        logprobs,
        *(partial(rows_of, config, name, options) for config in ROW_CONFIGS for name, options in SWEEPS),
    ]


def table(result: dict) -> str:
    """Products, then each call's kernels, then the best launch configurations."""
    lines = []
    if "products" in result:
        rows = [
            [name, f"{row['ms']:.3f} ms", f"{row['flops_per_second'] / 1e12:.0f}"]
            for name, row in result["products"].items()
        ]
        lines += [machine.markdown(["product", "time", "TFLOP/s"], rows), ""]
    for name, kernels in result.get("profiles", {}).items():
        whole = sum(row["ms"] for row in kernels.values())
        rows = [
            [f"`{kernel[:70]}`", str(row["launches"]), f"{row['ms']:.2f} ms", f"{100 * row['ms'] / whole:.0f} %"]
            for kernel, row in list(kernels.items())[:8]
        ]
        lines += [machine.markdown([name, "launches", "time", "share"], rows), ""]
    if "chunk_rows" in result:
        rows = [[name, f"{took:.2f} ms"] for name, took in result["chunk_rows"].items()]
        lines += [machine.markdown(["rows of a chunk", "forward KL"], rows), ""]
    for label, entries in result.get("row_kernels", {}).items():
        rows = [
            [str(tuple(e["config"])), f"{e['ms']:.3f} ms", f"{e['bytes_per_second'] / 1e12:.2f}"]
            for e in sorted(entries, key=lambda e: e["ms"])[:4]
        ]
        lines += [machine.markdown([f"row kernels, {label}: block, warps, stages", "a chunk", "TB/s"], rows), ""]
    return "\n".join(lines)
