"""Files as people have them: made-up rows in the layouts of well-known data sets load without a conversion script."""

import csv
import json

import pytest

from atesd.data.layouts import INSTRUCTIONS, cell
from atesd.data.problems import load_problems
from atesd.errors import DataError

datasets = pytest.importorskip("datasets")
NO_SOLUTION = {"require_solution": False}


@pytest.fixture(autouse=True)
def private_dataset_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")


@pytest.fixture
def load(tmp_path):
    """Writes rows to a file and loads all of them as training problems, in the order of the rows."""

    def load(rows, kind="jsonl", **settings):
        path = tmp_path / f"rows.{kind}"
        if kind == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        elif kind == "parquet":
            datasets.Dataset.from_list(rows).to_parquet(path)
        splits = load_problems(str(path), num_train=None, num_probe=0, num_eval=0, seed=0, **settings)
        return sorted(splits.train, key=lambda p: int(p.id.rpartition("-")[2])), splits.skipped

    return load


def chat(user, assistant=None, names=("role", "content"), roles=("user", "assistant")):
    turns = [dict(zip(names, (roles[0], user), strict=True))]
    return turns + ([dict(zip(names, (roles[1], assistant), strict=True))] if assistant else [])


def verl_row(prompt, **extra):
    return {
        "data_source": "made/up",
        "prompt": chat(prompt),
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "7"},
        "extra_info": {"index": 0, "split": "train", **extra},
    }


THOUGHT = "<think>\nMaybe \\boxed{9}? No.\n</think>\n\n"
WORKED = "Add them. So it is $\\boxed{7}$."
ASK = "What is 3 + 4?"
LAYOUTS = {
    "AIME24": {"id": 60, "problem": ASK, "solution": WORKED, "answer": "7", "url": "u", "year": "2024"},
    "AIME, another spelling": {"ID": "2024-I-1", "Problem": ASK, "Solution": WORKED, "Answer": 7},
    "MATH": {"problem": ASK, "level": "Level 1", "type": "Algebra", "solution": WORKED},
    "MATH-500": {"problem": ASK, "solution": WORKED, "answer": "7", "subject": "Algebra", "unique_id": "t/1.json"},
    "GSM8K": {"question": ASK, "answer": "Add them: 3 + 4 = <<3+4=7>>7.\n#### 7"},
    "NuminaMath-CoT": {"source": "s", "problem": ASK, "solution": WORKED, "messages": chat(ASK, WORKED)},
    "NuminaMath-1.5": {"problem": ASK, "solution": WORKED, "answer": "7", "problem_is_valid": "Yes"},
    "OpenR1": {"problem": ASK, "solution": WORKED, "answer": "7", "generations": [THOUGHT + WORKED], "uuid": "u",
               "messages": chat(ASK, THOUGHT + WORKED)},
    "OpenMathReasoning": {"expected_answer": "7", "problem_type": "has_answer_extracted", "problem": ASK,
                          "generated_solution": THOUGHT + WORKED, "inference_mode": "cot"},
    "OpenThoughts": {"system": "Think.", "conversations": chat(
        "Return your final response within \\boxed{}. " + ASK,
        "<|begin_of_thought|>\n\n\\boxed{9}?\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\n"
        + WORKED + "\n\n<|end_of_solution|>", names=("from", "value"))},
    "OpenThoughts3": {"difficulty": 1, "conversations": chat(
        ASK, THOUGHT + WORKED, names=("from", "value"), roles=("human", "gpt"))},
    "OpenThoughts, its metadata": {"problem": ASK, "deepseek_reasoning": "\\boxed{9}?", "deepseek_solution": WORKED,
                                   "ground_truth_solution": None, "domain": "math"},
    "verl, GSM8K": verl_row(ASK + INSTRUCTIONS[1][1], question=ASK, answer="3 + 4 = <<3+4=7>>7.\n#### 7"),
    "a chat": {"messages": [{"role": "system", "content": "Be brief."}, *chat(ASK, WORKED)]},
}  # fmt: skip


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_with_worked_solutions_load_as_they_are(load, layout, kind):
    (problem,), _ = load([LAYOUTS[layout]], kind)
    assert (problem.problem, problem.answer) == (ASK, "7")
    assert "dd them" in problem.solution or problem.solution.startswith("3 + 4 = 7.")
    assert not any(mark in problem.solution for mark in ("<<", "think", "_of_", "9"))


