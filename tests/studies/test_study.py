"""Studies: their files, their runs however they are stopped, and their numbers."""

from __future__ import annotations

import json
import math
import shutil
import signal
import sys
import time
from dataclasses import asdict, replace

import pytest
import yaml

from atesd import cli
from atesd.config import load_config
from atesd.config.doors import POLICY_FIELDS
from atesd.evaluation.statistics import t_quantile
from atesd.exposure.policies import make_policy
from atesd.storage.manifest import damage
from atesd.studies.comparison import interval
from atesd.studies.lab.world import TEMPLATES
from atesd.studies.reading import load_spec, shipped
from atesd.studies.spec import Measure, StudySpec
from atesd.studies.study import run_study, trials_of
from atesd.studies.study_report import printout
from atesd.studies.trial import digest_of_files
from atesd.trainer import Trainer
from tests.quiet import quietly


@pytest.fixture
def recipe(tiny_config, tmp_path) -> str:
    config = tiny_config(max_steps=2, num_probe_problems=2, learning_rate=0.02, save_steps=1)
    settings = {name: value for name, value in vars(config).items() if value is not None and name != "output_dir"}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings | {"bf16": None, "num_train_problems": 8}))
    return str(path)


@pytest.fixture
def study(recipe, tmp_path) -> str:
    path = tmp_path / "mine.yaml"
    content = {
        "about": "a small one",
        "recipe": "tiny.yaml",  # beside this file
        "seeds": [0, 1],
        "baseline": "full",
        "settings": {"exposure_policy": "full"},
        "variants": {"full": {}, "half": {"exposure_policy": "fixed", "fixed_alpha": 0.5}, "again": {}},
        "measure": {"problems": 4, "k": 2, "temperature": 0.8},
        "published": {"half": {"value": 57.4, "source": "a paper"}},
    }
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return str(path)


def command(study, folder, *flags):
    return quietly(lambda: cli.main(["study", study, "--output_dir", str(folder), *flags]))


def test_a_study_killed_and_resumed_gives_the_same_numbers(study, tmp_path, monkeypatch):
    whole, part = tmp_path / "a" / "whole", tmp_path / "b" / "part"
    assert command(study, whole) == 0
    step, steps = Trainer.train_step, []

    def dies(self, t):
        steps.append(t)
        if len(steps) in (2, 5):
            raise KeyboardInterrupt
        return step(self, t)

    monkeypatch.setattr(Trainer, "train_step", dies)
    assert command(study, part) == 130
    assert command(study, part) == 130
    assert command(study, part) == 0
    assert len(steps) == 2 * 2 * 2 + 2, "of equal variants one is run, and a killed run makes its step again"
    numbers = [json.loads((folder / "study.json").read_text()) for folder in (whole, part)]
    assert numbers[0] == numbers[1]
    steps.clear()
    assert command(study, part) == 0 and steps == []

    found = numbers[0]
    assert [run["variant"] for run in found["runs"]] == ["full", "half", "again"] * 2
    assert found["variants"]["again"]["metrics"]["average"]["difference"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert (part / "again/seed-0").is_dir() and not (part / "again/seed-0/config.yaml").exists()
    assert json.loads((part / "again/seed-0/measured.json").read_text())["same_as"] == "../../full/seed-0/measured.json"
    starts = [{n: row["average"] for n, row in run["before"].items()} for run in found["runs"] if run["seed"] == 0]
    assert starts[0] == starts[1] == starts[2], "all variants of a seed start from the same answers"
    for name in ("study.md", "study.html", "study.png"):
        assert (part / name).stat().st_size > 200
    told = str(printout(part))
    for words in ("full", "half", "57.4", "a paper", "average@2", "less full", "Student's t over 2 seeds"):
        assert words in told


def test_a_run_of_another_study_with_the_same_settings_is_taken_over(study, tmp_path, monkeypatch):
    first, second = tmp_path / "studies" / "first", tmp_path / "studies" / "second"
    assert command(study, first, "--seeds", "0", "--variants", "full") == 0
    steps, step = [], Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", lambda self, t: steps.append(t) or step(self, t))
    assert command(study, second, "--seeds", "0", "--variants", "half") == 0
    assert steps == [0, 1], "the baseline is the first study's"
    taken = json.loads((second / "full/seed-0/measured.json").read_text())
    assert taken["same_as"] == "../../../first/full/seed-0/measured.json"
    assert command(study, tmp_path / "studies" / "third", "--seeds", "0", "--variants", "full", "--max_steps", "1") == 0
    assert steps == [0, 1, 0], "another number of steps is another run"


def test_finished_runs_count_where_their_files_have_another_place(study, tmp_path, monkeypatch):
    """The data lie elsewhere, and a setting is spelled out that the study leaves at its default."""
    content = yaml.safe_load((tmp_path / "tiny.yaml").read_text())
    rows = [{"problem": f"What is {i} + 1?", "solution": f"It is {i + 1}.", "answer": str(i + 1)} for i in range(20)]
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    steps, step = [], Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", lambda self, t: steps.append(t) or step(self, t))
    for place, flags in (("here", []), ("there", ["--reward_gamma", "0.9"])):
        monkeypatch.chdir(tmp_path / place)
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(content | {"dataset_name": "data.jsonl"}))
        out = tmp_path / place / "runs" / "s"
        if place == "there":
            (out / "full/seed-0").mkdir(parents=True)
            shutil.copy(tmp_path / "here/runs/s/full/seed-0/measured.json", out / "full/seed-0")
        assert command(study, out, "--seeds", "0", "--variants", "full", *flags) == 0
    assert steps == [0, 1]
    with (tmp_path / "there/data.jsonl").open("a") as file:
        file.write(json.dumps(rows[0] | {"problem": "another"}) + "\n")
    assert command(study, tmp_path / "there/other/s", "--seeds", "0", "--variants", "full") == 0
    assert len(steps) == 4, "other data make another run"


