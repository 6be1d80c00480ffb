"""The configuration: what it reads, what it refuses, and that it says why."""

import dataclasses
import inspect
import json
import re
import subprocess
import sys
from typing import get_args, get_type_hints

import pytest
import yaml

from atesd.config import ATESDConfig, config_parser, doors, load_config, recipes
from atesd.config.eval_config import EvalConfig, eval_parser, load_eval_config
from atesd.config.fields import MAY_CHANGE
from atesd.errors import ConfigError

OTHER = ("--teacher", "model", "--teacher_model_name_or_path")
SERVED = ("--teacher", "vllm_server", "--scoring_temperature", "1", "--teacher_base_url")
URL = "http://localhost:8001"


def write_yaml(path, **settings):
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def test_flags_win_over_the_file_and_the_file_over_the_defaults(tmp_path):
    file = write_yaml(tmp_path / "mine.yaml", max_steps=7, learning_rate="3e-5", seed=4, num_train_problems=50)
    config = load_config(file, ["--max_steps", "9", "--output-dir", "out"])
    assert (config.max_steps, config.learning_rate, config.seed, config.lora_r) == (9, 3e-5, 4, 64)
    assert config.output_dir == "out"


@pytest.mark.parametrize("name", sorted(recipes()))
def test_every_recipe_that_ships_is_valid_and_its_run_directory_carries_its_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lab").mkdir()
    for made in ("problems.jsonl", "templates.yaml"):  # by `atesd lab`
        (tmp_path / "lab" / made).touch()
    assert load_config(name, []).output_dir.startswith(f"runs/{name}-")


@pytest.mark.parametrize(("name", "responses", "tokens"), [("quickstart", 16, 30), ("gsm-symbolic", 8, 96)])
def test_a_recipe_for_two_cores_updates_its_policy_several_times(name, responses, tokens):
    config = load_config(name, [])
    assert config.max_steps >= 12
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps * config.num_generations == responses
    assert config.max_completion_length <= tokens
    # a decision of step t, one every hold_window, is paid when step t + lookahead is measured
    paid_decisions = (config.max_steps - 1 - config.lookahead) // config.hold_window + 1
    assert paid_decisions // config.policy_batch_size >= 3


def test_a_saved_configuration_reads_back_as_it_was_absent_values_and_switched_off_clips_included(tmp_path):
    config = load_config("quickstart", ["--entry_clip", "0", "--num_train_problems", "5", "--no_use_peft"])
    assert config.entry_clip is None
    file = config.save(tmp_path)
    again = load_config(str(file), [])
    assert again == config


