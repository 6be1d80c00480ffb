"""One run of a study: measured, trained, and measured again. Killed at any moment, it goes on where it was."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from atesd import __version__
from atesd.config import CONFIG_FILE, ATESDConfig, load_config
from atesd.config.checks import check_same_settings
from atesd.config.load import PATHS
from atesd.errors import ConfigError
from atesd.evaluation.answers import EvalProtocol, answers
from atesd.evaluation.files import fingerprint
from atesd.evaluation.grading.grader import Grader
from atesd.evaluation.statistics import pass_at
from atesd.files import sha256, write_atomically, write_json
from atesd.models.loading import model_path
from atesd.models.model_folder import MODEL_FILE
from atesd.run import Run
from atesd.storage.checkpoint import CHECKPOINTS
from atesd.storage.folder import LOCK
from atesd.studies.held_out import measure
from atesd.studies.spec import Measure
from atesd.terminal import progress
from atesd.trainer import Trainer

MEASURED, BEFORE = "measured.json", "before.json"
ANSWERS_AT_ONCE = 64
# Settings that change no number of a run.
NOT_COMPARED = (
    "output_dir resume dry_run report_to logging_steps save_steps save_total_limit save_best allow_changed_inputs "
    "allow_older_checkpoint push_to_hub teacher_device"
).split()


@dataclass(frozen=True)
class Trial:
    """One run of a study.

    Attributes:
        variant, seed, measure: of the study.
        folder: of the run.
        config: its settings; those of the run in `folder`, if there is one.
        digest: of all that decides its numbers. Runs of two studies with the same one are the same run.
    """

    variant: str
    seed: int
    measure: Measure
    folder: Path
    config: ATESDConfig
    digest: str

    @property
    def alpha(self) -> float:
        """The exposure at which the teacher is measured: the run's only one, else 1 (our choice)."""
        return self.config.fixed_alpha if self.config.exposure_policy == "fixed" else 1.0

    def result(self) -> dict[str, Any] | None:
        """Returns what was measured; None if the run is not finished."""
        file = self.folder / MEASURED
        return read_result(file) if file.is_file() else None


def digest_of_files(name_or_path: str) -> str | None:
    """Returns a digest of a file, or of a folder's files; None for what is not on this machine.

    The name of a model that ships stands for its folder.
    """
    path = Path(name_or_path)
    if path.is_file():
        return sha256(path)
    if (path / MODEL_FILE).is_file() or not path.is_dir():
        return fingerprint(model_path(name_or_path))
    files = {str(file.relative_to(path)): sha256(file) for file in sorted(path.rglob("*")) if file.is_file()}
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]


def digest_of(config: ATESDConfig, measure: Measure, file_digest: Callable[[str], str | None]) -> str:
    """Returns `Trial.digest` for settings as the study gives them.

    Settings at their defaults are left out: a setting that a later version adds changes no digest. Files count by
    their content, not by the place where they lie: a study goes on in another place.
    """
    usual = {field.name: field.default for field in fields(ATESDConfig)}
    settings = {n: v for n, v in asdict(config).items() if n not in NOT_COMPARED and v != usual[n]}
    files = {name: file_digest(value) for name in PATHS if (value := getattr(config, name))}
    settings |= {name: found for name, found in files.items() if Path(getattr(config, name)).exists()}
    content = [settings, asdict(measure), files, __version__]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def write_result(file: Path, content: dict[str, Any]) -> None:
    """Writes a run's result: its numbers by metric, in the order of `problems`, to 6 digits."""
    short = dict(content)
    for when in ("before", "after"):
        rows = content[when]
        names = next(iter(rows.values()))
        columns = {name: [float(f"{row[name]:.6g}") for row in rows.values()] for name in names}
        short[when] = {"problems": list(rows), **columns}
    write_atomically(file, json.dumps(short, separators=(",", ":")) + "\n")


def read_result(file: Path) -> dict[str, Any]:
    """Returns what `write_result` was given, `{"before": {problem id: {metric: value}}, "after": ..., ...}`."""
    try:
        content = dict(json.loads(file.read_text(encoding="utf-8")))
        for when in ("before", "after"):
            problems, columns = content[when].pop("problems"), content[when]
            values = zip(*columns.values(), strict=True)
            content[when] = {i: dict(zip(columns, row, strict=True)) for i, row in zip(problems, values, strict=True)}
        return {**content, "digest": str(content["digest"])}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{file} is no result of a run ({type(error).__name__}: {error}): remove it, and the run is made again"
        ) from error


