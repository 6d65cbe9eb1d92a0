"""`alphaprune eval`: perplexity of a model on a text."""

import sys

from alphaprune import model as models
from alphaprune.commands.shared import dump, window
from alphaprune.console import bar

BLANK_ROW = "\n" * 4  # an empty row between two joints


def run(
    model: str,
    text: str | None,
    wikitext: str | None,
    length: int | None,
    windows: int | None,
    dtype: str,
    json: bool,
) -> None:
    from alphaprune import data, hf
    from alphaprune import evaluate as evaluation

    file = text or wikitext
    folder = models.resolve(model)
    length = window(length, models.read_config(folder))
    raw = data.read_text(file, wikitext is not None)
    if wikitext and BLANK_ROW not in raw:
        print(f"{file}: no blank row in it, and WikiText raw has many: do not compare with published", file=sys.stderr)
    found = data.encode(data.load_tokenizer(folder), raw, file)
    evaluation.window_count(found, length)
    loaded = hf.load(folder, dtype=dtype)
    with bar(evaluation.window_count(found, length, windows), "eval", "window") as tick:
        result = evaluation.evaluate(loaded, found, length, windows, tick)
    if json:
        print(dump(result.as_dict()))
        return
    byte = f", {result.bits_per_byte:.4f} bits per byte" if result.bits_per_byte else ""
    error = f" (loss ± {result.stderr:.4f} nats)" if result.stderr is not None else ""
    print(f"perplexity {result.perplexity:.4f}{error}{byte}")
    print(
        f"{result.tokens} tokens in {result.windows} windows of {result.length}, {result.dtype}, "
        f"text sha256 {result.data_sha256[:16]}, {result.seconds:.1f} s"
    )
