"""Writes the figures of README.md and docs from the committed rows: `python bench/readme.py [--check]`.

Between `<!-- NAME -->` and `<!-- /NAME -->` stands what this script makes of bench/results; --check: fails if stale.
"""

import argparse
import re
import sys

from compression_figures import compression_ways, compressions
from figures import ROOT
from gpu_figures import gpu, gpu_decode, gpus, pairs, prompts, wide
from quality_figures import analyze, compared, demo, model, quality, quality_stories, recovered
from scale_figures import in_vllm, scale
from speed_figures import attention, cubins, decode, dense, head, linear, linears, load, peers, prompt_attention, serve

PAGES = {
    "docs/compressions.md": (compressions, compression_ways),
    "README.md": (demo, quality, linear, gpu, model),
    "docs/speed.md": (
        linears,
        peers,
        decode,
        head,
        dense,
        attention,
        prompt_attention,
        gpus,
        wide,
        pairs,
        prompts,
        gpu_decode,
        cubins,
    ),
    "docs/quality.md": (quality_stories, compared, recovered, analyze),
    "docs/serving.md": (load, serve),
    "docs/prune.md": (scale,),
    "docs/many_machines.md": (in_vllm,),
}


def filled(page: str) -> str:
    """A page with its figures; SystemExit if it has no place for one of them."""
    text = (ROOT / page).read_text()
    for part in PAGES[page]:
        name = part.__name__
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
        if not pattern.search(text):
            raise SystemExit(f"{page} has no place for {name}")
        made = part().replace("RESULTS/", "../" * page.count("/") + "bench/results/")
        text = pattern.sub(lambda found, made=made: f"{found[1]}{made}\n{found[2]}", text)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is stale")
    options = parser.parse_args()
    pages = {page: filled(page) for page in PAGES}
    if options.check:
        return int(any(text != (ROOT / page).read_text() for page, text in pages.items()))
    for page, text in pages.items():
        (ROOT / page).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
