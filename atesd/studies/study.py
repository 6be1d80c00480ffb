"""`atesd study`: runs every variant of a study at every seed, measures each before and after, and compares them.

Runs go one after the other, or `jobs` at a time. A killed study goes on where it was. Finished runs are kept, and a run
with the settings of a finished one, in this study or in one beside it, is not made again.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager, suppress
from functools import cache
from itertools import islice
from multiprocessing import active_children, get_context
from pathlib import Path

from atesd.config.load import settle_paths
from atesd.errors import ConfigError
from atesd.files import write_json
from atesd.storage.folder import own
from atesd.studies.comparison import compare_variants
from atesd.studies.spec import OWN, StudySpec
from atesd.studies.study_report import STUDY, WRITTEN, load_study, write_study_report
from atesd.studies.trial import (
    MEASURED,
    Trial,
    check_measurable,
    digest_of,
    digest_of_files,
    read_result,
    resumed,
    run_trial,
    write_result,
)
from atesd.terminal import one_line_messages, show

PR_SET_PDEATHSIG = 1


def run_study(
    spec: StudySpec,
    flags: list[str],
    output_dir: str,
    jobs: int = 1,
    written: tuple[str, ...] = WRITTEN,
    report: Callable[[Path], Path] = write_study_report,
) -> Path:
    """Runs the study. Returns its folder, with `study.json`, and a folder VARIANT/seed-N for each run.

    Args:
        spec: the study.
        flags: settings over those of the study, as for `atesd train`.
        output_dir: the folder; the same one goes on with a study.
        jobs: runs at a time, each in a process of its own with its share of the processor's cores.
        written, report: what is drawn from the numbers once all are there, and by what.

    Raises:
        ConfigError: settings are unusable, or the folder holds files that this study has not written. Raised before
            the first run starts.
    """
    spelled = {flag.partition("=")[0].lstrip("-").replace("-", "_") for flag in flags}
    if "push_to_hub" in spelled:
        raise ConfigError("push_to_hub is set: a study has many runs, and one repository holds one. Leave it out")
    if taken := spelled & set(OWN):
        raise ConfigError(f"--{min(taken)} is the study's own to set: leave it out")
    if jobs < 1:
        raise ConfigError(f"jobs is {jobs}; it must be at least 1")
    folder = Path(output_dir)
    with own(folder, "output_dir") as owned:
        try:
            refuse_results_of_others(folder, spec.name, written)
            trials = list(trials_of(spec, flags, folder))
            finished = dict(finished_runs(folder))
            todo: dict[str, Trial] = {}  # of equal runs only the first is made
            for trial in trials:
                if trial.result() is None and trial.digest not in finished:
                    todo.setdefault(trial.digest, trial)
            for number, trial in enumerate(run_all(list(todo.values()), jobs), 1):
                finished[trial.digest] = trial.folder / MEASURED
                show(f"{number} of {len(todo)} runs: {trial.folder}")
        except BaseException:
            owned.discard()  # the folder goes if there is no run in it
            raise
        for trial in trials:
            if trial.result() is None:
                share(finished[trial.digest], trial)
        write_json(folder / STUDY, compare_variants(spec, trials))
        return report(folder)


def refuse_results_of_others(folder: Path, name: str, written: tuple[str, ...]) -> None:
    """Raises ConfigError if the study would replace a file that it has not written."""
    if (folder / STUDY).is_file():
        if (of := load_study(folder)["study"]) != name:
            raise ConfigError(f"{folder} holds the results of the study {of!r}: choose another output_dir for {name!r}")
    elif found := [each for each in written if (folder / each).exists()]:
        raise ConfigError(f"{folder} holds {found[0]}, and no study wrote it: move it, or choose another output_dir")


def trials_of(spec: StudySpec, flags: list[str], folder: Path) -> Iterator[Trial]:
    """Yields the runs of a study, seed by seed, so that a part of the study compares all of its variants."""
    file_digest = cache(digest_of_files)  # most runs read the same ones
    for seed in spec.seeds:
        for variant in spec.variants:
            run_dir = folder / variant / f"seed-{seed}"
            # load_config refuses a folder that holds a run; `resumed` looks into it
            config = spec.config(variant, seed, run_dir / "new" if run_dir.exists() else run_dir, flags)
            check_measurable(config)
            config.output_dir = str(run_dir)
            settle_paths(config)
            digest = digest_of(config, spec.measure, file_digest)
            yield Trial(variant, seed, spec.measure, run_dir, resumed(run_dir, config, digest), digest)


def finished_runs(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yields the digest and file of every finished run of this study, and of the finished studies beside it."""
    beside = [file.parent for file in sorted(folder.absolute().parent.glob(f"*/{STUDY}"))]
    for study in (*beside, folder):
        for file in sorted(study.glob(f"*/seed-*/{MEASURED}")):
            try:
                yield json.loads(file.read_text(encoding="utf-8"))["digest"], file
            except (OSError, ValueError, KeyError, TypeError):
                continue  # of another program: that run is made


def share(source: Path, trial: Trial) -> None:
    """Takes over the numbers of an equal run."""
    trial.folder.mkdir(parents=True, exist_ok=True)
    write_result(
        trial.folder / MEASURED,
        {
            **read_result(source),
            "variant": trial.variant,
            "seed": trial.seed,
            "same_as": os.path.relpath(source, trial.folder),
        },
    )


def run_all(todo: list[Trial], jobs: int) -> Iterator[Trial]:
    """Makes the runs. Yields each as it ends."""
    if jobs == 1 or len(todo) < 2:
        for trial in todo:
            run_trial(trial)
            yield trial
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    waiting, running = iter(todo), {}
    with ProcessPoolExecutor(jobs, get_context("spawn"), start_worker, (threads,)) as pool, ended_together(pool):
        while True:
            for trial in islice(waiting, jobs - len(running)):  # no more: after an error, those would still be made
                running[pool.submit(run_trial, trial)] = trial
            if not running:
                return
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                done.result()
                yield running.pop(done)


@contextmanager
def ended_together(pool: ProcessPoolExecutor) -> Iterator[None]:
    """Context in which a signal that ends this process ends the workers' runs too, each saved after its step."""
    try:
        yield
    except KeyboardInterrupt:
        for worker in active_children():
            worker.terminate()
        pool.shutdown(cancel_futures=True)
        raise


def start_worker(threads: int) -> None:
    """Of a process that makes runs: its share of the cores, messages as in a command, an end with its parent's."""
    import torch

    torch.set_num_threads(threads)
    one_line_messages()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # Linux; a run under way is saved