def test_a_result_of_other_settings_data_or_measure_is_refused_in_its_place(study, tmp_path, capsys):
    folder = tmp_path / "s"
    part = ("--seeds", "0", "--variants", "full")
    assert command(study, folder, *part) == 0
    assert cli.main(["study", study, "--output_dir", str(folder), *part, "--learning_rate", "0.5"]) == 2
    content = yaml.safe_load((tmp_path / "mine.yaml").read_text())
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**content, "measure": {"problems": 4, "k": 3}}))
    measured = (folder / "full/seed-0/measured.json").read_bytes()
    shutil.rmtree(folder / "full/seed-0")  # as where results alone were kept
    (folder / "full/seed-0").mkdir()
    (folder / "full/seed-0/measured.json").write_bytes(measured)
    capsys.readouterr()
    assert cli.main(["study", study, "--output_dir", str(folder), *part]) == 2
    assert "measured.json was measured with other settings" in capsys.readouterr().err
    (folder / "full/seed-0/measured.json").write_text('{"digest": 1, "before": {}}')
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    assert cli.main(["study", study, "--output_dir", str(folder), *part]) == 2


def test_a_study_of_a_data_folder_knows_its_files(study, tmp_path):
    content = yaml.safe_load((tmp_path / "tiny.yaml").read_text())
    rows = [{"problem": f"What is {i} + 1?", "solution": f"It is {i + 1}.", "answer": str(i + 1)} for i in range(20)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data/rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = digest_of_files(str(tmp_path / "data"))
    (tmp_path / "data/rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    assert before not in (None, digest_of_files(str(tmp_path / "data")))
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(content | {"dataset_name": str(tmp_path / "data")}))
    assert command(study, tmp_path / "s", "--seeds", "0", "--variants", "full") == 0


def test_an_error_in_a_process_of_its_own_is_told_as_in_this_one_and_ends_the_study(study, tmp_path, capsys):
    folder = tmp_path / "s"
    code = cli.main(["study", study, "--output_dir", str(folder), "--jobs", "2", "--max_prompt_length", "8"])
    assert code in (1, 2) and "the student prompt of problem" in capsys.readouterr().err


def test_several_runs_at_a_time_give_the_same_numbers(study, tmp_path):
    one, two = tmp_path / "a" / "one", tmp_path / "b" / "two"
    for folder, jobs in ((one, "1"), (two, "2")):
        assert command(study, folder, "--seeds", "0", "--jobs", jobs) == 0
    first, second = (json.loads((folder / "study.json").read_text()) for folder in (one, two))
    assert first == second


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are killed")
def test_sigterm_ends_a_study_and_its_runs_which_are_saved(study, tmp_path, start_atesd):
    folder = tmp_path / "s"
    process = start_atesd("study", study, "--output_dir", str(folder), "--jobs", "2", "--max_steps", "5000")
    logs = [folder / variant / "seed-0" / "metrics.jsonl" for variant in ("full", "half")]
    deadline = time.monotonic() + 240
    while not all(log.is_file() and log.read_bytes().count(b"\n") > 1 for log in logs):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.05)
    process.terminate()
    _, told = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM and b"go on with the same command" in told
    for log in logs:
        last = json.loads(log.read_text().splitlines()[-1])["step"]
        assert damage(log.parent / "checkpoints" / f"step-{last:06d}") is None


