"""`alphaprune eval`: perplexity of a model on a text, or what tasks of lm-eval say of it."""

import sys
from typing import Any

from alphaprune import model as models
from alphaprune.commands.shared import dump, origin, window
from alphaprune.console import bar, table
from alphaprune.families import text_config

BLANK_ROW = "\n" * 4  # an empty row between two joints


def run(
    model: str,
    text: str | None,
    wikitext: str | None,
    tasks: str | None,
    length: int | None,
    windows: int | None,
    task_dir: str | None,
    shots: int | None,
    limit: int | None,
    batch: int | None,
    dtype: str,
    activations: str | None,
    json: bool,
) -> None:
    loading = {"dtype": dtype, "activations": activations}
    if tasks is not None:
        if windows is not None:
            raise ValueError("--windows belongs to --text; --limit says how many documents of a task")
        _tasks(model, tasks, length, task_dir, shots, limit, 1 if batch is None else batch, loading, json)
        return
    given = {"--task-dir": task_dir, "--shots": shots, "--limit": limit, "--batch": batch}
    if any(value is not None for value in given.values()):
        raise ValueError(f"{next(n for n, v in given.items() if v is not None)} belongs to --tasks")
    _perplexity(model, wikitext if text is None else text, wikitext is not None, length, windows, loading, json)


def _perplexity(
    model: str,
    file: str,
    rows: bool,
    length: int | None,
    windows: int | None,
    loading: dict[str, str | None],
    json: bool,
) -> None:
    from alphaprune import data, hf
    from alphaprune import evaluate as evaluation

    folder = models.resolve(model)
    config = models.read_config(folder)
    length = window(length, config)
    raw = data.read_text(file, rows)
    if rows and BLANK_ROW not in raw:
        print(f"{file}: no blank row in it, and WikiText raw has many: do not compare with published", file=sys.stderr)
    found = data.encode(data.load_tokenizer(folder), raw, file, config)
    evaluation.window_count(found, length)
    loaded = hf.load(folder, **loading)
    with bar(evaluation.window_count(found, length, windows), "eval", "window") as tick:
        result = evaluation.evaluate(loaded, found, length, windows, tick)
    if json:
        print(dump(origin("eval", folder) | result.as_dict() | _given(loading)))
        return
    byte = f", {result.bits_per_byte:.4f} bits per byte" if result.bits_per_byte else ""
    error = f" (loss ± {result.stderr:.4f} nats)" if result.stderr is not None else ""
    print(f"perplexity {result.perplexity:.4f}{error}{byte}")
    print(
        f"{result.tokens} tokens in {result.windows} windows of {result.length}, {result.dtype}{_beside(loading)}, "
        f"text sha256 {result.data_sha256[:16]}, {result.seconds:.1f} s"
    )


def _tasks(
    model: str,
    names: str,
    length: int | None,
    folder: str | None,
    shots: int | None,
    limit: int | None,
    batch: int,
    loading: dict[str, str | None],
    json: bool,
) -> None:
    from alphaprune import data, hf
    from alphaprune import tasks as evaluation

    evaluation.check_numbers(limit, batch)
    place = models.resolve(model)
    config = text_config(models.read_config(place))
    length = window(length, config) if length is not None else getattr(config, "max_position_embeddings", 2048)
    tokenizer = data.load_tokenizer(place)
    loaded = evaluation.load([name.strip() for name in names.split(",")], folder, shots)
    result = evaluation.evaluate(hf.load(place, **loading), tokenizer, loaded, length, limit, batch)
    if json:
        print(dump(origin("tasks", place) | result.as_dict() | _given(loading)))
        return
    rows = [_row(name, task, metric) for name, task in result.tasks.items() for metric in task.metrics]
    table(["task", "version", "shots", "samples", "metric", "value", "± stderr", "data"], rows)
    for name, metrics in result.groups.items():
        means = ", ".join(f"{metric} {_number(m['value'])}" for metric, m in metrics.items())
        print(f"group {name}: {means}")
    print(
        f"{result.tokens} tokens scored, requests up to {result.length}, {result.dtype}{_beside(loading)}, "
        f"lm-eval {result.lm_eval}, {result.seconds:.1f} s"
    )


def _given(loading: dict[str, str | None]) -> dict[str, str]:
    """For JSON: whether activations were allowed to be rounded, where they were."""
    return {} if loading["activations"] is None else {"activations": loading["activations"]}


def _beside(loading: dict[str, str | None]) -> str:
    return "" if loading["activations"] is None else f" with activations in {loading['activations']}"


def _row(name: str, task: Any, metric: str) -> list[str]:
    found = task.metrics[metric]
    error = "" if found["stderr"] is None else _number(found["stderr"])
    samples = f"{task.samples}" if task.samples == task.available else f"{task.samples} of {task.available}"
    value = _number(found["value"])
    return [name, str(task.version), str(task.shots), samples, metric, value, error, task.data_sha256[:16]]


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
