"""The fixed-exposure study: its runs, its numbers, its figure, and going on where it stopped."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from atesd import cli
from atesd.errors import ConfigError
from atesd.rollout import Sampling
from atesd.run import Run
from atesd.storage.folder import own
from atesd.studies import sweep
from atesd.studies.held_out import measure
from atesd.studies.trial import BEFORE
from atesd.trainer import Trainer
from tests.quiet import quietly


@pytest.fixture
def recipe(tiny_config, tmp_path) -> str:
    config = tiny_config(max_steps=2, num_eval_problems=6, num_probe_problems=2, learning_rate=0.02, save_steps=1)
    settings = {name: value for name, value in vars(config).items() if value is not None and name != "output_dir"}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings | {"bf16": None}))
    return str(path)


def test_a_sweep_goes_on_where_it_was_stopped_and_draws_its_figure(recipe, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "sweep"
    arguments = ["sweep", recipe, "--alphas", "0,1", "--seeds", "0", "--output_dir", str(folder)]
    step, steps = Trainer.train_step, []

    def dies_in_the_fourth(self, t):
        config = self.run.config
        steps.append((config.fixed_alpha, config.seed, t))
        if len(steps) == 4:
            raise KeyboardInterrupt
        return step(self, t)

    monkeypatch.setattr(Trainer, "train_step", dies_in_the_fourth)
    assert quietly(lambda: cli.main(arguments)) == 130
    assert quietly(lambda: cli.main(arguments)) == 0
    expected = [(alpha, 0, t) for alpha in (0.0, 1.0) for t in range(2)]
    assert steps == [*expected, expected[-1]], "only the step that was interrupted is made again"
    steps.clear()
    assert quietly(lambda: cli.main(arguments)) == 0 and steps == []
    capsys.readouterr()
    assert quietly(lambda: cli.main([*arguments, "--json"])) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["by_difficulty"] and told["folder"] == str(folder)
    assert quietly(lambda: cli.main(arguments)) == 0
    table = capsys.readouterr().out
    assert re.search(r"alpha +problems +outcome", table) and re.search(r"0 +hard +-?[\d.]+ ± ", table)
    assert cli.main([*arguments, "--learning_rate", "0.03"]) == 2 and steps == []
    assert "learning_rate is 0.03, but the run in" in capsys.readouterr().err

    for figure in ("study.png", "sweep.png"):
        assert (folder / figure).read_bytes().startswith(b"\x89PNG")
    study = json.loads((folder / "study.json").read_text())
    rows = sweep.rows_of(study)
    assert len(rows) == 2 * 6
    assert {(row["alpha"], row["group"]) for row in study["by_difficulty"]} == {
        (alpha, group) for alpha in (0.0, 1.0) for group in ("all", "easy", "middle", "hard")
    }
    first = rows
    assert first[0]["before"]["reference_nll"] == first[6]["before"]["reference_nll"], "the same problems and student"
    assert first[0]["before"] != first[0]["after"]
    saved = yaml.safe_load((folder / "alpha-0/seed-0" / "config.yaml").read_text())
    assert saved["bf16"] is not None, "a run that goes on elsewhere goes on in its precision"


def first_sampling(config) -> Sampling:
    """That of the first problem: the run's own, with the seed 0."""
    return Sampling(config.max_completion_length, config.temperature, config.top_p, config.top_k, (0,))


def test_the_measurement_is_that_of_a_dense_model_and_leaves_the_run_as_it_was(tiny_config):
    trainer = quietly(lambda: Trainer(Run.build(tiny_config(num_eval_problems=3))))
    with torch.no_grad():  # a student that is not its teacher
        for name, p in trainer.run.student.model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    engine, state = trainer.run.rollout.engine.state_dict(), torch.get_rng_state()
    measured = measure(trainer.run, trainer.run.data.problems.eval, 0.5)
    assert measure(trainer.run, trainer.run.data.problems.eval, 0.5) == measured
    assert engine == trainer.run.rollout.engine.state_dict()
    assert torch.equal(state, torch.get_rng_state()) and trainer.run.student.model.training
    problem, got = trainer.run.data.problems.eval[0], measured[0]
    prompt, reply = (
        trainer.run.data.prompts.student(problem),
        trainer.run.data.prompts.reference_completion(trainer.run.data.references[problem.id])[0],
    )
    with torch.no_grad():
        logits = trainer.run.student.model.eval()(torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1]
    nll = torch.nn.functional.cross_entropy(logits, torch.tensor(reply)).item()
    assert got.reference_nll == pytest.approx(nll, rel=1e-5)
    with torch.no_grad():
        response = trainer.run.rollout.engine.generate([prompt], first_sampling(trainer.run.config))[0].response_ids
        read = trainer.run.data.prompts.teacher(problem, trainer.run.data.references[problem.id], 0.5)
        s = trainer.run.student.model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        with trainer.run.student.model.disable_adapter():
            t = trainer.run.student.model(torch.tensor([read + response])).logits[0, len(read) - 1 : -1]
    log_q, log_p = (z.div(trainer.run.config.scoring_temperature).log_softmax(-1) for z in (s, t))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert got.num_tokens == len(response) and kl.mean() > 1e-4
    assert got.mismatch == pytest.approx(kl.mean().item(), rel=1e-4)
    # of n tokens the one whose rank, from 0, is 0.95 (n - 1) or the nearest below
    assert got.mismatch_p95 == pytest.approx(kl.sort().values[int(0.95 * (len(kl) - 1))].item(), rel=1e-4)
    assert got.top1_disagreement == pytest.approx((s.argmax(-1) != t.argmax(-1)).double().mean().item())


