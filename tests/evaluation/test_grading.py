"""Grading: a table of verdicts decided by hand, and time limits that hold whatever the answer is."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import atesd
from atesd.data.problems import Problem
from atesd.data.thinking import decode_response
from atesd.evaluation.answers import EvalProtocol, answers
from atesd.evaluation.grading import grader as grading
from atesd.evaluation.grading.answer_text import same_answer
from atesd.evaluation.grading.grader import Grader, Verdict, grade
from atesd.rollout import Rollout
from atesd.run import Run

pytest.importorskip("math_verify", reason="grading needs math-verify")

CASES = [json.loads(line) for line in (Path(__file__).parent / "grading_cases.jsonl").open(encoding="utf-8")]


def text_of(prediction):
    """Long hostile responses are stored as [[piece, times], ...]."""
    return prediction if isinstance(prediction, str) else "".join(piece * times for piece, times in prediction)


@pytest.fixture(scope="module")
def grader():
    with Grader(num_workers=2, time_limit=3.0) as pool:
        yield pool


@pytest.fixture(scope="module")
def table(grader):
    return grader.grade_many([text_of(case["prediction"]) for case in CASES], [case["answer"] for case in CASES])


def test_the_table_holds_at_least_sixty_cases_of_every_kind():
    groups = {case["group"] for case in CASES}
    assert len(CASES) >= 60
    named = "fractions numbers equivalent sets intervals units text braces several marker none hostile competition"
    assert groups >= set(named.split())
    assert (
        0.3 < sum(case["correct"] for case in CASES) / len(CASES) < 0.8
    )  # neither "always yes" nor "always no" is good


@pytest.mark.parametrize("index", range(len(CASES)), ids=[f"{c['group']}-{c['why'][:40]}" for c in CASES])
def test_the_verdict_is_the_one_decided_by_hand(table, index):
    case = CASES[index]
    assert table[index].correct is case["correct"], (case["why"], case["answer"], table[index])


def test_an_answer_that_hangs_costs_its_limit_and_the_next_ones_are_graded():
    with Grader(num_workers=1, time_limit=1.0) as pool:
        assert pool.grade(r"\boxed{\frac{2}{4}}", "1/2").correct  # the worker is up
        start = time.monotonic()
        verdicts = pool.grade_many([r"\boxed{9^{9^{9^{9}}}}", r"\boxed{\frac{3}{6}}"], ["7", "1/2"])
        seconds = time.monotonic() - start
    assert verdicts[0] == Verdict(False, "9^{9^{9^{9}}}", "time limit")
    assert verdicts[1].correct
    assert seconds < 15  # 1 s of limit, and a new process that imports sympy


def test_a_worker_that_dies_costs_one_answer_only(grader):
    grader.grade(r"\boxed{\frac{2}{4}}", "1/2")
    os.kill(grader._workers[0].process.pid, signal.SIGKILL)
    verdicts = grader.grade_many([r"\boxed{\frac{2}{4}}"] * 6, ["1/2"] * 6)
    assert sum(verdict.correct for verdict in verdicts) >= 5
    assert {verdict.reason for verdict in verdicts} <= {"equal", "the grading process died"}


def test_a_worker_that_is_dead_when_it_is_asked_costs_one_answer_only():
    """What could not be written to it is still in the buffer when it is replaced."""
    with Grader(num_workers=1) as pool:
        pool.grade(r"\boxed{\frac{2}{4}}", "1/2")
        worker = pool._workers[0]
        worker.process.kill()
        worker.process.wait()
        verdicts = pool.grade_many([r"\boxed{\frac{2}{4}}"] * 3, ["1/2"] * 3)
    assert sum(verdict.correct for verdict in verdicts) == 2
    assert {verdict.reason for verdict in verdicts} <= {"equal", "the grading process died"}


def test_an_answer_that_takes_all_memory_costs_itself_only(monkeypatch):
    """The worker says so and ends; the answers after it are for a fresh one."""
    worker = (
        "import atesd.evaluation.grading.worker as w\n"
        "compare = w.load_compare()\n"
        "def spoiled(target, **rest):\n"
        "    if target == 'huge': raise MemoryError\n"
        "    return compare(target=target, **rest)\n"
        "w.load_compare = lambda: spoiled\n"
        "w.serve(5.0)\n"
    )
    start = subprocess.Popen
    monkeypatch.setattr(grading.subprocess, "Popen", lambda args, **kw: start([*args[:-1], worker], **kw))
    with Grader(num_workers=1) as pool:
        verdicts = pool.grade_many([r"\boxed{huge}", *[r"\boxed{\frac{2}{4}}"] * 3], ["x^2", *["1/2"] * 3])
    assert [verdict.reason for verdict in verdicts] == ["memory limit", "equal", "equal", "equal"]


def test_workers_end_with_the_process_that_started_them(tmp_path):
    script = (
        "from atesd.evaluation.grading.grader import Grader\n"
        "g = Grader(num_workers=1); g.grade(r'\\boxed{\\frac{2}{4}}', '1/2')\n"
        "print(g._workers[0].process.pid, flush=True)\n"
        "import os; os._exit(1)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(atesd.__file__).parents[1])}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=60)
    pid = int(run.stdout)
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return
        if state == "Z":  # ended, waiting for init
            return
        time.sleep(0.1)
    pytest.fail(f"worker {pid} outlived its parent")


def test_grading_works_from_several_threads_at_once(grader):
    results = {}

    def work(n):
        results[n] = grader.grade_many([rf"\boxed{{\frac{{{n}}}{{{2 * n}}}}}"] * 5, ["1/2"] * 5)

    threads = [threading.Thread(target=work, args=(n,)) for n in (2, 3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(verdict.correct for n in (2, 3, 4) for verdict in results[n])


def test_box_only_gives_no_credit_for_an_answer_in_passing_or_on_a_marked_line():
    with Grader(box_only=True) as pool:
        assert pool.grade("The answer is 7.", "7") == Verdict(False, None, "no answer")
        assert pool.grade("3 + 4 = 7\n#### 7", "7") == Verdict(False, None, "no answer")
        assert pool.grade(r"\boxed{7}", "7").correct


@pytest.mark.parametrize("box_only", [True, False])
@pytest.mark.parametrize(
    ("response", "answer", "correct"),
    [
        (r"\boxed{4}. No, wait: \boxed{5", "4", False),
        (r"<think>\boxed{4}</think> I do not know.", "4", False),
        (r"<think>Perhaps \boxed{3}.</think> It is \boxed{4}.", "4", True),
        ("<think>so 4", "4", False),
        (r"\fbox{4}", "4", True),
        (r"\boxed 4.", "4", True),
        (r"$x = \boxed{2}$ or $x = \boxed{-2}$.", "2, -2", True),
        (r"\boxed{5} or \boxed{6}", "6", False),
        (r"So $\boxed{0.5} = \boxed{1/2}$.", r"\frac12", True),
        (r"$\fbox{5", "5", False),
    ],
)
def test_boxes_are_read_by_one_rule_whatever_else_may_be_an_answer(response, answer, correct, box_only):
    with Grader(num_workers=1, box_only=box_only) as pool:
        assert pool.grade(response, answer).correct is correct


@pytest.mark.parametrize("box_only", [True, False])
def test_one_setting_rules_the_reward_and_the_evaluations_of_a_run(tiny_config, box_only):
    run = Run.build(
        tiny_config(objective="grpo", exposure_policy="full", num_generations=2, box_only=box_only, eval_steps=1,
                    num_eval_problems=2)
    )  # fmt: skip
    guess = run.tokenizer("It could be 5 or 6 or 7.").input_ids
    problem = Problem("a", "", "", "7")
    rewards = run.reward.rewards([problem], [Rollout([5], guess, truncated=False)])
    text = decode_response(run.tokenizer, [5], guess)
    run.close()
    assert rewards == [float(not box_only)]
    assert run.evaluation.grader.box_only == box_only
    with Grader(box_only=box_only) as pool:
        assert float(pool.grade(text, "7").correct) == rewards[0]


@pytest.mark.parametrize(
    ("said", "right"),
    [
        (r"So it is \boxed{7}. To check, 3 +", True),
        ("3 + 4 = 7\n#### 7", False),  # the next token may have been "0"
        ("so the result is 7", False),
        (r"\boxed{8}, or perhaps \boxed{7", False),
        (r"<think>\boxed{7} or", False),
    ],
)
@pytest.mark.parametrize("ended_by", ["length", "non-finite logits"])
def test_a_response_that_was_cut_off_is_graded_by_its_closed_box_in_reward_and_evaluations(
    tiny_config, said, right, ended_by
):
    run = Run.build(tiny_config(objective="grpo", exposure_policy="full", num_generations=2, box_only=False))
    problem, ids = Problem("a", "", "", "7"), run.tokenizer(said).input_ids
    rollout = Rollout([5], ids, truncated=ended_by == "length", finite=ended_by == "length")
    rewards = run.reward.rewards([problem], [rollout])
    run.close()
    protocol = EvalProtocol(k=1, max_completion_length=9, temperature=1.0, top_p=1.0, top_k=0, seed=0, batch_size=1)
    engine = SimpleNamespace(generate=lambda *_: [rollout])
    with Grader(num_workers=1) as pool:
        (sample,) = next(answers([problem], [[5]], engine, run.tokenizer, pool, protocol))
        assert pool.grade_many([said], ["7"], cut_off=[True])[0].correct is right
    assert sample["correct"] is right and rewards == [float(right)]


def test_the_reference_answer_may_come_in_a_box():
    assert grade(r"\boxed{0.5}", r"Thus \boxed{\frac{1}{2}}").correct


def test_numbers_that_differ_by_floating_point_noise_agree_and_integers_must_match_exactly():
    assert same_answer("12.666666666666664", "12.666666666666666") is True
    assert same_answer("12.6667", "12.6666") is False
    assert same_answer("10000000000000001", "10000000000000002") is False


def test_grading_without_math_verify_says_what_to_install(monkeypatch):
    monkeypatch.setattr("atesd.packages.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install math-verify"):
        Grader()


def test_lists_of_different_lengths_are_refused(grader):
    with pytest.raises(ValueError, match="2 predictions, 1 answers, 1 cut_off"):
        grader.grade_many(["a", "b"], ["c"])