WITHOUT_SOLUTION = {
    "AIME25": {"problem": ASK, "answer": "7", "id": "0"},
    "AIME25, another spelling": {"question": ASK, "answer": "7"},
    "HMMT": {"problem_idx": 1, "problem": ASK, "answer": "7", "problem_type": ["Algebra", "Combinatorics"]},
    "AIME25 of MathArena": {"problem_idx": 1, "problem": ASK, "answer": 7, "problem_type": ["Algebra"]},
    "DAPO": verl_row(INSTRUCTIONS[0][0] + ASK + INSTRUCTIONS[0][1]),
    "verl, Skywork": {**verl_row(ASK), "reward_model": {"style": "rule", "ground_truth": '["7"]'}},
    "verl, MATH": verl_row(ASK + INSTRUCTIONS[2][1]),
    "DeepMath": {"question": ASK, "final_answer": "7", "difficulty": 3.0, "topic": "sums"},
    "GSM8K": LAYOUTS["GSM8K"],
}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("layout", WITHOUT_SOLUTION)
def test_rows_without_solutions_load_where_none_is_read(load, layout, kind):
    (problem,), _ = load([WITHOUT_SOLUTION[layout]], kind, **NO_SOLUTION)
    assert (problem.problem, problem.answer) == (ASK, "7")


def test_rows_without_solutions_are_refused_where_they_are_read_with_the_columns_there_are(load):
    with pytest.raises(DataError, match=r"no column for solution_column='solution'; .*'reward_model'"):
        load([WITHOUT_SOLUTION["DAPO"]])


def test_nested_columns_are_named_with_dots(load):
    rows = [{"q": {"text": [ASK]}, "meta": {"notes": [{"working": WORKED}], "gold": {"value": 7}}, "a.b": "8"}]
    columns = {"problem_column": "q.text.0", "solution_column": "meta.notes.0.working"}
    (problem,), _ = load(rows, **columns, answer_column="meta.gold.value")
    assert (problem.problem, problem.solution, problem.answer) == (ASK, WORKED, "7")
    assert load(rows, **columns, answer_column="a.b")[0][0].answer == "8"  # a column whose own name has a dot
    with pytest.raises(DataError, match=r"answer_column='meta\.gold\.number'"):
        load(rows, **columns, answer_column="meta.gold.number")


def test_a_configured_column_is_never_replaced_by_another(load):
    with pytest.raises(DataError, match="solution_column='working'"):
        load([LAYOUTS["MATH"]], solution_column="working")


