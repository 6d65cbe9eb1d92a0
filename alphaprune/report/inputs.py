"""Files → what a report is drawn from, recognised by their content and all of one model."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alphaprune.analysis import Analysis, is_number, need
from alphaprune.curves import Curves
from alphaprune.plan_file import Plan

KINDS = "analysis, plan, comparison, curves, bench, eval, info and demo"
COMPARISON = ("results.json", "analysis.json", "curves.json")  # of a comparison's folder, beside its plans
RECIPE = "alphaprune.json"  # of a pruned model's folder
MALFORMED = (KeyError, TypeError, AttributeError, IndexError, ArithmeticError)  # what reading a part that is not raises


@dataclass(frozen=True)
class Input:
    """One file. kind: as in `Inputs`.   content: an Analysis, a Plan, Curves, or the object that is in the file.

    model, fingerprint: what it is about; None where it does not say.
    """

    file: str
    kind: str
    content: Any
    model: str | None = None
    fingerprint: str | None = None


@dataclass(frozen=True)
class Inputs:
    """All files, in the order in which they were given."""

    found: tuple[Input, ...]
    layers: dict[str, int] = field(default_factory=dict)  # every known layer → its block

    def of(self, kind: str) -> list[Input]:
        return [one for one in self.found if one.kind == kind]

    @property
    def model(self) -> str:
        """What the dense model is called, or the first name that any file has."""
        names = [one.model for kind in ("analysis", "plan", "curves") for one in self.of(kind) if one.model]
        return next(iter(names), None) or next((one.model for one in self.found if one.model), "a model")


def read(files: Sequence["str | Path"]) -> Inputs:
    """Inputs from files, and from folders of comparisons and pruned models.

    ValueError in one sentence for a file that cannot be read, is of no known kind or lacks what its kind has, and for
    two that are about different models, by their fingerprints or their layers.
    """
    need(bool(files), f"nothing to report on: name files of the kinds {KINDS}")
    paths = list(dict.fromkeys(path for given in files for path in _expand(Path(given))))
    found = tuple(_read(path) for path in paths)
    _check_one_model(found)
    return Inputs(found, _check_layers(found))


def _expand(path: Path) -> list[Path]:
    """The files of a folder that a report can read, or the file itself."""
    if not path.is_dir():
        return [path]
    if (path / RECIPE).is_file():
        return [path / RECIPE]
    if (path / COMPARISON[0]).is_file():
        known = [path / name for name in COMPARISON if (path / name).is_file()]
        return known + sorted(path.glob("plan-*.json"))
    if (path / "demo.json").is_file():
        return [path / "demo.json"]
    raise ValueError(f"{path}: this folder holds no comparison, no demo and no pruned model; name files of {KINDS}")


def _read(path: Path) -> Input:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: is no JSON, but a report is made from files of {KINDS}: {error}") from error
    need(isinstance(found, dict), f"{path}: holds no object; a report is made from files of {KINDS}")
    kind = _kind(found)
    need(kind is not None, f"{path}: is none of {KINDS} as this release writes them")
    try:
        made = READERS[kind](path, found)
        _shapes(made)
    except MALFORMED as error:
        raise malformed(path, kind, error) from error
    for name in ("model", "fingerprint"):
        value = getattr(made, name)
        need(value is None or isinstance(value, str), f"{path}: {name}: wanted a text, got {value!r}")
    return made


def malformed(file: "str | Path", kind: str, error: Exception) -> ValueError:
    """What is said of a file that is of a kind, but not as this release writes it. error: one of MALFORMED."""
    what = f"no {error}" if isinstance(error, KeyError) else f"{error}"
    return ValueError(f"{file}: looks like the file of {kind}, but part of it is not as it should be: {what}")


def _kind(found: dict[str, Any]) -> str | None:
    """What a file is, by what it says or else by what is in it."""
    said = found.get("kind")
    if said is not None:
        return said if isinstance(said, str) and said in READERS else None
    signs = {
        "recipe": ("alphaprune", "source", "plan"),
        "demo": ("rows", "alpha", "plan_sparsity"),
        "info": ("layers", "prunable_weights", "linears_bytes"),
        "machine": ("hardware", "kernels", "threads"),
        "tasks": ("tasks", "lm_eval"),
        "eval": ("perplexity", "windows", "data_sha256"),
        "bench": ("machine", "threads"),
    }
    return next((kind for kind, keys in signs.items() if all(key in found for key in keys)), None)


def _loaded(load: Callable[[Path], Any]) -> Callable[[Path, dict[str, Any]], Input]:
    """A reader of files that have a record of their own."""

    def read(path: Path, found: dict[str, Any]) -> Input:
        record = load(path)
        return Input(str(path), found["kind"], record, record.model, record.fingerprint)

    return read


def _comparison(path: Path, found: dict[str, Any]) -> Input:
    identity, rows = found["identity"], found["validation"]["rows"]
    need(bool(rows), f"{path}: the comparison has no result yet; let `alphaprune compare` finish")
    for name, row in rows.items():
        for key in ("sparsity", "allocator", "method", "loss", "stderr", "perplexity"):
            need(key in row, f"{path}: {name}: no {key}; compare again with this release")
    need("recommended" in found, f"{path}: the comparison is not finished; repeat the command, and it goes on")
    _number(path, found["validation"]["dense"], "loss", "perplexity")
    return Input(str(path), "comparison", found, None, identity["model"])


def _recipe(path: Path, found: dict[str, Any]) -> Input:
    return Input(str(path), "recipe", found, found["source"], found.get("model"))


def _rows(path: Path, found: dict[str, Any]) -> Input:
    """bench and demo."""
    need(any(found.get(name) for name in ("rows", "layers", "generation")), f"{path}: has no row")
    for row in found.get("rows", ()):
        _number(path, row, "sparsity", *(() if "alpha" in found else ("seconds", "dense_seconds", "ratio", "tokens")))
    return Input(str(path), _kind(found), found, found.get("model"), found.get("fingerprint"))


def _info(path: Path, found: dict[str, Any]) -> Input:
    for row in found["layers"]:
        _number(path, row, "weights", "zeros", "bytes", "dense_bytes")
        need(all(key in row for key in ("name", "kernel", "stored", "why")), f"{path}: a layer has no name or kernel")
    return Input(str(path), "info", found, found["model"], found.get("fingerprint"))


def _eval(path: Path, found: dict[str, Any]) -> Input:
    _number(path, found, "perplexity", "tokens")
    return Input(str(path), "eval", found, found.get("model"), found.get("fingerprint"))


def _plain(path: Path, found: dict[str, Any]) -> Input:
    return Input(str(path), _kind(found), found, found.get("model"), found.get("fingerprint"))


READERS: dict[str, Callable[[Path, dict[str, Any]], Input]] = {
    "analysis": _loaded(Analysis.load),
    "plan": _loaded(Plan.load),
    "curves": _loaded(Curves.load),
    "comparison": _comparison,
    "recipe": _recipe,
    "demo": _rows,
    "bench": _rows,
    "info": _info,
    "eval": _eval,
    "tasks": _plain,
    "machine": _plain,
}


def _number(path: Path, entry: dict[str, Any], *names: str) -> None:
    for name in names:
        need(is_number(entry[name]), f"{path}: {name}: wanted a finite number, got {entry[name]!r}")


def _check_one_model(found: tuple[Input, ...]) -> None:
    first: Input | None = None
    for one in found:
        if one.fingerprint is None:
            continue
        first = first or one
        need(
            one.fingerprint == first.fingerprint,
            f"{one.file} is about another model than {first.file}: {_called(one)} and {_called(first)}; a report is "
            f"about one model, so make one for each",
        )


def _called(one: Input) -> str:
    return f"{one.model or 'one'} with fingerprint {one.fingerprint[:12]}…"


def _check_layers(found: tuple[Input, ...]) -> dict[str, int]:
    """Every layer → its block; ValueError where two files disagree about which layers there are, or their shapes."""
    first, shapes, blocks = None, {}, {}
    for one in found:
        mine = _shapes(one)
        if mine is None:
            continue
        first, shapes = (first, shapes) if first else (one, mine)
        for name in {**shapes, **mine}:
            need(
                shapes.get(name) == mine.get(name),
                f"{one.file} is about another model than {first.file}: layer {name} has shape "
                f"{mine.get(name, 'none')} there and {shapes.get(name, 'none')} here",
            )
        if one.kind == "analysis":
            blocks = {name: stat.block for name, stat in one.content.layers.items()}
    return blocks or {name: number_in(name) for name in shapes}


def _shapes(one: Input) -> dict[str, tuple[int, ...]] | None:
    if one.kind in ("analysis", "plan"):
        return {name: tuple(entry.shape) for name, entry in one.content.layers.items()}
    if one.kind == "info":
        return {row["name"]: tuple(row["shape"]) for row in one.content["layers"]}
    return None


def number_in(name: str) -> int:
    """The number of the block that a layer's name has in it; 0 where it has none."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), 0)


def kind_of(name: str) -> str:
    """What a layer is called without the numbers of its block and its expert: self_attn.q_proj."""
    parts = name.split(".")
    first = next((place for place, part in enumerate(parts) if part.isdecimal()), -1)
    return ".".join("*" if part.isdecimal() else part for part in parts[first + 1 :])