@pytest.mark.parametrize("name", ["study.md", "study.html", "study.png"])
def test_a_study_takes_no_file_that_it_has_not_written(study, tmp_path, capsys, name):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / name).write_text("mine")
    assert command(study, tmp_path / "s") == 2
    assert f"holds {name}, and no study wrote it" in capsys.readouterr().err
    (tmp_path / "s" / name).unlink()
    (tmp_path / "s" / "study.json").write_text('{"study": "another"}')
    assert command(study, tmp_path / "s") == 2
    assert "holds the results of the study 'another'" in capsys.readouterr().err
    (tmp_path / "s" / "study.json").write_text("{")
    assert command(study, tmp_path / "s") == 2
    assert "study.json is damaged" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "s").iterdir() if path.name != ".lock"] == ["study.json"]


def test_a_study_may_extend_others_and_cross_variants_with_a_grid(study, tmp_path):
    path = tmp_path / "more.yaml"
    content = {
        "extends": ["mine.yaml", "paper-credit"],
        "baseline": "half",
        "seeds": [7],
        "settings": {"weight_decay": 0.1},
        "variants": {"half": {"lora_r": 4}, "one": {"fixed_alpha": 1.0, "exposure_policy": "fixed"}},
        "grid": {"learning_rate": [0.5, 0.25], "warmup_steps": [0]},
    }
    path.write_text(yaml.safe_dump(content))
    spec = load_spec(str(path))
    names = ["full", "half", "again", "one-step", "short-delay", "no-grounded-term", "full-reward", "one"]
    assert list(spec.variants) == [f"{name}-{rate}-0" for name in names for rate in (0.5, 0.25)]
    half = {"exposure_policy": "fixed", "fixed_alpha": 0.5, "lora_r": 4, "learning_rate": 0.25, "warmup_steps": 0}
    assert spec.variants["half-0.25-0"] == half
    assert spec.settings == {"exposure_policy": "full", "lookahead": 4, "weight_decay": 0.1}
    assert (spec.baseline, spec.seeds, spec.published) == ("half-0.5-0", (7,), {})
    assert (spec.measure, spec.about) == (load_spec("paper-credit").measure, load_spec("paper-credit").about)

    path.write_text(yaml.safe_dump({"extends": "mine.yaml", "measure": {"problems": 5}}))
    spec = load_spec(str(path))
    assert spec.recipe == str(tmp_path / "tiny.yaml") and spec.measure == Measure(5)
    assert list(spec.published) == ["half"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"extends": "mne.yaml"}, "there is no study 'mne.yaml'"),
        ({"extends": "loop.yaml"}, "extends itself"),
        ({"extends": "mine.yaml", "grid": {"learning_rate": []}}, "at least one value"),
        ({"extends": "mine.yaml", "grid": {"learning_rat": [1]}}, "unknown setting 'learning_rat'"),
        ({"extends": "mine.yaml", "grid": [1]}, "cannot be used"),
        ({"extends": 3}, "cannot be used"),
    ],
)
def test_a_study_that_extends_what_it_cannot_is_refused_by_name(study, tmp_path, capsys, content, told):
    (tmp_path / "loop.yaml").write_text(yaml.safe_dump(content))
    assert cli.main(["study", str(tmp_path / "loop.yaml"), "--output_dir", str(tmp_path / "s")]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(shipped()))