@pytest.mark.parametrize("content", [
    {"data": [LAYOUTS["AIME24"]]}, {"version": "1.0", "data": [LAYOUTS["AIME24"]], "notes": [{"by": "us"}]},
    {"test": [{"problem": "x", "solution": "y", "answer": "1"}], "train": [LAYOUTS["AIME24"]]},
    {"problems": [LAYOUTS["GSM8K"]]},
])  # fmt: skip
def test_a_json_object_around_the_rows_is_opened(tmp_path, content):
    (tmp_path / "wrapped.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    splits = load_problems(str(tmp_path / "wrapped.json"), num_train=1, num_probe=0, num_eval=0, seed=0)
    assert (splits.train[0].problem, splits.train[0].answer) == (ASK, "7")


def test_answers_of_mixed_types_and_numbers_in_text_stay_as_written(tmp_path):
    rows = [{"problem": f"q{i}", "answer": a} for i, a in enumerate([7, "1/2", 2.5, "007", 12345678901234567890])]
    (tmp_path / "wrapped.json").write_text(json.dumps({"data": rows}), encoding="utf-8")
    splits = load_problems(str(tmp_path / "wrapped.json"), num_train=5, num_probe=0, num_eval=0, seed=0, **NO_SOLUTION)
    assert {p.answer for p in splits.train} == {"7", "1/2", "2.5", "007", "12345678901234567890"}


def test_integers_stay_integers_in_a_column_with_gaps_and_the_gaps_are_counted(tmp_path):
    answers = ["7", "", "90071992547409931", "-3"]
    with (tmp_path / "gaps.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["problem", "solution", "answer"], *([f"q{i}", "So.", a] for i, a in enumerate(answers))])
    table = {"problem": ["a", "b", "c"], "solution": ["So."] * 3, "answer": [7.0, float("nan"), None]}
    datasets.Dataset.from_dict(table).to_parquet(tmp_path / "gaps.parquet")
    for name, expected in (("gaps.csv", {"7", "90071992547409931", "-3"}), ("gaps.parquet", {"7"})):
        with pytest.warns(UserWarning, match="without a final answer"):
            splits = load_problems(str(tmp_path / name), num_train=None, num_probe=0, num_eval=0, seed=0)
        assert {p.answer for p in splits.train} == expected
        assert splits.skipped == (1 if name == "gaps.csv" else 2)


def test_a_csv_row_with_too_many_fields_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("problem,answer\nq,1,000\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"row 0 of a\.csv has more fields"):
        load_problems(str(tmp_path / "a.csv"), num_train=1, num_probe=0, num_eval=0, seed=0, **NO_SOLUTION)


def test_problems_whose_answer_says_there_is_none_are_skipped_and_counted(load):
    answers = ["notfound", "proof", "N/A", "", None, "7"]
    rows = [{"problem": f"q{i}", "solution": WORKED if i else "", "answer": a} for i, a in enumerate(answers)]
    with pytest.warns(UserWarning, match="skipped 5 problems"):
        problems, skipped = load(rows)
    assert skipped == 5 and [p.answer for p in problems] == ["7"]


def test_references_whose_boxes_are_cut_off_or_unclear_are_skipped_and_parts_are_kept(load):
    solutions = [r"It is \boxed{4}. No: \boxed{5", r"It is $\boxed{\frac12} = \boxed{0.5}$.", "<think>\\boxed{4}"]
    solutions += [r"So $x = \boxed{2}$ or $x = \boxed{-2}$."]
    with pytest.warns(UserWarning, match="skipped 3 problems"):
        problems, _ = load([{"problem": f"q{i}", "solution": s} for i, s in enumerate(solutions)])
    assert [p.answer for p in problems] == ["2, -2"]


@pytest.mark.parametrize("kind", ["numpy", "torch", "pandas"])
def test_rows_saved_with_a_format_load_as_plain_values(tmp_path, kind):
    table = datasets.Dataset.from_list(
        [LAYOUTS["verl, GSM8K"], verl_row("And 4 + 4?", question="And 4 + 4?", answer=WORKED)]
    )
    table.with_format(kind).save_to_disk(tmp_path / "saved")
    splits = load_problems(str(tmp_path / "saved"), num_train=2, num_probe=0, num_eval=0, seed=0)
    assert {p.problem for p in splits.train} == {ASK, "And 4 + 4?"} and {p.answer for p in splits.train} == {"7"}


def test_cells_that_are_arrays_tensors_or_lists_of_one_are_read():
    numpy, torch = pytest.importorskip("numpy"), pytest.importorskip("torch")
    values = [torch.tensor(7), torch.tensor([7.0]), numpy.float64(7), numpy.array(["7"]), ["7"], 7.0]
    assert {cell({"a": value}, "answer", "a", "row") for value in values} == {"7"}
    with pytest.raises(DataError, match="'a' holds list, not text"):
        cell({"a": numpy.array([1, 2])}, "answer", "a", "row")


def test_a_list_written_as_text_is_read_as_one_and_an_interval_stays_as_it_is():
    def answer(text):
        return cell({"a": text}, "answer", "a", "row")

    assert answer('["\\\\frac{1}{2}"]') == r"\frac{1}{2}"
    assert [answer(text) for text in ("[1, 2]", "[7]", '["', '["a" + "b"]')] == ["[1, 2]", "[7]", '["', '["a" + "b"]']
    with pytest.raises(DataError, match="'a' holds list, not text"):
        answer('["7", "8"]')
    assert cell({"a": '["7"]'}, "problem", "a", "row") == '["7"]'
