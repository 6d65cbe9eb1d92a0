"""Every allocator with Wanda and SparseGPT on small real models, good or bad for any of them: rows for bench/results.

Runs `alphaprune compare`, chosen by one text and tested on another. `python bench/compare.py [--model demo|FOLDER
--calibration FILE --text FILE --test FILE] [--work DIR] [--out FILE]`: an interrupted run in the same --work goes on.
"""

import argparse
import contextlib
import io
import json
import tempfile
from pathlib import Path
from typing import Any

from rows import replace

from alphaprune import cli, timing
from alphaprune.demo import corpus
from alphaprune.demo.run import MODEL

BEGINNING = 1200  # characters of a document
FIGURES = ("loss", "stderr", "perplexity", "kl", "kl_stderr", "bits_per_byte")


def demo_texts(work: Path) -> dict[str, str]:
    """Files with the corpus of the embedded model: calibration, and the beginnings of every other held-out document, so
    that a few windows see many of them."""
    held_out = [text[:BEGINNING] for _, text in corpus.load("held-out").documents]
    parts = {
        "calibration": corpus.load("calibration").text,
        "text": corpus.END_OF_TEXT.join(held_out[0::2]),
        "test": corpus.END_OF_TEXT.join(held_out[1::2]),
    }
    for name, text in parts.items():
        (work / f"{name}.txt").write_text(text, encoding="utf-8")
    return {name: str(work / f"{name}.txt") for name in parts}


def run(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """What `alphaprune compare --json` prints."""
    if options.model == "demo":
        model, texts = str(MODEL), demo_texts(work)
    else:
        model, texts = options.model, {name: getattr(options, name) for name in ("calibration", "text", "test")}
    words = ["compare", model, "-o", str(work / "compare"), "--sparsity", options.sparsity, "--json"]
    words += [word for name, file in texts.items() for word in (f"--{name}", file)]
    words += ["--samples", str(options.samples), "--length", str(options.length), "--windows", str(options.windows)]
    words += ["--allocators", options.allocators, "--methods", options.methods, "--dtype", "float32"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status = cli.main(words)
    if status:
        raise SystemExit(status)
    return json.loads(printed.getvalue())


def rows(found: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """A row for the dense model and one per candidate: figures on both texts; which one was chosen, and what it is
    worth on the text that it was not chosen by."""
    about = {"model": name, "machine": timing.machine(), **{k: found["identity"][k] for k in ("samples", "length")}}
    about |= {"windows": found["identity"]["windows"]}
    chosen = {entry["id"] for entry in found["recommended"]}
    splits = {split: found[split] for split in ("validation", "test")}
    made = [about | {"allocator": "dense", "sparsity": 0.0} | {s: _figures(p["dense"]) for s, p in splits.items()}]
    for key, row in found["validation"]["rows"].items():
        shared = {k: row[k] for k in ("allocator", "method", "sparsity", "epsilon", "same_as")}
        figures = {split: _figures(part["rows"][key]) for split, part in splits.items()}
        versus = found["test"]["rows"][key]["versus_best"]
        made.append(about | shared | figures | {"recommended": key in chosen, "test_versus_best": versus})
    return made


def _figures(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in FIGURES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    for name in ("calibration", "text", "test"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--sparsity", default="0.5,0.6,0.7,0.8")
    parser.add_argument("--allocators", default="all")
    parser.add_argument("--methods", default="wanda,sparsegpt")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--work", type=Path, help="where the comparison lies; default: a folder that is deleted")
    parser.add_argument("--out", type=Path, help="a file of rows; those of this model are replaced")
    options = parser.parse_args()
    name = "demo" if options.model == "demo" else Path(options.model).name
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        made = rows(run(options, work), name)
    for row in made:
        print(json.dumps(row))
    if options.out:
        replace(options.out, made, "model")


if __name__ == "__main__":
    main()