def test_a_study_that_ships_is_valid_for_every_seed_and_variant(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the lab's studies find the lab's files here
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab/templates.yaml").write_text(yaml.safe_dump(asdict(TEMPLATES)))
    (tmp_path / "lab/tuning.jsonl").touch()
    (tmp_path / "lab/problems.jsonl").touch()
    spec = load_spec(name)
    fewer = {"fixed-exposure": 3, "lab-tuning": 1, "lab-tuning-grpo": 1, "lab-mending": 3}
    assert spec.about and len(spec.seeds) >= fewer.get(name, 5)
    for variant in spec.variants:
        config = spec.config(variant, 1, tmp_path / "run", [])
        assert (config.seed, config.num_eval_problems) == (1, spec.measure.problems)


def test_every_variant_of_the_credit_is_paid_for_something_else():
    spec, paid_for = load_spec("paper-credit"), {}
    for variant in spec.variants:
        config = spec.config(variant, 0, "unused", [])
        policy = make_policy(config.exposure_policy, **{name: getattr(config, name) for name in POLICY_FIELDS})
        paid_for[variant] = (policy.L, policy.ledger.lambda_gt)
    one, short, no_grounded, full = paid_for.values()
    assert one[0] == 1 < short[0] < full[0] == no_grounded[0] and no_grounded[1] == 0
    assert len({one[1], short[1], full[1]}) == 1


@pytest.mark.parametrize("name", ["controls", "quickstart"])
def test_every_variant_has_the_same_budget_of_responses(name):
    spec = load_spec(name)
    budgets, lengths = set(), set()
    for variant in spec.variants:
        config = spec.config(variant, 0, "unused", [])
        rollouts = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.num_generations
        budgets.add((rollouts, config.max_steps))
        if config.objective == "sft":  # samples no response in training, and must have room for what it has learned
            assert config.eval_completion_length >= 40, "tokens of a reference of the quickstart with its box"
        else:
            lengths.add((config.max_completion_length, config.eval_completion_length))
    assert len(budgets) == len(lengths) == 1


@pytest.mark.parametrize("name", sorted(name for name in shipped() if load_spec(name).recipe == "quickstart"))
def test_a_study_of_the_quickstart_samples_answers_as_its_recipe_does(name):
    spec, recipe = load_spec(name), load_config("quickstart", [])
    assert (spec.measure.k, spec.measure.temperature) == (recipe.eval_k, recipe.eval_temperature)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"variant": {}}, "unknown key 'variant'.*did you mean variants"),
        ({"baseline": "ful"}, "the baseline of study 'mine' is 'ful'"),
        ({"variants": {"full": {"learning_rat": 1}}}, "unknown setting 'learning_rat' in full.*learning_rate"),
        ({"variants": {"full": {"seed": 3}}}, "seed in full.*the study's own to set"),
        ({"variants": {"full": {"entry_clip": None}}}, "entry_clip is null"),
        ({"variants": {"full": {}, "a/b": {}}}, "variant 'a/b'"),
        ({"variants": {}}, "has no variants"),
        ({"seeds": []}, "at least a variant and a seed"),
        ({"seeds": [1, 1]}, "names a seed twice"),
        ({"seeds": ["one"]}, "cannot be used"),
        ({"measure": {"problems": 1}}, "problems in measure.*at least 2"),
        ({"measure": {"n": 1}}, "cannot be used"),
        ({"published": {"none": {"value": 1}}}, "published number for 'none'"),
    ],
)
def test_a_study_that_cannot_be_used_is_refused_by_name(study, tmp_path, capsys, changes, told):
    import re

    content = yaml.safe_load((tmp_path / "mine.yaml").read_text())
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**content, **changes}))
    assert cli.main(["study", study, "--output_dir", str(tmp_path / "s")]) == 2
    assert re.search(told, capsys.readouterr().err)
    assert not (tmp_path / "s").exists()


