"""Tasks of lm-eval on a live model, packed ones included; their own YAML and JSONL files need no network."""

import hashlib
import io
import logging
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn

from alphaprune.files import first_line

SEED = {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}  # lm-eval's own, so that results can be compared
MISSING = "--tasks needs lm-eval: pip install 'alphaprune[eval]'"


@dataclass(frozen=True)
class TaskResult:
    """What one task says.

    metrics: {metric: {"value", "stderr", "higher_is_better"}}; the name of a filter follows after a comma if there is
    one; stderr is None where lm-eval gives none. samples: documents that were scored, of `available`.
    data_sha256: over documents, prompts and targets, as lm-eval's own results have it in `task_hashes`.
    """

    version: Any
    shots: int
    samples: int
    available: int
    metrics: dict[str, dict[str, Any]]
    data_sha256: str


@dataclass(frozen=True)
class TaskEvaluation:
    """Results by task, those of groups of tasks, and what is needed to name the figures.

    tokens: that were scored, of all loglikelihoods. length: positions that a request may take. limit: documents of a
    task at most. batch: requests that go through the model together.
    """

    tasks: dict[str, TaskResult]
    groups: dict[str, dict[str, dict[str, Any]]]
    tokens: int
    length: int
    limit: int | None
    batch: int
    dtype: str
    seed: dict[str, int]
    lm_eval: str
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_installed() -> None:
    """ValueError with the remedy if lm-eval is not installed."""
    try:
        with _quiet():
            import lm_eval.models.huggingface
            import lm_eval.tasks  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{MISSING} (no module {error.name})") from error


def check_numbers(limit: int | None, batch: int) -> None:
    """ValueError if there would be no document or no request."""
    for name, number in (("limit", limit), ("batch", batch)):
        if number is not None and number < 1:
            raise ValueError(f"{name} {number}: wanted one at least")


def load(names: Sequence[str], folder: "str | Path | None" = None, shots: int | None = None) -> dict[str, Any]:
    """The tasks and groups called `names`, as lm-eval's TaskManager loads them, with their documents.

    folder: YAML files that are looked at first; where all names are in them, lm-eval's own tasks are not. What a task
    names as its data is fetched if it lies elsewhere, unless HF_HUB_OFFLINE is set.
    shots: examples before each question; without it what the task says, or none.
    ValueError naming the task that is not there or cannot be loaded.
    """
    check_installed()
    if folder is not None and not Path(folder).is_dir():
        raise ValueError(f"{folder}: there is no such folder of tasks")
    if shots is not None and shots < 0:
        raise ValueError(f"shots {shots}: wanted 0 or more")
    if not names or not all(names):
        raise ValueError(f"tasks {','.join(names)!r}: wanted names with commas between them")
    with _quiet():
        return _load(list(dict.fromkeys(names)), folder, shots)


