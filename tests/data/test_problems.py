"""Problems: the built-in generator, files of every kind, and splits that never overlap."""

import json
import os
import subprocess
import sys
import warnings

import pytest

from atesd.data.files import open_dataset
from atesd.data.problems import Problem, ProblemSplits, load_problems
from atesd.data.segmentation import split_reference
from atesd.errors import DataError
from atesd.evaluation.grading.grader import Grader

datasets = pytest.importorskip("datasets")
ROWS = [{"problem": f"What is {i} + 1?", "solution": f"Add one. So \\boxed{{{i + 1}}}."} for i in range(12)]


@pytest.fixture(autouse=True)
def private_dataset_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(name, num_train=None, num_probe=2, num_eval=3, seed=0, **settings):
    return load_problems(name, num_train=num_train, num_probe=num_probe, num_eval=num_eval, seed=seed, **settings)


def texts(problems):
    return [p.problem for p in problems]


def test_gsm_symbolic_problems_have_working_and_the_right_answer():
    splits = load("gsm_symbolic", num_train=150)
    for problem in splits.train:
        reference = split_reference(problem.solution, problem.answer)
        assert len(reference.segments) >= 1 and reference.tail.startswith("####")
        assert float(reference.tail.strip("# \n")) == pytest.approx(float(problem.answer))


def test_gsm_symbolic_splits_do_not_share_a_problem():
    splits = load("gsm_symbolic", num_train=900, num_probe=50, num_eval=50)
    everything = texts(splits.train + splits.probe + splits.eval)
    assert [len(splits.train), len(splits.probe), len(splits.eval)] == [900, 50, 50]
    assert len(set(everything)) == 1000


def test_the_seed_decides_the_problems_in_every_process():
    code = (
        "from atesd.data.problems import load_problems\n"
        "print(repr(load_problems('gsm_symbolic', num_train=50, num_probe=2, num_eval=3, seed=5)))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "1", "PYTHONUTF8": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, encoding="utf-8", check=True
    )
    assert run.stdout.strip() == repr(load("gsm_symbolic", num_train=50, seed=5))
    first, second = load("gsm_symbolic", num_train=50, seed=5), load("gsm_symbolic", num_train=50, seed=6)
    assert first == load("gsm_symbolic", num_train=50, seed=5)
    assert not set(texts(first.train)) & set(texts(second.train))


def test_more_training_problems_leave_the_held_out_ones_alone(tmp_path):
    for name in ("gsm_symbolic", write_jsonl(tmp_path / "a.jsonl", ROWS)):
        few, many = load(name, num_train=2), load(name, num_train=7)
        assert (few.probe, few.eval) == (many.probe, many.eval)
        assert many.train[:2] == few.train


def test_importing_problems_does_not_load_the_generator_or_datasets():
    heavy = "('reasoning_gym', 'datasets', 'torch')"
    code = f"import sys, atesd.data.problems; print([m for m in {heavy} if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_a_file_in_another_encoding_is_refused_with_its_line(tmp_path, suffix):
    rows = [json.dumps({"problem": word, "answer": "2"}, ensure_ascii=False) for word in ("1+1?", "caf\xe9: 1+1?")]
    text = "\n".join(rows) + "\n" if suffix == ".jsonl" else "[" + ",\n".join(rows) + "]"
    (tmp_path / f"rows{suffix}").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match="is not UTF-8: line 2 has the byte 0xe9"):
        open_dataset(str(tmp_path / f"rows{suffix}"), "train")


def test_files_of_every_kind_give_the_same_problems(tmp_path):
    table = datasets.Dataset.from_list(ROWS)
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "a.json").write_text(json.dumps(ROWS), encoding="utf-8")
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "saved-dict")
    found = [load(str(tmp_path / name)) for name in ("a.jsonl", "a.json", "a.parquet", "saved", "saved-dict")]
    assert all(texts(splits.train) == texts(found[0].train) for splits in found)
    splits = found[0]
    assert [len(splits.train), len(splits.probe), len(splits.eval), splits.skipped] == [7, 2, 3, 0]
    assert sorted(texts(splits.train + splits.probe + splits.eval)) == sorted(row["problem"] for row in ROWS)


def test_columns_are_configurable_and_an_answer_column_wins(tmp_path):
    rows = [{"q": f"q{i}", "s": f"It is \\boxed{{{i}}}", "a": 100 + i} for i in range(3)]
    columns = {"problem_column": "q", "solution_column": "s", "answer_column": "a"}
    splits = load(write_jsonl(tmp_path / "a.jsonl", rows), num_probe=0, num_eval=0, **columns)
    assert {(p.problem, p.answer) for p in splits.train} == {("q0", "100"), ("q1", "101"), ("q2", "102")}


