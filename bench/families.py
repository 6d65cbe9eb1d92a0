"""Writes docs/families.md from the table of families and from what the tests run for each of them.

python bench/families.py
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from family_models import KINDS, METHODS, NOT_SERVED, WHOLES  # noqa: E402

from alphaprune import decoder, permute  # noqa: E402
from alphaprune.families import FAMILIES, MULTIMODAL, TEXT, Family  # noqa: E402

PAGE = ROOT / "docs" / "families.md"
NAMES = {
    **{"llama": "LLaMA 1, 2, 3", "mistral": "Mistral", "qwen2": "Qwen 2, 2.5", "qwen3": "Qwen 3", "gemma": "Gemma"},
    **{"gemma2": "Gemma 2", "gemma3_text": "Gemma 3, text", "phi3": "Phi-3, Phi-4"},
    **{"opt": "OPT", "falcon": "Falcon", "mpt": "MPT", "mixtral": "Mixtral", "qwen2_moe": "Qwen 2 MoE"},
    "qwen3_moe": "Qwen 3 MoE",
}
PICTURES = {
    **{"gemma3": "Gemma 3", "llava": "LLaVA 1.5", "llava_next": "LLaVA-NeXT", "mistral3": "Mistral Small 3.1"},
    **{"paligemma": "PaliGemma", "qwen2_vl": "Qwen 2 VL", "qwen2_5_vl": "Qwen 2.5 VL", "qwen3_vl": "Qwen 3 VL"},
}
HEAD = """# Families of models

This page is made by `python bench/families.py` from the table in `alphaprune/families.py`; a test compares them.

A model belongs to a family by the `model_type` in its config.json, and to none by its name. `alphaprune` refuses the
others, with the modules that it finds in them and the line that is missing. Only linear layers are pruned: a layer of
another kind, such as the Conv1D of GPT-2, is named in the refusal.
"""
EXPERTS = """
## Experts

Mixtral and the Qwen MoE models route each token to some of their experts. Every matrix of every expert is a layer of
its own here: it has a spectrum, a place in the plan, a mask and a packed weight, whether the files hold one tensor for
each (as published) or one for all (as `save_pretrained(save_original_format=False)` of transformers writes them). Files
that are written have the names of the family's checkpoints. Routers stay dense.

An expert is calibrated on the tokens that are routed to it. One that gets none is calibrated on all tokens of its
block, as though they had been, and a warning names it: more calibration text is the remedy.

Packed experts are loaded by transformers 5.8 and newer, and not shared by ranks (`tp_plan`).

## Models that read pictures

In these a text model, `{text}`, is one part of the whole. Its layers are analyzed, planned, pruned,
packed and run as those of its family above are; calibration and evaluation read text alone. All that is beside it
(towers, projectors) is copied bit by bit under the names that it has in the files. `alphaprune.load` gives the whole
model, and so does `AutoModelForImageTextToText.from_pretrained` after `import alphaprune`: it reads pictures as before.
The decoder is that of transformers; `serve` takes text, with the batching of transformers.

{pictures}
A text model of another family than the table's above is refused, with its name. To add a model: a line in MULTIMODAL.
Such models were not run in vLLM.

## What is run for each of them

For every kind below a small random model of two blocks, in float32, goes through analysis, an alpha plan, Wanda,
packing, `alphaprune.load` and generation; and one of every family but LLaMA, Mistral and Qwen 2 and 3, with which the
other tests are made, through {methods} with uniform plans. Logits must be as near to those in float64 as twice the
error of the dense model of transformers that has the same zeros, and greedy tokens the same:
`pytest tests/test_families.py tests/test_experts.py tests/test_families_run.py`, with `-m slow` for the rest. Kinds:
{variants}.

Models that read pictures go through the same with Wanda, `pytest tests/test_multimodal.py`: what is beside the text
model must have the same bits, and a picture must give the logits that it gives with dense layers (Gemma 3, LLaVA).

No published checkpoint of these families was pruned for this page.
"""


def row(name: str, family: Family) -> list[str]:
    layers = "; ".join(", ".join(f"`{layer}`" for layer in group) for group in family.groups())
    where = "its own" if name in decoder.FAMILIES else "that of transformers"
    served = "no" if name in NOT_SERVED else "yes"
    permuted = "yes" if name in permute.LAYOUTS else "no"
    dense = ", ".join(f"`{layer}`" for layer in family.dense) or "–"
    return [f"{NAMES[name]} (`{name}`)", f"`{family.blocks}`", layers, dense, where, served, permuted]


def _pictures() -> str:
    """The table of multimodal models; what was tried inside each is what the tests make."""
    rows = [["model (`model_type`)", "text models tried inside", "names in files"], ["---"] * 3]
    for name, whole in MULTIMODAL.items():
        inside = {text for kind, (text, _, _) in WHOLES.items() if kind.partition(":")[0] == name}
        inside = ", ".join(f"`{text}`" + (f", as `{whole.like}`" if whole.like else "") for text in sorted(inside))
        names = next((f"`{there}`" for here, there in whole.stored if here == f"{TEXT}."), f"`{TEXT}.`")
        rows.append([f"{PICTURES[name]} (`{name}`)", inside, f"{names}…"])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def page() -> str:
    """The text of docs/families.md."""
    head = ["family (`model_type`)", "blocks", "pruned; layers with a comma between them share their input"]
    head += ["stays dense", "decoder", "`serve`", "`--channel-permute`"]
    rows = [head, ["---"] * len(head), *(row(name, family) for name, family in FAMILIES.items())]
    table = "".join(f"| {' | '.join(cells)} |\n" for cells in rows)
    methods = [f"{m} ({pattern})" if pattern != "unstructured" else m for m, pattern in METHODS.items() if m != "wanda"]
    kinds = ", ".join(f"`{kind}`" for kind in KINDS)
    inside = {"paligemma": ", with Gemma 2 inside"}
    reasons = "".join(f"- `{name}`{inside.get(name, '')}: {why}\n" for name, why in NOT_SERVED.items())
    text = EXPERTS.format(methods=", ".join(methods), variants=kinds, text=TEXT, pictures=_pictures())
    return (
        f"{HEAD}\n{table}\n`serve` refuses these, with what stops transformers' continuous batching:\n\n{reasons}{text}"
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE.relative_to(ROOT))
