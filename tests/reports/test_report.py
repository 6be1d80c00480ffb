"""The report is one page that needs no other file, at any moment of a run."""

import base64
import re

import numpy as np
import pytest

from atesd.config import load_config
from atesd.reports import plots
from atesd.reports.markup import sample_cards
from atesd.reports.metrics import RunLog
from atesd.reports.report import ReportError, write_report

PNG = re.compile(r'<img alt="([^"]+)" src="data:image/png;base64,([^"]+)"')


def a_row(step):
    return {
        "loss": 0.05 / step,
        "alpha": 0.2 + 0.01 * step,
        "beta_a": 2 + 0.1 * step,
        "beta_b": 2.0,
        "mismatch": 0.08,
        "mismatch_p95": 0.3,
        "probe_nll": 1.2 - 0.01 * step,
        "reward": 0.1 * step if step > 2 else None,
        "response_length": 80.0,
        "student_entropy": 0.5,
        "seconds_rollout": 6.0,
        "seconds_loss_backward": 3.0,
        "seconds_step": 10.0,
        "peak_memory_bytes": 3 * 2**30,
    }


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "my-run"
    load_config("quickstart", ["--output_dir", str(folder), "--max_steps", "17"]).save(folder)
    with RunLog(folder, None) as log:
        for step in range(1, 9):
            log.log(step, a_row(step))
            log.sample(
                step, {"problem_id": f"gsm-{step}", "response": f"<script>alert('{step}')</script>\n{step} & more"}
            )
    return folder


def test_the_page_has_every_plot_and_refers_to_nothing_outside(run_dir):
    page = write_report(run_dir).read_text()
    titles = [title for title, _ in PNG.findall(page)]
    assert {"Exposure", "Loss", "Mismatch", "Probe NLL", "Reward", "Response length", "Seconds by phase"} <= set(titles)
    assert all(base64.b64decode(data).startswith(b"\x89PNG") for _, data in PNG.findall(page))
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert not re.search(r"url\(|@import", page)  # an address may be shown, as the rollout server's setting is
    assert "<link" not in page and "<script" not in page


def test_the_page_tells_how_far_the_run_is_and_what_differs_from_the_defaults(run_dir):
    page = write_report(run_dir).read_text()
    assert "step 8 of 17" in page
    assert '<tr class="changed"><td>max_steps</td><td>17</td>' in page
    assert '<tr class=""><td>lora_r</td><td>64</td>' in page
    assert "Beta(2.80, 2.00)" in page
    assert "3.00 GiB" in page


def test_samples_are_shown_as_text_the_first_and_the_latest(run_dir):
    page = write_report(run_dir).read_text()
    assert "&lt;script&gt;alert(&#x27;8&#x27;)" in page and "8 &amp; more" in page
    assert [n for n in range(1, 9) if f"gsm-{n}<" in page] == [1, 6, 7, 8]
    assert "The first and the last 3 of 8; all are in samples.jsonl." in page


@pytest.mark.parametrize(
    ("count", "said"),
    [(0, "No sample yet"), (1, "All 1 of samples.jsonl."), (4, "All 4 of"), (5, "The first and the last 3 of 5;")],
)
def test_a_page_says_which_of_the_samples_it_shows(count, said):
    cards = sample_cards([{"step": n} for n in range(count)], "samples.jsonl")
    assert said in cards and cards.count("<h3>") == min(count, 4)


def test_a_run_killed_while_writing_or_without_steps_still_gets_a_page(run_dir, tmp_path):
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    assert "step 8 of 17" in write_report(run_dir).read_text()
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "metrics.jsonl").write_text("")
    assert "no step is finished yet" in write_report(tmp_path / "new").read_text()


def test_values_that_were_not_finite_leave_a_gap(tmp_path):
    with RunLog(tmp_path, None) as log:
        log.log(1, {"loss": float("nan"), "alpha": 0.5})
        log.log(2, {"loss": 1.0, "alpha": 0.5})
    assert 'alt="Loss"' in write_report(tmp_path).read_text()


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ReportError, match="is no run directory"):
        write_report(tmp_path)


def test_the_heat_map_draws_the_density_of_the_beta_distribution():
    grid = (np.arange(1000) + 0.5) / 1000
    for a, b in ((2.0, 2.0), (5.0, 1.5), (1.2, 9.0)):
        density = plots.beta_density(a, b, grid)
        assert density.mean() == pytest.approx(1, abs=2e-3)
        assert (density * grid).mean() == pytest.approx(a / (a + b), abs=2e-3)
    assert plots.beta_density(2, 2, np.array([0.5]))[0] == pytest.approx(1.5)


def test_smoothing_starts_at_the_first_value_and_follows_the_rest():
    smoothed = plots.smooth(np.array([1.0] * 5 + [0.0] * 40))
    assert smoothed[0] == pytest.approx(1)
    assert smoothed[4] == pytest.approx(1)
    assert 0 < smoothed[10] < smoothed[6] < 1
    assert smoothed[-1] < 1e-3