def resumed(folder: Path, config: ATESDConfig, digest: str) -> ATESDConfig:
    """Returns the settings to go on with in `folder`: `config`, or those of the run that it holds.

    Raises:
        ConfigError: the folder holds something else, a run with other settings, or what was measured of another run.
    """
    config = settings_of(folder, config)  # first, since it names the setting that differs
    for name in (MEASURED, BEFORE):
        found = read_digest(folder / name)
        if found is not None and found != digest:
            raise ConfigError(
                f"{folder / name} was measured with other settings, another model or other data (its digest is "
                f"{found!r}, this study's {digest!r}): move {folder}, or choose another output_dir"
            )
    return config


def settings_of(folder: Path, config: ATESDConfig) -> ATESDConfig:
    """Returns the settings of the run in `folder`, which are those of `config`; `config` if it holds none."""
    if not (folder / CONFIG_FILE).is_file():
        if folder.exists() and any(not of_a_study(path) for path in folder.iterdir()):
            raise ConfigError(f"{folder} exists, and no study made it: move it, or choose another output_dir")
        return config
    saved = load_config(None, ["--resume", str(folder)])
    settled = ["resume", "output_dir", *(["bf16"] if config.bf16 is None else []), *config.up_to]
    check_same_settings(saved, config, settled, f"the run in {str(folder)!r}", "or choose another output_dir")
    return saved


def read_digest(file: Path) -> str | None:
    """Returns the digest of the run that a file was measured on; None if there is no such file."""
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["digest"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} is damaged, or of another version of atesd ({error!r}): remove it") from error


def of_a_study(path: Path) -> bool:
    """Whether a study that was killed may have left `path`, beside a run without its config.yaml."""
    empty = path.name == CHECKPOINTS and path.is_dir() and not any(path.iterdir())
    return path.name in (LOCK, MEASURED) or path.suffix == ".tmp" or empty


def run_trial(trial: Trial) -> None:
    """Trains one run, and writes what was measured before and after, problem by problem, to its measured.json."""
    trial.config.validate()
    with closing(Run.build(trial.config)) as run:
        before_file = run.run_dir / BEFORE
        if not before_file.exists():
            write_json(before_file, {"digest": trial.digest, "problems": measured(run, trial)})
        before = json.loads(before_file.read_text(encoding="utf-8"))["problems"]
        Trainer(run).train()
        after = measured(run, trial)
    of_the_run = {"variant": trial.variant, "seed": trial.seed, "digest": trial.digest}
    write_result(trial.folder / MEASURED, {**of_the_run, "before": before, "after": after})
    del run
    gc.collect()  # breaks reference cycles, since the next run needs the memory


def measured(run: Run, trial: Trial) -> dict[str, dict[str, float]]:
    """Measures the student on the held-out problems, and its divergence from its teacher at `trial.alpha`.

    Returns {problem id: {metric: value}} with Average@k, pass@k and what `held_out.Measured` explains. All variants of
    a seed answer the same problems with the same sampling seeds.
    """
    problems, k = run.data.problems.eval, trial.measure.k
    states = measure(run, problems, trial.alpha, graded=False)  # k answers to each are graded below
    length = run.config.eval_completion_length
    protocol = EvalProtocol(k, length, trial.measure.temperature, 1.0, 0, run.config.seed, ANSWERS_AT_ONCE)
    prompts = [run.data.prompts.student(problem) for problem in problems]
    samples: dict[str, list[dict[str, Any]]] = {problem.id: [] for problem in problems}
    run.rollout.engine.sync()
    with Grader(box_only=run.config.box_only) as grader, progress("held-out answers", len(problems) * k):
        for batch in answers(problems, prompts, run.rollout.engine, run.tokenizer, grader, protocol):
            for sample in batch:
                samples[sample["problem_id"]].append(sample)
    run.rollout.engine.release()
    rows = {}
    for state, own in zip(states, samples.values(), strict=True):
        right = sum(sample["correct"] for sample in own)
        rows[state.id] = {
            "average": right / k,
            "pass": pass_at(k, right, k),
            "response_length": sum(sample["num_tokens"] for sample in own) / k,
            "no_answer": sum(sample["extracted"] is None for sample in own) / k,
            "mismatch": state.mismatch,
            "mismatch_p95": state.mismatch_p95,
            "top1_disagreement": state.top1_disagreement,
            "reference_nll": state.reference_nll,
        }
    return rows


def check_measurable(config: ATESDConfig) -> None:
    """Raises ConfigError for a run that a study cannot measure."""
    if find_spec("math_verify") is None:
        raise ConfigError("a study grades answers with math-verify: pip install 'atesd[eval]'")
    if config.rollout_engine != "hf":
        raise ConfigError(
            f"rollout_engine is {config.rollout_engine!r}: a study measures the student before and after each run in "
            "its own process, so it must be 'hf'"
        )
