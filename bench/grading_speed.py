"""How long grading takes: 1,000 answers of every kind, against the project's own limit of 20 s on two cores.

    python -m bench.grading_speed

The answers are the hard cases of tests/evaluation/grading_cases.jsonl, whose verdicts were stated by hand, in turn with
fractions that all differ; then the same with ten answers among them that hang a parser, each of which may cost its time
limit and no more. Every verdict is checked: a fast wrong grader would not count.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from atesd.evaluation.grading.grader import Grader
from bench.machine import markdown, save

CASES = Path(__file__).parent.parent / "tests" / "evaluation" / "grading_cases.jsonl"
HANGS = r"\boxed{9^{9^{9^{9}}}}"
COUNT, HOSTILE, TIME_LIMIT = 1000, 10, 1.0


def answers(hostile: int) -> tuple[list[str], list[str], list[bool]]:
    """Responses, reference answers and the verdicts they must get."""
    cases = [json.loads(line) for line in CASES.read_text(encoding="utf-8").splitlines()]
    cases = [case for case in cases if isinstance(case["prediction"], str) and case["group"] != "hostile"]
    rows = []
    for i in range(COUNT):
        case = cases[i % len(cases)]
        if hostile and i % (COUNT // hostile) == 0:
            rows.append((HANGS, "7", False))
        elif i % 3:  # a space more or less keeps the workers from having seen the very text
            rows.append((case["prediction"] + " " * (i // len(cases)), case["answer"], case["correct"]))
        else:
            rows.append((rf"\boxed{{\frac{{{2 * i}}}{{14}}}}", rf"\frac{{{i}}}{{7}}", True))
    texts, golds, verdicts = zip(*rows, strict=True)
    return list(texts), list(golds), list(verdicts)


def measure(hostile: int) -> dict[str, float | int]:
    """Seconds to grade, the start of the grading processes included."""
    texts, golds, expected = answers(hostile)
    with Grader(num_workers=2, time_limit=TIME_LIMIT) as grader:
        start = time.perf_counter()
        verdicts = grader.grade_many(texts, golds)
        seconds = time.perf_counter() - start
    wrong = [text for text, v, right in zip(texts, verdicts, expected, strict=True) if v.correct is not right]
    if wrong:
        raise AssertionError(f"{len(wrong)} verdicts are not the ones stated by hand, the first on {wrong[0]!r}")
    return {"answers": COUNT, "hostile": hostile, "time_limit": TIME_LIMIT, "seconds": seconds}


def table(result: dict) -> str:
    rows = [
        [f"{row['answers']:,}", str(row["hostile"]), f"{row['time_limit']:g} s", f"{row['seconds']:.1f}"]
        for row in result["rows"]
    ]
    return markdown(["answers graded by two processes", "of them hanging", "limit of one answer", "seconds"], rows)


def main() -> None:
    rows = [measure(hostile) for hostile in (0, HOSTILE)]
    path = save("grading_speed", {"rows": rows})
    print(table({"rows": rows}), path, sep="\n")


if __name__ == "__main__":
    main()
