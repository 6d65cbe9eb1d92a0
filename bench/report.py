"""How large the report of a LLaMA-2-7B-sized analysis is, and how long a browser takes to open it.

`python bench/report.py` draws 224 random heavy-tailed spectra of the shapes of LLaMA-2-7B, fits them, plans, makes the
page from both files, opens it in a headless Chromium (or Chrome) where there is one, and writes a row.
"""

import argparse
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from rows import replace

from alphaprune import alpha, metrics, planning, sketches, timing
from alphaprune.analysis import Analysis, LayerStat
from alphaprune.report import make

ROOT = Path(__file__).parent.parent
BLOCKS, HIDDEN, INNER = 32, 4096, 11008
SHAPES = {
    **{f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"},
    **{f"mlp.{name}_proj": (INNER, HIDDEN) for name in ("gate", "up")},
    "mlp.down_proj": (HIDDEN, INNER),
}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
ROUNDS = 7


def spectrum(count: int, block: int, generator: torch.Generator) -> torch.Tensor:
    """Ascending eigenvalues [count]: a bulk, and a tail whose exponent grows with the block."""
    bulk = torch.randn(count, generator=generator, dtype=torch.float64).mul(0.8).exp()
    exponent = 2.2 + 2.5 * block / BLOCKS
    tail = torch.rand(count // 4, generator=generator, dtype=torch.float64).clamp_min(1e-9) ** (-1 / (exponent - 1))
    return torch.cat([bulk[: count - len(tail)], 1.5 * tail]).sort().values


def analysis() -> Analysis:
    """Of LLaMA-2-7B's layers, with every column and series that spectra give."""
    generator, layers = torch.Generator().manual_seed(0), {}
    for block in range(BLOCKS):
        for kind, shape in SHAPES.items():
            values = spectrum(min(shape), block, generator)
            law = alpha.fit(values)
            columns = {**law.columns(), **metrics.columns(values, law, shape, 1e-6)}
            series = {sketches.SPECTRUM: sketches.eigenvalues(values)}
            layers[f"model.layers.{block}.{kind}"] = LayerStat(block, shape, columns, series)
    return Analysis("llama-2-7b-sized", "0" * 64, "bfloat16", "robust", "made up", layers)


def opening(page: Path, browser: str) -> list[float]:
    """Seconds from the start of a headless browser to a picture of the page, less those of an empty page, by turns."""
    blank = page.with_name("blank.html")
    blank.write_text("<!DOCTYPE html><title>blank</title>")
    found = []
    for turn in range(ROUNDS + 1):
        seconds = {}
        for one in (blank, page):
            options = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1400,1000")
            started = time.perf_counter()
            subprocess.run(
                [browser, *options, f"--screenshot={page.with_suffix('.png')}", one.as_uri()],
                check=True, capture_output=True, timeout=120,
            )  # fmt: skip
            seconds[one] = time.perf_counter() - started
        if turn:  # the first only warms the file cache
            found.append(max(0.0, seconds[page] - seconds[blank]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, help="keep the report here; no row is written")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        made, plan = analysis(), Path(folder, "plan.json")
        made.save(Path(folder, "analysis.json"))
        planning.plan(made, 0.7).save(plan)
        page = options.output or Path(folder, "report.html")
        started = time.perf_counter()
        found = make.read([Path(folder, "analysis.json"), plan])
        make.write(found, make.sections(found), page)
        drawn = time.perf_counter() - started
        browser = next(filter(None, map(shutil.which, BROWSERS)), None)
        row = {
            "case": "llama2-7b",
            "layers": len(made.layers),
            "analysis_bytes": Path(folder, "analysis.json").stat().st_size,
            "bytes": page.stat().st_size,
            "make_seconds": drawn,
            "open_seconds": statistics.median(opening(page.absolute(), browser)) if browser else None,
            "browser": browser
            and subprocess.run([browser, "--version"], capture_output=True, text=True).stdout.strip(),
            "machine": timing.machine(),
        }
    print(row)
    if options.output is None:
        replace(ROOT / "bench" / "results" / "report.jsonl", [row], "case")


if __name__ == "__main__":
    main()