def test_the_answers_of_opsds_dataset_are_read_from_the_column_it_calls_answer_with_a_capital(tmp_path):
    rows = [{"problem": "q0", "solution": "It is 3 + 4.", "Answer": "7"}]
    assert load(write_jsonl(tmp_path / "a.jsonl", rows), num_probe=0, num_eval=0).train[0].answer == "7"
    rows = [{**rows[0], "answer": "8"}]
    splits = load(write_jsonl(tmp_path / "b.jsonl", rows), num_probe=0, num_eval=0)
    assert splits.train[0].answer == "8" and splits.repeated == 0


def test_gsm8k_style_answers_that_hold_the_solution_are_read(tmp_path):
    rows = [{"question": "q0", "answer": "1 + 1 = 2\n#### 2"}]
    columns = {"problem_column": "question", "solution_column": "answer"}
    splits = load(write_jsonl(tmp_path / "a.jsonl", rows), num_probe=0, num_eval=0, **columns)
    assert splits.train[0].answer == "2" and splits.train[0].solution.startswith("1 + 1")


def test_a_problem_that_repeats_is_in_one_split_only(tmp_path):
    rows = [{**row, "problem": row["problem"].upper() + " \n" * n} for n in range(4) for row in ROWS]
    splits = load(write_jsonl(tmp_path / "a.jsonl", rows + ROWS))
    assert len(splits.train) == 7 and splits.repeated == 4 * len(ROWS)


def test_evaluation_sets_need_no_solution(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"problem": "q", "answer": 204}])
    splits = load(path, num_train=0, num_probe=0, num_eval=1, require_solution=False)
    assert splits == ProblemSplits([], [], [Problem("a-0", "q", "", "204")], 0)


def test_missing_columns_are_named_with_the_columns_there_are(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"title": "q", "text": "t"}])
    with pytest.raises(
        ValueError, match=r"problem_column='problem', solution_column='solution'; .*\['text', 'title'\]"
    ):
        load(path)
    with pytest.raises(ValueError, match=r"answer_column='final'"):
        load(write_jsonl(tmp_path / "b.jsonl", ROWS), answer_column="final")


@pytest.mark.parametrize("key", ["problem", "solution"])
def test_an_empty_problem_or_solution_is_named_by_its_row(tmp_path, key):
    rows = [dict(row) for row in ROWS]
    rows[4][key] = "  \n"
    with pytest.raises(ValueError, match=f"row 4 of a has an empty {key}"):
        load(write_jsonl(tmp_path / "a.jsonl", rows))


def test_rows_without_an_answer_are_skipped_counted_and_warned_about(tmp_path):
    rows = [*ROWS, {"problem": "Why?", "solution": "Because."}, {"problem": "How?", "solution": "So."}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.warns(UserWarning, match="skipped 2 problems without a final answer"):
        splits = load(path)
    assert splits.skipped == 2 and len(splits.train) == 7
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(write_jsonl(tmp_path / "b.jsonl", ROWS))


def test_too_few_problems_are_refused_with_the_counts(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(ValueError, match=r"has 12 different problems .* need 15"):
        load(path, num_train=10)
    with pytest.raises(ValueError, match=r"need 13"):
        load(path, num_probe=6, num_eval=6)  # nothing left to train on


@pytest.mark.parametrize(
    ("name", "message"),
    [("./nowhere.jsonl", "no such file"), ("nowhere.parquet", "no such file"), ("no-such/hub-set", "HF_HUB_OFFLINE")],
)
def test_what_cannot_be_loaded_is_named_with_what_to_give(name, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=message) as caught:
        load(name)
    assert name in str(caught.value)


NO_ROWS = {
    "no byte.jsonl": b"",
    "no byte.json": b"",
    "no byte.csv": b"",
    "no byte.parquet": b"",
    "white.jsonl": b" \n\n\t\r\n",
    "a mark only.jsonl": b"\xef\xbb\xbf\n",
    "no item.json": b"[]",
    "a header.csv": b"problem,solution\n",
    "columns.parquet": None,
    "a folder": b"",
}


@pytest.mark.parametrize("require_solution", [True, False])  # training and evaluation
@pytest.mark.parametrize("name", NO_ROWS)
def test_data_without_a_row_is_called_empty(name, require_solution, tmp_path):
    path = tmp_path / name
    if name == "a folder":
        path.mkdir()
        (path / "train.jsonl").write_bytes(b"")
    elif name == "columns.parquet":
        datasets.Dataset.from_dict({"problem": [], "solution": []}).to_parquet(path)
    else:
        path.write_bytes(NO_ROWS[name])
    with pytest.raises(DataError, match=f"{name} is empty") as told:
        load(str(path), require_solution=require_solution)
    assert "StopIteration" not in str(told.value) and "Hub name" not in str(told.value)


ROW = '{"problem": "a", "solution": "b", "answer": "1"}'


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.jsonl", f"{ROW}\n{ROW}\n{ROW[:30]}", "line 3 is no JSON value"),
        ("a.jsonl", f"{ROW}\n\nhello\n{ROW}\n", "line 3 is no JSON value"),
        ("a.json", f"[{ROW},\n{ROW[:30]}", "line 2 is no JSON value"),
        ("a.json", f"{ROW}\n{ROW[:30]}", "line 2 is no JSON value"),
        ("a.parquet", "PAR1 and no more", "ArrowInvalid"),
        ("a.csv", "problem,solution\n\udcff,b\n", "UnicodeDecodeError"),
    ],
)
def test_a_damaged_file_is_told_with_its_line_and_not_with_other_kinds_of_file(name, text, told, tmp_path):
    path = tmp_path / name
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=told) as refusal:
        load(str(path))
    assert name in str(refusal.value) and "Hub name" not in str(refusal.value)