def _load(names: list[str], folder: "str | Path | None", shots: int | None) -> dict[str, Any]:
    from lm_eval.tasks import TaskManager

    try:
        manager = TaskManager(include_path=folder, include_defaults=folder is None)
        if folder is not None and set(names) - set(manager.all_tasks):
            own, manager = manager.all_tasks, TaskManager(include_path=folder)
        else:
            own = []
    except Exception as error:  # a YAML file of the user's, with whatever is wrong in it
        raise ValueError(f"{folder}: its tasks cannot be read: {first_line(error)}") from error
    for name in names:
        if name not in manager.all_tasks:
            here = f"in {folder}: {', '.join(own) or 'none'}; " if folder is not None else ""
            raise ValueError(f"task {name}: {here}lm-eval has none of this name; `lm_eval ls tasks` lists its own")
    found: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in names:
        try:
            loaded = manager.load(name)
        except Exception as error:  # of datasets, the hub, YAML and Python files that the task names
            raise ValueError(f"task {name}: cannot be loaded: {first_line(error)}") from error
        for kind in found:
            found[kind] |= loaded[kind]
    for task in found["tasks"].values():
        own_shots = task.get_config("num_fewshot")
        if own_shots is None or (shots is not None and own_shots != 0):  # 0 in a task means that it takes none
            task.set_config(key="num_fewshot", value=shots or 0)
        task.set_fewshot_seed(seed=SEED["fewshot"])
    return found


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    loaded: dict[str, Any],
    length: int,
    limit: int | None = None,
    batch: int = 1,
) -> TaskEvaluation:
    """Runs tasks that `load` gave on a live model, packed or not, where it is.

    length: positions of the model that a request may take; limit: documents of each task at most; batch: requests at
    a time.   ValueError if a number is out of range, or naming what lm-eval could not do.
    """
    check_numbers(limit, batch)
    if tokenizer.eos_token_id is None and tokenizer.bos_token_id is None:
        raise ValueError("the tokenizer names no token for the begin or end of a text, which tasks start with")
    import lm_eval

    random.seed(SEED["random"])
    np.random.seed(SEED["numpy"])
    torch.manual_seed(SEED["torch"])
    started = perf_counter()
    with _quiet():
        judge = _judge(model, tokenizer, batch, length)
        try:
            found = lm_eval.evaluate(lm=judge, task_dict=loaded, limit=limit)
        except Exception as error:  # of metrics, their packages and Python files that a task names
            raise ValueError(f"lm-eval could not run {', '.join(loaded['tasks'])}: {first_line(error)}") from error
    return TaskEvaluation(
        tasks={name: _result(name, found) for name in loaded["tasks"]},
        groups={name: _metrics(name, found["groups"][name], found) for name in found.get("groups", {})},
        tokens=judge.scored,
        length=length,
        limit=limit,
        batch=batch,
        dtype=str(next(p.dtype for p in model.parameters())).removeprefix("torch."),
        seed=SEED,
        lm_eval=version("lm_eval"),
        seconds=perf_counter() - started,
    )


def _judge(model: nn.Module, tokenizer: Any, batch: int, length: int) -> Any:
    """lm-eval's view of a live model, which counts the tokens that it scores."""
    from lm_eval.models.huggingface import HFLM

    class Judge(HFLM):
        scored = 0

        def _loglikelihood_tokens(self, requests: list[Any], *arguments: Any, **options: Any) -> list[Any]:
            self.scored += sum(len(continuation) for _, _, continuation in requests)
            return super()._loglikelihood_tokens(requests, *arguments, **options)

    return Judge(pretrained=model, tokenizer=tokenizer, batch_size=batch, max_length=length)


def _result(name: str, found: dict[str, Any]) -> TaskResult:
    hashes = (s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in found["samples"][name])
    return TaskResult(
        version=found["versions"].get(name),
        shots=found["n-shot"][name],
        samples=found["n-samples"][name]["effective"],
        available=found["n-samples"][name]["original"],
        metrics=_metrics(name, found["results"][name], found),
        data_sha256=hashlib.sha256("".join(hashes).encode()).hexdigest(),
    )


def _metrics(name: str, values: dict[str, Any], found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """lm-eval's flat `acc,none` and `acc_stderr,none` as a metric each."""
    better, metrics = found["higher_is_better"].get(name, {}), {}
    for key, value in values.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        value, error = (_plain(found) for found in (value, values.get(f"{metric}_stderr,{filtered}")))
        metrics[metric if filtered == "none" else key] = {
            "value": value,
            "stderr": error if isinstance(error, float) else None,  # lm-eval says N/A where it has none
            "higher_is_better": better.get(metric),
        }
    return metrics


def _plain(value: Any) -> Any:
    """A number of numpy, which JSON does not know, as one of Python."""
    return value.item() if isinstance(value, np.generic) else value


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval prints to both streams: results stay alone on stdout, and its bars are for terminals."""
    logger = logging.getLogger("lm_eval")
    before, aside = logger.level, sys.stderr if sys.stderr.isatty() else io.StringIO()
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(aside), redirect_stderr(aside):
            yield
    finally:
        logger.setLevel(before)