def rows_with(falls):
    return [
        {
            "alpha": alpha, "seed": seed, "id": f"p{i}",
            "before": {"reference_nll": float(i)},
            "after": {
                "reference_nll": i - fall, "mismatch_p95": i / 10, "top1_disagreement": 0.2, "average": float(i < 3),
            },
        }
        for (alpha, seed), fall in falls.items() for i in range(6)
    ]  # fmt: skip


def test_the_summary_is_over_seeds_and_thirds_of_the_problems():
    summary = sweep.summarise(rows_with({(0.0, 0): 0.1, (0.0, 1): 0.3, (1.0, 0): -0.2, (1.0, 1): -0.2}))
    by_key = {(row["alpha"], row["group"]): row for row in summary}
    everyone = by_key[0.0, "all"]
    assert everyone["outcome"] == pytest.approx(0.2) and everyone["outcome_std"] == pytest.approx(0.02**0.5)
    assert everyone["accuracy"] == pytest.approx(0.5)
    assert by_key[1.0, "hard"]["outcome"] == pytest.approx(-0.2)
    assert by_key[0.0, "easy"]["mismatch_p95"] == pytest.approx(0.05)  # problems 0 and 1
    assert by_key[0.0, "hard"]["mismatch_p95"] == pytest.approx(0.45)  # problems 4 and 5


def test_a_run_that_died_before_its_first_checkpoint_goes_on(recipe, tmp_path, monkeypatch):
    folder, trains = tmp_path / "sweep", Trainer.train
    arguments = ["sweep", recipe, "--alphas", "0.5", "--seeds", "0", "--output_dir", str(folder)]

    def dies(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "train", dies)
    assert quietly(lambda: cli.main(arguments)) == 130
    before = (folder / "alpha-0.5/seed-0" / BEFORE).read_text()
    monkeypatch.setattr(Trainer, "train", trains)
    assert quietly(lambda: cli.main(arguments)) == 0
    assert (folder / "alpha-0.5/seed-0" / BEFORE).read_text() == before
    assert len(sweep.rows_of(json.loads((folder / "study.json").read_text()))) == 6


def test_a_sweep_removes_nothing_it_did_not_make(recipe, tmp_path, capsys):
    mine = tmp_path / "alpha-0/seed-0" / "thesis.tex"
    mine.parent.mkdir(parents=True)
    mine.write_text("five years")
    assert cli.main(["sweep", recipe, "--alphas", "0", "--seeds", "0", "--output_dir", str(tmp_path)]) == 2
    assert "seed-0 exists, and no study made it" in capsys.readouterr().err
    assert mine.read_text() == "five years"


def test_a_second_sweep_in_the_same_folder_is_refused(recipe, tmp_path, start_atesd):
    with own(tmp_path, "output_dir"):
        process = start_atesd("sweep", recipe, "--alphas", "0", "--seeds", "0", "--output_dir", str(tmp_path))
        _, said = process.communicate(timeout=240)
    assert process.returncode == 1 and "is being written by another process" in said.decode()


def test_a_sweep_replaces_the_policy_of_a_recipe_and_what_it_takes(recipe, tmp_path):
    flags = ["--exposure_policy", "linear", "--exposure_kwargs", '{"start_alpha": 1}']
    config = sweep.spec_of(recipe, [0.5], [0]).config("alpha-0.5", 0, tmp_path / "run", flags)
    assert (config.exposure_policy, config.exposure_kwargs, config.fixed_alpha) == ("fixed", "{}", 0.5)


def test_a_sweep_measures_as_its_recipe_evaluates(recipe, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(sweep, "run_study", lambda spec, *_, **options: seen.append(spec.measure) or tmp_path)
    sweep.sweep(recipe, ["--eval_temperature", "0.7"], str(tmp_path / "s"))
    sweep.sweep(recipe, ["--num_eval_problems", "0"], str(tmp_path / "s"))
    sweep.sweep("gsm-symbolic", [], str(tmp_path / "s"), num_problems=5)
    assert [(m.problems, m.temperature) for m in seen] == [(6, 0.7), (64, 1.0), (5, 1.0)]


def test_a_sweep_that_cannot_run_is_refused_before_its_first_run(recipe, tmp_path, capsys):
    assert cli.main(["sweep", recipe, "--alphas", "0,2", "--output_dir", str(tmp_path / "s")]) == 2
    assert "fixed_alpha is 2.0" in capsys.readouterr().err
    assert cli.main(["sweep", recipe, "--seeds", "one"]) == 2
    assert cli.main(["sweep", recipe, "--rollout_engine", "vllm_server"]) == 2
    assert "rollout_engine is 'vllm_server'" in capsys.readouterr().err
    assert not Path(tmp_path / "s").exists()
    with pytest.raises(ConfigError, match="an alpha and a seed"):
        sweep.sweep(recipe, [], str(tmp_path / "s"), alphas=[])