def test_a_file_of_another_kind_and_nested_columns_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("hello", encoding="utf-8")
    with pytest.raises(ValueError, match=r"none of \.jsonl"):
        load(str(tmp_path / "a.txt"))
    nested = [{"problem": "q", "solution": [{"step": 1, "text": "5"}]}]
    with pytest.raises(ValueError, match="'solution' holds list, not text"):
        load(write_jsonl(tmp_path / "a.jsonl", nested), num_probe=0, num_eval=0)


def test_the_endless_generator_must_be_told_how_many():
    with pytest.raises(ValueError, match="say how many problems with num_train"):
        load("gsm_symbolic")
    with pytest.raises(ValueError, match="num_probe must not be negative, got -1"):
        load("gsm_symbolic", num_train=1, num_probe=-1)


def test_gsm_symbolic_without_reasoning_gym_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym.arithmetic.gsm_symbolic.gsm_symbolic", None)
    with pytest.raises(ImportError, match="pip install 'reasoning-gym"):
        load("gsm_symbolic", num_train=1)


def test_every_reference_solution_is_graded_as_right():
    pytest.importorskip("math_verify", reason="grading needs math-verify")
    problems = load("gsm_symbolic", num_train=200).train
    with Grader() as grader:
        verdicts = grader.grade_many([p.solution for p in problems], [p.answer for p in problems])
    assert all(verdict.correct for verdict in verdicts)


COUNTS = ("num_train", "num_probe", "num_eval")


@pytest.mark.parametrize(
    ("asked", "up_to", "got"),
    [
        ((400, 8, 64), COUNTS, (6, 3, 3)),  # a recipe made for other data
        ((None, 16, 0), COUNTS, (9, 3, 0)),  # the defaults
        ((None, 2, 3), COUNTS, (7, 2, 3)),  # enough for all: nothing changes
        ((4, 2, 3), COUNTS, (4, 2, 3)),
        ((5, 8, 0), ("num_probe",), (5, 3, 0)),  # what the user chose stays
        ((400, 2, 5), ("num_train", "num_probe"), (5, 2, 5)),
    ],
)
def test_counts_chosen_for_other_data_are_upper_bounds(tmp_path, asked, up_to, got):
    path = write_jsonl(tmp_path / "twelve.jsonl", ROWS)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        splits = load(path, *asked, up_to=up_to)
    assert (len(splits.train), len(splits.probe), len(splits.eval)) == got
    assert len(set(texts(splits.train + splits.probe + splits.eval))) == sum(got)
    changed = asked[0] not in (None, got[0]) or asked[1:] != got[1:]
    assert bool(told) == changed
    if changed:
        now = f"num_train_problems is now {got[0]}, num_probe_problems {got[1]}, num_eval_problems {got[2]}"
        assert f"so the run takes fewer: {now}" in str(told[0].message)


@pytest.mark.parametrize("asked", [(1, 12, 0), (13, 0, 0), (None, 6, 6)])
def test_counts_that_the_user_chose_are_not_lowered(tmp_path, asked):
    path = write_jsonl(tmp_path / "twelve.jsonl", ROWS)
    with pytest.raises(ValueError, match="12 different problems"):
        load(path, *asked, up_to=())


def test_a_file_too_small_to_hold_anything_out_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "two.jsonl", ROWS[:2])
    with pytest.raises(ValueError, match="2 different problems"):
        load(path, 400, 8, 8, up_to=COUNTS)
