"""Bits, ranks and channels by alpha and uniformly on a small real model, good or bad: held-out loss and bytes.

Every budget is met by the uniform plan, by alpha with its automatic spread, with a wide one, and with the wide one in
the other direction. Beside them, on uniform plans, what calibration and refits are worth.
`python bench/compressions.py [--model demo|FOLDER --calibration FILE --text FILE] [--out FILE]`; rows of earlier runs
on another model or text stay.
"""

import argparse
import copy
import json
from pathlib import Path
from typing import Any

from quality import LENGTH, quality
from rows import replace
from torch import Tensor, nn
from tqdm import tqdm

import alphaprune
from alphaprune import compressions, data, evaluate, hf, timing
from alphaprune.compressions import parts
from alphaprune.demo import corpus
from alphaprune.demo.run import MODEL, spread
from alphaprune.model import open_source

BUDGETS = {"bits": (2.5, 3.0, 4.0), "rank": (0.9, 0.7, 0.5), "structured": (0.1, 0.2)}
WIDE = 0.2  # ε
# How a uniform plan is carried out: whether with text, and with what else; the first is the one that allocations meet.
WAYS: dict[str, dict[str, tuple[bool, dict[str, Any]]]] = {
    "bits": {"scales by outputs": (True, {}), "scales by weights": (False, {})},
    "rank": {"whitened": (True, {}), "plain": (False, {})},
    "structured": {
        "channels by wanda, refit": (True, {"refit": True}),
        "channels by wanda": (True, {}),
        "channels by magnitude": (False, {}),
        "channels and heads by wanda, refit": (True, {"refit": True, "which": "both"}),
    },
}


def cases(methods: list[str]) -> list[dict[str, Any]]:
    """Every plan and how it is carried out."""
    found = []
    for method, budgets in BUDGETS.items():
        if method not in methods:
            continue
        usual = next(iter(WAYS[method]))
        for budget in budgets:
            one = {"method": method, "budget": budget, "way": usual}
            found += [one | {"allocator": "uniform", "epsilon": 0.0, "reverse": False}]
            found += [one | {"allocator": "alpha", "epsilon": e, "reverse": False} for e in ("auto", WIDE)]
            found += [one | {"allocator": "alpha", "epsilon": WIDE, "reverse": True}]
            others = [way for way in WAYS[method] if way != usual]
            found += [found[-4] | {"way": way} for way in others]
    return found


def linears_bytes(model: nn.Module) -> int:
    """Bytes of all that multiplies in the blocks, bias apart, as it is in memory."""
    kinds = (nn.Linear, alphaprune.SparseLinear)
    layers = [module for module in model.model.layers.modules() if isinstance(module, kinds)]
    return sum(t.nbytes for layer in layers for name, t in layer.state_dict().items() if name != "bias")


def row(
    model: nn.Module, case: dict[str, Any], stats: Any, tokens: Tensor, text: data.Text, known: dict[str, dict]
) -> dict[str, Any]:
    """Loss and bytes of one case. known: figures by plan and way, since different allocators may make one plan."""
    calibrated, options = WAYS[case["method"]][case["way"]]
    which = {"which": options["which"]} if "which" in options else {}
    reverse = parts.REVERSED[case["method"]] != case["reverse"]
    chosen = compressions.plan(
        open_source(model), stats, case["method"], case["budget"], case["allocator"], case["epsilon"],
        reverse=reverse, **which,
    )  # fmt: skip
    amounts = [kept.amount for kept in chosen.parts.values()]
    key = json.dumps([case["method"], case["way"], amounts])
    if key not in known:
        small = alphaprune.compress(
            copy.deepcopy(model), chosen, tokens if calibrated else None,
            **{name: value for name, value in options.items() if name != "which"},
        )  # fmt: skip
        known[key] = quality(evaluate.evaluate(small, text, LENGTH)) | {"linears_bytes": linears_bytes(small)}
    made = {"spread": chosen.epsilon, "realized": chosen.realized, "least": min(amounts), "most": max(amounts)}
    return case | made | known[key]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--calibration")
    parser.add_argument("--text")
    parser.add_argument("--methods", default=",".join(BUDGETS))
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument(
        "--out", type=Path, help="a file of rows; those of these methods, this model and text are replaced"
    )
    options = parser.parse_args()
    folder = MODEL if options.model == "demo" else options.model
    if (options.calibration is None) != (options.text is None) or (options.model != "demo" and options.text is None):
        raise SystemExit("give both --calibration FILE and --text FILE; a model of your own needs them")
    source = [data.read_text(f) for f in (options.calibration, options.text)] if options.text else demo_texts()
    model, tokenizer = hf.load(folder), data.load_tokenizer(folder)
    tokens = data.sample_windows(data.encode(tokenizer, source[0]), options.samples, LENGTH, seed=0)
    text = spread(data.encode(tokenizer, source[1]), options.windows)
    name = f"{Path(options.model).name} on {Path(options.text).parent.name if options.text else 'its corpus'}"
    common = {"on": name, "machine": timing.machine(), "tokens": tokens.numel(), "data_sha256": text.sha256}
    dense = quality(evaluate.evaluate(model, text, LENGTH)) | {"linears_bytes": linears_bytes(model)}
    rows, known = [common | {"method": "dense", "part": f"dense, {name}", **dense}], {}
    stats = alphaprune.analyze(model)
    for case in tqdm(cases(options.methods.split(",")), desc=name, unit="model", disable=None):
        about = common | {"part": f"{case['method']}, {name}"}
        rows.append(about | row(model, case, stats, tokens, text, known))
        print(json.dumps(rows[-1]), flush=True)
    if options.out:
        replace(options.out, rows, "part")


def demo_texts() -> list[str]:
    return [corpus.load(split).text for split in ("calibration", "held-out")]


if __name__ == "__main__":
    main()
