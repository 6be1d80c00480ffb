"""Can the exposure policy see what its alpha does? Its reward against alpha, in runs of the lab.

    python -m bench.policy_signal RUN_DIR ...

The reward's progress is sum_i gamma^(i-1) max(0, l_{i-1} - l_i) of the probe NLL, with the paper's positive part.
The net fall is that sum without the positive part at gamma 1, l_0 - l_L. Both are correlated with the alpha of their
decision, over the decisions after the first `SKIPPED` steps, in which the NLL of every run falls whatever its alpha.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import correlation, fmean

from atesd.config.load import settings_of_run
from atesd.exposure.credit import learning_progress
from atesd.reports.learned import interval as with_interval
from atesd.reports.markup import markdown_table
from atesd.reports.metrics import METRICS, read_steps
from atesd.studies.comparison import interval
from bench import machine

NAME = "policy_signal"
SKIPPED = 30


def signal(run_dir: Path) -> dict:
    """Returns the run's policy, its number of decisions and both correlations."""
    config = settings_of_run(run_dir)
    rows = {row["step"] - 1: row for row in read_steps(run_dir / METRICS)[0] if row["step"]}
    starts = range(SKIPPED, len(rows) - config.lookahead, config.hold_window)
    alphas, progress, net = [], [], []
    for t in starts:
        nll = [rows[t + i]["probe_nll"] for i in range(config.lookahead + 1)]
        alphas.append(rows[t]["alpha"])
        progress.append(learning_progress(nll, config.reward_gamma))
        net.append(nll[0] - nll[-1])
    return {
        "policy": config.exposure_policy,
        "seed": config.seed,
        "decisions": len(alphas),
        "progress": correlation(alphas, progress),
        "net": correlation(alphas, net),
    }


def table(result: dict) -> str:
    """A row for each policy: the mean correlations over its runs, with t intervals."""
    rows = []
    for policy in dict.fromkeys(row["policy"] for row in result["rows"]):
        own = [row for row in result["rows"] if row["policy"] == policy]
        cells = [with_interval(interval([row[name] for row in own]), "+") for name in ("progress", "net")]
        rows.append([policy, str(len(own)), f"{fmean(row['decisions'] for row in own):.0f}", *cells])
    header = ["policy", "runs", "decisions a run", "alpha and its reward's progress", "alpha and the net fall"]
    return markdown_table(header, rows)


def main(run_dirs: list[str]) -> dict:
    result = {"rows": [signal(Path(run_dir)) for run_dir in run_dirs]}
    machine.save(NAME, result)
    return result


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:])["rows"], indent=1))
