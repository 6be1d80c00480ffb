"""What a run says at its end about its held-out problems."""

from __future__ import annotations

import json

import pytest

from atesd.data.problems import Problem
from atesd.evaluation.grading.grader import Grader, Verdict
from atesd.evaluation.learned import forget_answers_after, keep_answers
from atesd.reports.learned import SHOWN_CHARACTERS, as_card, as_lines, headline, read_comparison
from atesd.trainer import train

pytest.importorskip("math_verify", reason="grading needs math-verify")

PROBLEMS = [Problem(name, f"What is {name}?", "So it is.", name) for name in "abcd"]


def samples(right: str, names: str = "abcd", k: int = 1, text: str = "I say so") -> list[dict]:
    """`k` samples of each problem, all right for those in `right`."""
    return [{"problem_id": n, "sample": i, "correct": n in right, "text": text} for n in names for i in range(k)]


def compared(run_dir, before, after, step: int = 5):
    keep_answers(run_dir, 0, PROBLEMS, before)
    keep_answers(run_dir, step, PROBLEMS, after)
    return read_comparison(run_dir)


def test_a_run_ends_with_its_accuracy_before_and_after_and_one_problem(tiny_config, capsys, monkeypatch):
    graded = []

    def learns(grader, texts, golds, cut_off=None):
        graded.extend(texts)
        return [Verdict(len(graded) > 6, "7", "told")] * len(texts)  # six answers an evaluation

    monkeypatch.setattr(Grader, "grade_many", learns)
    evaluated = {"num_eval_problems": 3, "eval_k": 2, "eval_max_completion_length": 4}
    run = train(tiny_config(max_steps=2, eval_steps=2, **evaluated))
    last = capsys.readouterr().out.strip().splitlines()[-5:]
    told = "held-out accuracy 0.00 [0.00, 0.00] -> 1.00 [1.00, 1.00] on 3 problems (change +1.00 [+1.00, +1.00])"
    assert last[0] == told
    starts = ("  problem: ", "  its answer: ", "  before, wrong: ", "  after step 2, right: ")
    assert all(line.startswith(start) for line, start in zip(last[1:], starts, strict=True))
    summary = json.loads((run / "summary.json").read_text())
    assert summary["held_out_accuracy"]["change"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert len((run / "answers/step-0.jsonl").read_text().splitlines()) == 6
    page = (run / "report.html").read_text()
    assert page.index("held-out accuracy") < page.index('class="tiles"') < page.index("<h2>Training</h2>")


def test_a_run_without_evaluations_says_nothing_of_them(tiny_config, capsys):
    run = train(tiny_config(max_steps=1))
    assert "held-out accuracy" not in capsys.readouterr().out + (run / "report.html").read_text()
    assert not (run / "answers").exists()


def test_the_change_is_paired_by_problem_and_the_example_shows_it(tmp_path):
    found = compared(tmp_path, samples("ab", k=2), samples("bcd", k=2))
    assert (found["before"]["value"], found["after"]["value"], found["num_problems"]) == (0.5, 0.75, 4)
    assert found["change"]["value"] == 0.25 and found["change"]["low"] < 0 < found["change"]["high"]
    assert [sample["correct"] for sample in found["example"]] == [False, True]
    assert "change +0.25 [-" in headline(found)


def test_a_run_that_got_worse_says_so(tmp_path):
    found = compared(tmp_path, samples("abc"), samples("d"))
    assert found["change"]["value"] == -0.5
    assert [sample["correct"] for sample in found["example"]] == [True, False]
    assert "before, right" in as_lines(found) and "after step 5, wrong" in as_lines(found)


def test_a_run_that_goes_on_with_other_problems_compares_those_that_both_evaluations_have(tmp_path):
    found = compared(tmp_path, samples("a", "abc"), samples("bd", "bcd"))
    assert (found["num_problems"], found["change"]["value"]) == (2, 0.5)
    (tmp_path / "none").mkdir()
    assert compared(tmp_path / "none", samples("a", "ab"), samples("c", "cd")) is None


def test_the_latest_evaluation_is_compared_and_one_problem_has_no_interval(tmp_path):
    compared(tmp_path, samples("", "a"), samples("", "a"), step=5)
    found = compared(tmp_path, samples("", "a"), samples("a", "a"), step=10)
    assert headline(found) == "held-out accuracy 0.00 -> 1.00 on 1 problems (change +1.00)"
    assert found["step"] == 10


def test_long_and_hostile_answers_are_shortened_and_escaped(tmp_path):
    text = "<script>x</script>\n" + "thinking " * 200 + "\ud800 so it is \\boxed{7}"
    found = compared(tmp_path, samples("", text=text), samples("a", text=text))
    assert max(map(len, as_lines(found).splitlines())) < SHOWN_CHARACTERS + 50
    assert as_lines(found).splitlines()[-1].endswith("\\boxed{7}")
    assert "<script>" not in as_card(found)


def test_a_run_that_goes_on_from_an_earlier_step_forgets_later_answers(tmp_path):
    compared(tmp_path, samples("a"), samples("ab"), step=5)
    compared(tmp_path, samples("a"), samples("abc"), step=10)
    forget_answers_after(tmp_path, 10)
    assert read_comparison(tmp_path)["step"] == 10
    forget_answers_after(tmp_path, 7)
    assert sorted(path.name for path in (tmp_path / "answers").iterdir()) == ["step-0.jsonl", "step-5.jsonl"]
    forget_answers_after(tmp_path / "nothing", 7)


@pytest.mark.parametrize("line", ["{", "[1]", "{}", "\udcff"])
def test_damaged_answers_from_before_training_are_warned_of_and_end_no_run(tmp_path, line):
    keep_answers(tmp_path, 0, PROBLEMS, samples("a"))
    (tmp_path / "answers/step-0.jsonl").write_text(line, errors="surrogateescape")
    with pytest.warns(UserWarning, match=r"step-0\.jsonl is damaged"):
        keep_answers(tmp_path, 5, PROBLEMS, samples("a"))
    assert read_comparison(tmp_path) is None


@pytest.mark.parametrize("content", ["", "[]", "{}", "nul"])
def test_a_damaged_comparison_is_none(tmp_path, content):
    compared(tmp_path, samples("a"), samples("b"))
    (tmp_path / "answers/comparison.json").write_text(content)
    assert read_comparison(tmp_path) is None
