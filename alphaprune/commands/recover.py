"""`alphaprune recover`: a pruned checkpoint and text → the same zeros, better kept weights."""

import math
from pathlib import Path
from typing import Any

from alphaprune import model as models
from alphaprune.commands.shared import check_values, dump, rounding_loss, window, written_as_dict
from alphaprune.console import bar, size
from alphaprune.families import text_config

HELD_OUT = 10  # without a text of its own, one window of so many is held out


def run(
    model: str,
    output: str,
    calibration: str,
    text: str | None,
    windows: int | None,
    length: int | None,
    dense: str | None,
    distil: bool,
    steps: int | None,
    epochs: float | None,
    dtype: str,
    device: str,
    format: str,  # noqa: A002
    values: str | None,
    group: int | None,
    save_seconds: float,
    json: bool,
    **options: Any,
) -> None:
    import torch

    from alphaprune import checkpoint, data, evaluate, hf, recovery, unfinished

    if distil and dense is None:
        raise ValueError("--distil learns from the dense model: give --dense MODEL")
    check_values(values, group, format)
    recovery.check_peft()
    unfinished.check_free(Path(output))
    folder = models.resolve(model)
    config = models.read_config(folder)
    length = window(length, config)
    tokenizer = data.load_tokenizer(folder)
    read = data.encode(tokenizer, data.read_text(calibration), calibration, config)
    judged = None if text is None else data.encode(tokenizer, data.read_text(text), text, config)
    tokens, judged = _split(read, judged, length)
    settings = recovery.Settings(steps=_steps(steps, epochs, len(tokens), options["batch"]), **options)
    settings.check()
    identity = {"calibration": read.sha256, "text": judged.sha256, "length": length}
    storage = checkpoint.Storage(format == "sbt", values, group)
    compute = None if dtype == "auto" else getattr(torch, dtype)
    held_out = (judged, length, windows)
    whole = None if dense is None else hf.load(dense, "auto" if compute is None else compute, device)
    _check_vocabulary(folder, dense, whole)
    with bar(settings.steps, "recover", "step") as tick:
        found = recovery.write(
            folder, output, tokens, held_out, identity, settings, compute, device, storage,
            save_seconds, tick, whole if distil else None,
        )  # fmt: skip
    if whole is not None:
        whole = evaluate.evaluate(whole, *held_out)
    _report(found, whole, tokens, json)


def _split(read: Any, judged: Any, length: int) -> tuple[Any, Any]:
    """Windows to train on, [windows, length], and the text to judge by: by default the end of the same text."""
    from alphaprune import evaluate
    from alphaprune.data import Text

    tokens = evaluate.windows_of(read, length)
    if judged is not None:
        evaluate.window_count(judged, length)
        return tokens, judged
    if len(tokens) < 2:
        raise ValueError(
            f"{read.name}: one window of {length} tokens only, and some text must be held out; give --text FILE, "
            f"more text or a smaller --length"
        )
    trained = len(tokens) - max(1, len(tokens) // HELD_OUT)
    start = trained * length
    return tokens[:trained], Text(read.name, read.sha256, read.bytes, read.tokens[start:], read.ends[start:])


def _steps(steps: int | None, epochs: float | None, windows: int, batch: int) -> int:
    if epochs is None:
        return 300 if steps is None else steps
    if not (epochs > 0 and math.isfinite(epochs)):
        raise ValueError(f"--epochs {epochs}: wanted a number above 0")
    return max(1, round(epochs * max(1, windows // max(1, batch))))


def _check_vocabulary(folder: Any, dense: str | None, whole: Any) -> None:
    if whole is not None:
        sizes = [text_config(config).vocab_size for config in (models.read_config(folder), whole.config)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"--dense {dense}: has a vocabulary of {sizes[1]}, {folder} one of {sizes[0]}")


def _report(found: Any, dense: Any, tokens: Any, json: bool) -> None:
    losses = {name: math.log(getattr(found, name).perplexity) for name in ("before", "after")}
    share = None
    if dense is not None:
        losses["dense"] = math.log(dense.perplexity)
        if losses["before"] > losses["dense"]:
            share = (losses["before"] - losses["after"]) / (losses["before"] - losses["dense"])
    if json:
        quality = {name: getattr(found, name).as_dict() for name in ("before", "after")}
        more = {"loss": losses, "won_back": share, "training": found.training, "windows_trained": len(tokens)}
        print(dump(written_as_dict(found.written) | quality | more))
        return
    after = found.after
    print(
        f"held-out loss {losses['before']:.4f} → {losses['after']:.4f} nats per token (perplexity "
        f"{found.before.perplexity:.4f} → {after.perplexity:.4f}), "
        f"{after.windows} windows of {after.length}, {after.dtype}"
    )
    if share is not None:
        print(f"dense model {losses['dense']:.4f}: {share:.0%} of what pruning lost is won back")
    written = found.written
    print(
        f"{written.folder}: the same zeros, linears {size(written.dense_bytes)} → {size(written.stored_bytes)}, "
        f"{written.packed_layers} of {written.layers} layers packed"
    )
    if written.errors:
        print(rounding_loss(written.errors))