def test_flags_and_folders_that_do_not_go_are_refused_before_the_first_run(study, tmp_path, capsys):
    folder = str(tmp_path / "s")
    for flags, told in (
        (["--seeds", "x"], "--seeds are whole numbers"),
        (["--variants", "ful"], "did you mean full"),
        (["--seed", "3"], "--seed is the study's own to set"),
        (["--num-eval-problems=3"], "--num_eval_problems is the study's own"),
        (["--jobs", "0"], "jobs is 0"),
        (["--rollout_engine", "vllm_server"], "it must be 'hf'"),
        (["--max_step", "1"], "did you mean max_steps"),
    ):
        assert cli.main(["study", study, "--output_dir", folder, *flags]) == 2
        assert told in capsys.readouterr().err
        assert not (tmp_path / "s").exists()
    assert cli.main(["study", "control"]) == 2
    assert "did you mean controls" in capsys.readouterr().err
    mine = tmp_path / "s" / "half" / "seed-1" / "thesis.tex"
    mine.parent.mkdir(parents=True)
    mine.write_text("five years")
    assert cli.main(["study", study, "--output_dir", folder]) == 2
    assert "no study made it" in capsys.readouterr().err
    assert mine.read_text() == "five years" and not (tmp_path / "s" / "full").exists()


def test_help_names_the_studies_and_the_settings_of_one(capsys):
    assert cli.main(["study"]) == 2
    told = capsys.readouterr().out
    assert all(name in told for name in shipped())
    with pytest.raises(SystemExit):
        cli.main(["study", "controls", "--help"])
    told = capsys.readouterr().out
    assert "--reference_source other_problem" in told and "--jobs" in told


def test_an_interval_is_student_s_t():
    # mean 2, standard deviation 1; the quantile for 2 degrees of freedom is 4.3027
    found = interval([1.0, 2.0, 3.0])
    assert found["value"] == 2.0
    assert found["high"] - 2.0 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert found["low"] == pytest.approx(4.0 - found["high"])


@pytest.mark.parametrize(("degrees", "exact"), [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (9, 2.26216)])
def test_quantiles_of_student_s_t_for_few_seeds(degrees, exact):
    assert t_quantile(0.975, degrees) == pytest.approx(exact, rel=0.01)


def test_a_study_without_signal_says_so(recipe, tmp_path):
    variants = {"own": {}, "none": {"reference_source": "none"}}
    spec = StudySpec("s", variants, "own", recipe, settings={"exposure_policy": "full"}, seeds=(0,),
                     measure=Measure(3, 1, 1.0))  # fmt: skip
    folder = quietly(lambda: run_study(spec, ["--max_steps", "1"], str(tmp_path / "s")))
    assert "none (no signal)" in (folder / "study.md").read_text()
    assert "One seed gives no interval." in str(printout(folder))
    assert replace(spec, seeds=(0, 1)).only(["none"], [1]).seeds == (1,)


def test_a_study_compares_teachers_and_makes_a_run_again_whose_teacher_has_changed(recipe, other_model_path, tmp_path):
    teacher = shutil.copytree(other_model_path, tmp_path / "teacher")
    larger = {"teacher": "model", "teacher_model_name_or_path": str(teacher)}
    content = {
        "recipe": "tiny.yaml", "seeds": [0], "baseline": "own", "settings": {"exposure_policy": "full"},
        "variants": {"own": {}, "larger": larger}, "measure": {"problems": 2, "k": 1, "temperature": 1.0},
    }  # fmt: skip
    path = tmp_path / "teachers.yaml"
    path.write_text(yaml.safe_dump(content))
    assert command(str(path), tmp_path / "out") == 0
    variants = json.loads((tmp_path / "out" / "study.json").read_text())["variants"]
    mismatch = {name: each["metrics"]["mismatch"]["mean"] for name, each in variants.items()}
    assert mismatch["larger"] > 0 and mismatch["larger"] != mismatch["own"]

    def digests():
        return {trial.variant: trial.digest for trial in trials_of(load_spec(str(path)), [], tmp_path / "none")}

    before = digests()
    (teacher / "model.safetensors").write_bytes((teacher / "model.safetensors").read_bytes()[:-4] + b"\x01" * 4)
    assert {name for name, digest in digests().items() if digest != before[name]} == {"larger"}
