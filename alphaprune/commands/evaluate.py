"""`alphaprune eval`: perplexity of a model on a text."""

from alphaprune import model as models
from alphaprune.commands.shared import dump, window
from alphaprune.console import bar


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
    found = data.encode(data.load_tokenizer(folder), data.read_text(file, wikitext is not None), file)
    evaluation.window_count(found, length)
    loaded = hf.load(folder, dtype=dtype)
    with bar(evaluation.window_count(found, length, windows), "eval", "window") as tick:
        result = evaluation.evaluate(loaded, found, length, windows, tick)
    if json:
        print(dump(result.as_dict()))
        return
    byte = f", {result.bits_per_byte:.4f} bits per byte" if result.bits_per_byte else ""
    print(f"perplexity {result.perplexity:.4f} (loss ± {result.stderr:.4f} nats){byte}")
    print(
        f"{result.tokens} tokens in {result.windows} windows of {result.length}, {result.dtype}, "
        f"text sha256 {result.data_sha256[:16]}, {result.seconds:.1f} s"
    )