def test_a_resumed_run_takes_its_settings_from_its_own_directory(tmp_path):
    load_config("quickstart", ["--max_steps", "5", "--output_dir", str(tmp_path)]).save(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    config = load_config(None, ["--resume", str(tmp_path)])
    assert (config.max_steps, config.output_dir, config.resume) == (5, str(tmp_path), str(tmp_path))
    with pytest.raises(ConfigError, match=r"resume is .* the recipe 'quickstart' has no place"):
        load_config("quickstart", ["--resume", str(tmp_path)])
    with pytest.raises(ConfigError, match="no run directory"):
        load_config(None, ["--resume", str(tmp_path / "elsewhere")])


@pytest.mark.parametrize(
    ("recipe", "flags", "told"),
    [
        ("quikstart", [], "did you mean quickstart"),
        ("no/such.yaml", [], "no file 'no/such.yaml'"),
        ("quickstart", ["--max_step", "3"], "unknown flag '--max_step' .did you mean max_steps"),
        ("quickstart", ["--max_steps", "many"], "max_steps.*invalid int value: 'many'"),
        ("quickstart", ["--max_steps", "0"], "max_steps is 0; it must be at least 1"),
        ("quickstart", ["--teacher", "emma"], "teacher.*'emma'.*frozen"),
        ("quickstart", ["--learning_rate", "nan"], "learning_rate is nan"),
        ("quickstart", ["--top_p", "1.5"], "top_p is 1.5"),
        ("quickstart", ["--alpha_min", "0.8", "--alpha_max", "0.2"], "alpha_min .0.8. is above alpha_max .0.2."),
        ("quickstart", ["--entry_clip", "0.05", "--token_clip", "0.1"], "entry_clip .0.05. and token_clip .0.1. excl"),
        ("quickstart", ["--exposure_policy", "fixed"], "fixed_alpha is None"),
        ("quickstart", ["--fixed_alpha", "0.5"], "fixed_alpha .0.5. would be ignored"),
        ("quickstart", ["--num_probe_problems", "0"], "progress_signal is 'probe_nll' but num_probe_problems is 0"),
        ("quickstart", ["--policy_batch_size", "1"], "policy_batch_size is 1: .* 2 or more"),
        ("quickstart", ["--report_to", "wandbb"], "did you mean wandb"),
        ("quickstart", ["--report_to", "none,wandb"], "report_to is 'none,wandb'"),
        ("quickstart", ["--student_chat_template_kwargs", "[1]"], "student_chat_template_kwargs is .* a JSON object"),
        ("quickstart", ["--model_name_or_path", "/no/such/model"], "model_name_or_path is '/no/such/model'"),
        ("quickstart", ["--dataset_name", "missing.jsonl"], "dataset_name is 'missing.jsonl'"),
        ("quickstart", ["--teacher", "model"], "teacher is 'model', and teacher_model_name_or_path is None: set it"),
        (
            "quickstart",
            ["--teacher_model_name_or_path", "a/b"],
            "teacher_model_name_or_path .a/b. would be ignored, for"
            " teacher is 'frozen': leave it out, or set teacher to 'model'",
        ),
        ("quickstart", ["--teacher_device", "cpu"], "teacher_device .cpu. would be ignored, for teacher is 'frozen'"),
        ("quickstart", ["--teacher", "ema", "--teacher_weights", "4bit"], "teacher_weights .4bit. would be ignored"),
        ("quickstart", [*OTHER, "/no/such/model"], "^teacher_model_name_or_path is '/no/such/model', and there is no"),
        ("quickstart", [*OTHER, "a/b", "--teacher_device", "GPU 1"], "teacher_device is 'GPU 1'; .* such as 'cuda:1'"),
        (
            "quickstart",
            [*OTHER, "a/b", "--objective", "sft", "--exposure_policy", "full"],
            "objective 'sft' has no teacher, so teacher_model_name_or_path .a/b. would be ignored",
        ),
        ("quickstart", ["--teacher", "vllm_server"], "teacher_base_url is None: set it to the address of the server"),
        ("quickstart", [*SERVED, "localhost:8001"], "teacher_base_url is 'localhost:8001': set it to the address"),
        ("quickstart", [*SERVED, "http://localhost:port"], "teacher_base_url is 'http://localhost:port': set it to"),
        ("quickstart", [*SERVED, "file:///etc/hosts"], "teacher_base_url is 'file:///etc/hosts': set it to the"),
        ("quickstart", ["--teacher_base_url", URL], "would be ignored, .* or set teacher to 'vllm_server'"),
        ("quickstart", ["--teacher_top_k", "8"], "teacher_top_k .8. would be ignored, for teacher is 'frozen'"),
        ("quickstart", [*OTHER, "a/b", "--teacher_tail", "renormalise"], "teacher_tail .renormalise. would be ignored"),
        ("quickstart", [*SERVED, URL, "--teacher_device", "cpu"], "teacher_device .cpu. would be ignored, for teacher"),
        ("quickstart", [*SERVED, URL, "--teacher_weights", "4bit"], "teacher_weights .4bit. would be ignored"),
        ("quickstart", [*SERVED, URL, "--teacher_top_k", "0"], "teacher_top_k is 0; it must be at least 1"),
        (
            "quickstart",
            [*SERVED, URL, "--teacher_views", '{"exposed": 1.3, "answer_only": -0.3}'],
            "teacher_views is .* and teacher is 'vllm_server': views are mixed by their logits",
        ),
        (
            "quickstart",
            [*SERVED, URL, "--teacher_views", '{"exposed": 0.5, "student": 0.5}'],
            "teacher_views is .* Give one view, or set teacher to 'model'",
        ),
        (
            "quickstart",
            [*SERVED, URL, "--scoring_temperature", "1.1"],
            "scoring_temperature is 1.1, and .*: set scoring_temperature to 1, or teacher_tail to 'renormalise'$",
        ),
        (
            "quickstart",
            [
                *SERVED,
                URL,
                "--scoring_temperature",
                "1.1",
                "--objective",
                "policy_gradient",
                "--teacher_tail",
                "renormalise",
            ],
            "scoring_temperature is 1.1, and .* at temperature 1: set scoring_temperature to 1$",
        ),
        (
            "quickstart",
            [*SERVED, URL, "--objective", "sft", "--exposure_policy", "full"],
            "objective 'sft' has no teacher, so teacher_base_url .http://localhost:8001. would be ignored",
        ),
        ("quickstart", ["--prompt_templates", "missing.yaml"], "prompt_templates is 'missing.yaml'"),
        (None, ["quickstart"], "usage: atesd train RECIPE_OR_YAML"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name_with_the_value_seen(recipe, flags, told):
    with pytest.raises(ConfigError, match=told):
        load_config(recipe, flags)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_no_field_takes_a_number_that_is_not_finite(value):
    config = ATESDConfig(output_dir="unused", num_train_problems=8, exposure_policy="fixed", fixed_alpha=0.5)
    config.validate()
    floats = [name for name, hint in get_type_hints(ATESDConfig).items() if float in (hint, *get_args(hint))]
    assert {"weight_decay", "entropy_target", "token_clip", "fixed_alpha", "adam_epsilon"} <= set(floats)
    for name in floats:
        with pytest.raises(ConfigError, match=f"{name} is {value}; it must be a finite number"):
            dataclasses.replace(config, **{name: float(value)}).validate()


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        (
            "teacher",
            "emma",
            "teacher is 'emma'; it must be one of frozen, ema, live, model, vllm_server (did you mean ema",
        ),
        ("torch_dtype", "float16", "torch_dtype is 'float16'; it must be float32 or bfloat16"),
        ("max_staleness", True, "max_staleness is True; it must be 0 or 1"),
        ("max_steps", 2.0, "max_steps is 2.0; it must be a whole number"),
        ("max_steps", True, "max_steps is True; it must be a whole number"),
        ("use_peft", 1, "use_peft is 1; it must be true or false"),
        ("learning_rate", "1e-5", "learning_rate is '1e-5'; it must be a number"),
        ("seed", None, "seed is None; it must be a whole number"),
        ("num_train_problems", 0, "num_train_problems is 0; it must be at least 1, or left out"),
        ("entry_clip", -1.0, "entry_clip is -1.0; it must be above 0, or 0 for off"),
        ("adam_beta1", 1, "adam_beta1 is 1; it must be at least 0 and below 1"),
        ("top_p", 0.0, "top_p is 0.0; it must be above 0 and at most 1"),
        ("ema_decay", 1.5, "ema_decay is 1.5; it must be between 0 and 1"),
        ("exposure_kwargs", {"low": 1}, "exposure_kwargs is {'low': 1}; it must be the text of a JSON object"),
    ],
)
def test_values_of_python_callers_are_held_to_types_choices_and_ranges(name, value, told):
    config = ATESDConfig(output_dir="unused", num_train_problems=8)
    config.validate()
    with pytest.raises(ConfigError, match=re.escape(told)):
        dataclasses.replace(config, **{name: value}).validate()


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("torch_dtype", "half", "torch_dtype is 'half'; it must be one of auto, float32, bfloat16"),
        ("confidence", 1.0, "confidence is 1.0; it must be above 0 and below 1"),
        ("chat_template_kwargs", "[]", "chat_template_kwargs is '[]'; it must be a JSON object"),
        ("rollout_timeout", float("inf"), "rollout_timeout is inf; it must be a finite number"),
        ("vllm_server_weights", "lora", "vllm_server_weights is 'lora'; it must be adapter or merged"),
    ],
)
def test_the_fields_of_an_evaluation_are_checked_the_same_way(name, value, told):
    config = EvalConfig(model_name_or_path="m", dataset_name="aime24")
    config.validate()
    with pytest.raises(ConfigError, match=re.escape(told)):
        dataclasses.replace(config, **{name: value}).validate()


