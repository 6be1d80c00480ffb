"""A run's metrics as a result, and the picture on the front page: the plots of its report on one page.

atesd train quickstart --output_dir RUN_DIR
python -m bench.quickstart RUN_DIR
"""

from __future__ import annotations

import base64
import io
import sys
from pathlib import Path

from bench import machine
from bench.plots import STAMP

GAP = 12  # pixels between plots


def plot(result: dict, path: Path, source: str) -> None:
    from PIL import Image, PngImagePlugin

    from atesd.reports import plots

    rows = result["rows"]
    exposure, mismatch, probe = (
        Image.open(io.BytesIO(base64.b64decode(picture.partition(",")[2])))
        for picture in (
            plots.exposure_plot(rows),
            plots.line_plot(rows, {"mismatch": "mismatch"}, "mismatch, nats per token"),
            plots.line_plot(rows, {"probe_nll": "probe NLL"}, "probe NLL, nats per token"),
        )
    )
    width = max(exposure.width, mismatch.width + GAP + probe.width)
    page = Image.new("RGB", (width, exposure.height + GAP + mismatch.height), "white")
    page.paste(exposure, (0, 0))
    page.paste(mismatch, (0, exposure.height + GAP))
    page.paste(probe, (mismatch.width + GAP, exposure.height + GAP))
    stamp = PngImagePlugin.PngInfo()
    stamp.add_text(STAMP, source)
    page.quantize(64).save(path, pnginfo=stamp, optimize=True)


if __name__ == "__main__":
    from atesd.reports.metrics import METRICS, read_jsonl

    machine.save("quickstart", {"rows": read_jsonl(Path(sys.argv[1]) / METRICS)})