@pytest.mark.parametrize("kind", [ATESDConfig, EvalConfig])
def test_every_number_has_a_range_that_holds_its_default_and_help_shows_it(kind):
    hints = get_type_hints(kind)
    unbounded = {"entropy_target"}
    text = " ".join((config_parser() if kind is ATESDConfig else eval_parser()).format_help().split())
    for field in dataclasses.fields(kind):
        if {int, float} & {hints[field.name], *get_args(hints[field.name])} and field.name not in unbounded:
            bounds = field.metadata["range"]
            assert str(bounds), field.name
            assert field.default is None or field.default in bounds, field.name
            assert f"Range: {bounds}." in text


def test_bfloat16_master_weights_are_refused_and_allowed_under_an_adapter():
    flags = ["--torch_dtype", "bfloat16"]
    assert load_config("quickstart", flags).torch_dtype == "bfloat16"
    with pytest.raises(ConfigError, match=r"torch_dtype is 'bfloat16' and use_peft is false: .* float32"):
        load_config("quickstart", [*flags, "--no_use_peft"])


@pytest.mark.parametrize(
    ("flag", "value", "told"),
    [
        ("lora_r", "8", "lora_r is 8, but the run in .* was started with 64"),
        ("use_peft", "false", "use_peft is False, .* was started with True"),
        ("model_name_or_path", "other/model", "model_name_or_path is 'other/model'"),
        ("max_completion_length", "64", "max_completion_length is 64, .* with 30"),
        ("teacher", "ema", "teacher is 'ema', .* with 'frozen'"),
        ("teacher_weights", "float32", "teacher_weights is 'float32', .* with 'bfloat16'"),
        ("teacher_top_k", "8", "teacher_top_k is 8, .* with 64"),
        ("seed", "7", "seed is 7"),
        ("output_dir", "elsewhere", "output_dir is 'elsewhere', but resume goes on in"),
    ],
)
def test_a_resumed_run_refuses_by_name_what_would_make_it_another_run(tmp_path, flag, value, told):
    load_config("quickstart", ["--output_dir", str(tmp_path)]).save(tmp_path)
    with pytest.raises(ConfigError, match=told):
        load_config(None, ["--resume", str(tmp_path), f"--{flag}", value])


def test_a_resumed_run_takes_the_settings_that_may_change_and_help_names_them(tmp_path):
    load_config("quickstart", ["--output_dir", str(tmp_path)]).save(tmp_path)
    changes = {"max_steps": 40, "learning_rate": 1e-5, "save_steps": 2, "gradient_checkpointing": True}
    flags = [f"--{name}={value}" for name, value in changes.items()]
    config = load_config(None, ["--resume", str(tmp_path), *flags])
    assert {name: getattr(config, name) for name in changes} == changes
    assert all(name in {field.name for field in dataclasses.fields(ATESDConfig)} for name in MAY_CHANGE)
    text = " ".join(config_parser().format_help().split())
    assert f"Flags may change {', '.join(MAY_CHANGE)}." in text
    # what it resumes is not what it would resume the next time
    assert yaml.safe_load(config.save(tmp_path).read_text())["resume"] is None


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("lern_rate: 1", "unknown key 'lern_rate'.*"),
        ("learning_rte: 1", "did you mean learning_rate"),
        ("max_steps: null", "max_steps is null"),
        ("- a\n- b", "holds list"),
        ("a: [", "not valid YAML"),
        ("max_steps: 2\nseed: 1\nmax_steps: 3", "'max_steps' is set a second time, in .*mine.yaml\", line 3"),
        ("max_steps: 2.5", "max_steps.*invalid int value: '2.5'"),
    ],
)
def test_a_wrong_file_is_refused_with_its_name(tmp_path, content, told):
    (tmp_path / "mine.yaml").write_text(content)
    with pytest.raises(ConfigError, match=told) as refusal:
        load_config(str(tmp_path / "mine.yaml"), [])
    assert "mine.yaml" in str(refusal.value) or "2.5" in content


def test_a_run_is_not_written_over_another(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"already holds metrics\.jsonl, of a run .*: go on with a run by --resume"):
        load_config("quickstart", ["--output_dir", str(tmp_path)])


def test_help_shows_every_field_in_a_group_with_its_source_and_default():
    text = " ".join(config_parser().format_help().split())
    for field in dataclasses.fields(ATESDConfig):
        assert f"--{field.name} " in text
        source = field.metadata["help"].split("]")[0] + "]"
        assert source in ("[paper]", "[OPSD]", "[HF]", "[our choice]")
    assert text.count("(default: ") >= len(dataclasses.fields(ATESDConfig))
    assert "teacher exposure (alpha) and its policy:" in text


def test_the_defaults_of_the_controller_are_those_help_shows_with_their_source():
    from atesd.exposure.controller import ExposureController

    parameters = inspect.signature(ExposureController).parameters
    shown = {field.name: field.default for field in dataclasses.fields(ATESDConfig)} | {"per_example": False}
    given = {name: p.default for name, p in parameters.items() if p.default is not p.empty and name != "name"}
    assert given == {name: shown[name] for name in given} and len(given) >= 14


def test_reading_a_configuration_does_not_import_torch():
    code = (
        "import sys; from atesd.config import load_config; load_config('quickstart', []); print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


@pytest.mark.parametrize(
    "flags, message",
    (
        (["--divergence", "foward_kl"], "did you mean forward_kl"),
        (["--divergence", "skew_kl", "--beta", "1"], "always zero"),
        (["--importance_clip", "2"], "importance_clip .* would be ignored"),
    ),
)
def test_settings_no_run_could_use_are_refused_before_anything_loads(flags, message):
    with pytest.raises(ConfigError, match=message):
        load_config("quickstart", [*flags, "--output_dir", "unused"]).validate()


def test_the_names_a_configuration_may_have_are_those_of_the_registries_and_help_tells_them():
    from atesd.exposure.policies import POLICY_NAMES
    from atesd.rollout.make import ENGINES
    from atesd_kernels.divergences import BUILT_IN

    registered = {"divergence": BUILT_IN, "exposure_policy": POLICY_NAMES, "rollout_engine": ENGINES}
    assert {field: set(names) for field, names in doors.NAMES.items()} == {f: set(n) for f, n in registered.items()}
    help = {field.name: field.metadata["help"] for field in dataclasses.fields(ATESDConfig)}
    for field, names in doors.NAMES.items():
        assert all(name in help[field] for name in (*names, "module:object")), field


def test_what_a_run_calls_is_what_the_protocols_say():
    from atesd.exposure.policies import BUILDERS, ExposurePolicy
    from atesd.rollout import RolloutEngine

    for protocol, methods in ((ExposurePolicy, doors.POLICY_METHODS), (RolloutEngine, doors.ENGINE_METHODS)):
        public = {name for name, value in vars(protocol).items() if inspect.isfunction(value) and name[0] != "_"}
        assert public == set(methods)
    taken = {name: set(inspect.signature(builder).parameters) - {"name"} for name, builder in BUILDERS.items()}
    own = {name: tuple(p for p in parameters if p not in doors.POLICY_SETTINGS) for name, parameters in taken.items()}
    assert {name: set(words) for name, words in own.items() if words} == {
        name: set(words) for name, words in doors.POLICY_KWARGS.items()
    }


def test_a_ramp_takes_its_ends_from_exposure_kwargs():
    config = load_config("quickstart", ["--exposure_policy=linear", '--exposure_kwargs={"start_alpha": 1}'])
    assert config.exposure_kwargs == '{"start_alpha": 1}'
    with pytest.raises(ConfigError, match="start_alpha of exposure_kwargs is 2; it must be between 0 and 1"):
        load_config("quickstart", ["--exposure_policy=linear", '--exposure_kwargs={"start_alpha": 2}'])
    with pytest.raises(ConfigError, match="did you mean end_alpha"):
        load_config("quickstart", ["--exposure_policy=cosine", '--exposure_kwargs={"end_alfa": 1}'])


def test_keyword_arguments_may_be_a_mapping_in_yaml(tmp_path):
    file = write_yaml(tmp_path / "mine.yaml", extends="quickstart", exposure_policy="linear",
                      exposure_kwargs={"start_alpha": 1.0})  # fmt: skip
    assert json.loads(load_config(file, []).exposure_kwargs) == {"start_alpha": 1.0}


def test_an_evaluation_refuses_an_engine_that_is_not_known():
    for flags, told in ((["--rollout_engine", "vlm"], "did you mean vllm"), (["--rollout_kwargs", "[]"], "JSON obj")):
        with pytest.raises(ConfigError, match=told):
            load_eval_config(["--model", "m", "--data", "aime24", *flags])


def test_a_file_may_extend_a_recipe_or_a_file_beside_it(tmp_path):
    write_yaml(tmp_path / "base.yaml", extends="quickstart", max_steps=5, seed=3)
    config = load_config(write_yaml(tmp_path / "mine.yaml", extends="base.yaml", seed=4), [])
    assert (config.max_steps, config.seed, config.num_train_problems) == (5, 4, 640)
    with pytest.raises(ConfigError, match="leads back to itself"):
        write_yaml(tmp_path / "base.yaml", extends="mine.yaml")
        load_config(str(tmp_path / "mine.yaml"), [])
    with pytest.raises(ConfigError, match="there is no recipe 'quikstart'"):
        load_config(write_yaml(tmp_path / "lost.yaml", extends="quikstart"), [])


def test_a_count_of_problems_is_meant_where_it_was_chosen_for_the_data_set(tmp_path):
    every = {"num_train_problems", "num_probe_problems", "num_eval_problems"}
    six = tmp_path / "six.jsonl"
    six.touch()
    mine = write_yaml(tmp_path / "mine.yaml", extends="quickstart", dataset_name=str(six), num_eval_problems=2)
    assert load_config(mine, []).up_to == every - {"num_eval_problems"}
    assert load_config(mine, ["--num-probe-problems=3"]).up_to == {"num_train_problems"}
    assert load_config("quickstart", ["--dataset_name", str(six)]).up_to == every
    assert load_config("quickstart", []).up_to == frozenset(), "its own data set: every count is meant"
    assert load_config("gsm-symbolic", []).up_to == {"num_eval_problems"}
    run = load_config(mine, ["--output_dir", str(tmp_path / "run")])
    (tmp_path / "run").mkdir()
    run.save(tmp_path / "run")
    assert load_config(None, ["--resume", str(tmp_path / "run")]).up_to == frozenset()


@pytest.mark.parametrize(("line", "name"), [("2026-11-27", "2026-11-27"), ("2026-13-47", "2026-13-47")])
def test_a_date_in_yaml_is_a_text(tmp_path, line, name):
    file = tmp_path / "mine.yaml"
    file.write_text(f"extends: quickstart\noutput_dir: {line}\n")
    assert load_config(str(file), []).output_dir == name


def test_an_empty_resume_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="resume is empty"):
        load_config("quickstart", ["--resume", ""])


@pytest.mark.parametrize("content", ["seed: " + "[" * 20_000, "? [1, 2]\n: 3\n"])
def test_yaml_that_cannot_be_read_is_refused_by_name(tmp_path, content):
    file = tmp_path / "mine.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"mine\.yaml"):
        load_config(str(file), [])


@pytest.mark.parametrize("flags", [
    [],
    ["--teacher_top_k", "1", "--objective", "policy_gradient"],
    ["--teacher_tail", "renormalise", "--scoring_temperature", "1.1"],
    ["--teacher_views", '{"full": 1}', "--exposure_policy", "full"],
    ["--teacher_model_name_or_path", "a/b"],
])  # fmt: skip
def test_a_teacher_behind_a_server_takes_the_settings_that_work_with_it(flags):
    config = load_config("quickstart", [*SERVED, URL, *flags])
    assert config.other_model_teaches and config.teacher_base_url == URL
