"""Every allocator with every pruner on a user's own model: which plan loses least on held-out text.

Candidates are chosen by one text; another, read after the choice stands, only reports. What is finished is remembered
in results.json, which never depends on how often the run was interrupted.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import alphaprune
from alphaprune import evaluate, planning
from alphaprune.analysis import analyze
from alphaprune.candidates import BASELINES, Bar, Candidate, Settings, Shared, label
from alphaprune.data import Text, sample_windows
from alphaprune.evaluate import Judged, Reference
from alphaprune.files import atomic_write_text, explained
from alphaprune.model import LiveSource, Source
from alphaprune.pruning import prune_blocks
from alphaprune.states import Room

VERSION = 1
RESULTS = "results.json"
SERIES = ("window_losses", "window_divergences")  # what a row of results.json holds for every window


class Comparison:
    """One comparison in its folder. `run` chooses, `test` reports on another text."""

    def __init__(
        self,
        source: Source,
        settings: Settings,
        calibration: Text,
        text: Text,
        folder: "str | Path",
        bar: Bar,
        room: Room | None = None,
    ) -> None:
        """Opens or continues the comparison in `folder`; nothing is computed yet.

        source: the dense model, had block by block; a live one is dense again whenever a method returns.
        text: what candidates are chosen by.   bar: see console.bar.   room: of hidden states, see states.py.
        Raises ValueError for settings that cannot be, a text that is too short or the same as
        the other, a folder with something else in it, or one with another comparison.
        """
        settings.check()
        evaluate.window_count(text, settings.length, settings.windows)
        sample_windows(calibration, settings.samples, settings.length, settings.seed)
        _check_other(text, {"calibration": calibration.sha256})
        _check_plans(source, settings)
        self.source, self.settings, self.text, self.bar = source, settings, text, bar
        known = source.description()
        self.identity = {
            "model": known.fingerprint,
            "dtype": known.dtype,
            "calibration": calibration.sha256,
            "text": text.sha256,
            **asdict(settings),
            "device": source.device.type,
            "version": alphaprune.__version__,
        }
        self.file = Path(folder) / RESULTS
        self.results = _open(Path(folder), self.identity)
        self.shared = Shared(source, settings, calibration, Path(folder), bar, room)
        self.room, live = room, isinstance(source, LiveSource)
        self.dense = {name: weight.cpu() for name, weight in self._weights().items()} if live else {}

    def run(self) -> dict[str, Any]:
        """Judges every candidate that has not been, and writes the plan of the best for each sparsity beside
        results.json, whose content is returned."""
        self._judge("validation", self.text)
        if "recommended" not in self.results:
            with explained(self.file.parent):
                self.results["recommended"] = [self._recommend(s) for s in self._sparsities()]
            self._remember()
        return self.results

    def test(self, read: Callable[[], Text]) -> dict[str, Any]:
        """Judges every candidate on a text that is read only now, when the recommendations stand in results.json.

        ValueError if that text was used for calibration or choice, or is shorter than one window.
        """
        if "recommended" not in self.results:
            raise ValueError("the test text is read after the recommendations are made: call run() first")
        text = read()
        _check_other(text, {name: self.identity[name] for name in ("calibration", "text")})
        self._judge("test", text)
        rows = self.results["test"]["rows"]
        for sparsity in self._sparsities():
            alike = [c.id for c in self.shared.candidates if c.plan.sparsity == sparsity]
            best = min(alike, key=lambda name: rank(rows[name]))
            for name in alike:
                rows[name]["versus_best"] = {"id": best, **paired(rows[name], rows[best])}
        self._remember()
        return self.results

    def close(self) -> None:
        """Deletes what only a run that goes on would need."""
        self.shared.close()

    def _judge(self, split: str, text: Text) -> None:
        """Fills the results of a split: figures of the dense model, and a row for every candidate."""
        part = self.results.get(split)
        if part is None or part["sha256"] != text.sha256:
            part = self.results[split] = {"sha256": text.sha256, "dense": None, "rows": {}}
        candidates = self.shared.candidates
        left = [c for c in candidates if c.id not in part["rows"]]
        if not left:
            return
        tokens = evaluate.windows_of(text, self.settings.length, self.settings.windows)
        scored = evaluate.scored_bytes(text, *reversed(tokens.shape))
        work = sum(c.twin is None for c in left) * (len(tokens) + self.source.block_count())
        with self.bar(len(tokens) + work, split, "step") as tick:
            dense = evaluate.reference(self.source, tokens, tick, self.room)
            part["dense"] = figures(Judged(dense.losses, torch.zeros_like(dense.losses)), tokens.shape[1], scored)
            for candidate in left:
                if candidate.twin is None:
                    found = self._measure(candidate, dense, lambda _, name=candidate.id: tick(name))
                    row = figures(found, tokens.shape[1], scored)
                else:
                    row = part["rows"][candidate.twin]
                part["rows"][candidate.id] = {**_about(candidate), **{k: v for k, v in row.items() if k in FIGURES}}
                self._remember()

    def _measure(self, candidate: Candidate, dense: Reference, tick: Callable[[str], None]) -> Judged:
        """What a candidate makes of the windows of the dense model; each block is pruned when its turn comes."""
        plan, recipe, statistics = candidate.plan, candidate.recipe, self.shared.observed
        try:
            pruned = prune_blocks(self.source, plan, recipe, progress=tick, statistics=statistics)
            return evaluate.against(self.source, dense, (one.block for one in pruned), tick, self.room)
        finally:
            for name in self.dense:
                self.source.skeleton.get_submodule(name).weight.data = self.dense[name].to(self.source.device)

    def _weights(self) -> dict[str, torch.Tensor]:
        return {name: layer.weight.data for block in self.source.blocks() for name, layer in block.linears.items()}

    def _sparsities(self) -> list[float]:
        return list(dict.fromkeys(c.plan.sparsity for c in self.shared.candidates))

    def _recommend(self, sparsity: float) -> dict[str, Any]:
        """The candidate that loses least at a sparsity, and how sure its lead over the baselines of its method is."""
        rows = self.results["validation"]["rows"]
        alike = {c.id: c for c in self.shared.candidates if c.plan.sparsity == sparsity}
        best = alike[min(alike, key=lambda name: rank(rows[name]))]
        file = f"plan-{label(sparsity)}.json"
        best.plan.save(self.file.parent / file)
        versus = {}
        for baseline in BASELINES:
            same = (c for c in alike.values() if (c.allocator, c.recipe) == (baseline, best.recipe))
            name = min((c.id for c in same), key=lambda name: rank(rows[name]))
            versus[baseline] = paired(rows[best.id], rows[name])
        return {"sparsity": sparsity, "id": best.id, "plan": file, "versus": versus}

    def _remember(self) -> None:
        atomic_write_text(self.file, json.dumps(self.results, indent=1, allow_nan=False) + "\n")


FIGURES = ("loss", "stderr", "perplexity", "bits_per_byte", "kl", "kl_stderr", *SERIES)


def figures(found: Judged, length: int, scored: int | None) -> dict[str, Any]:
    """A row's figures in nats per token and bits per byte, None where one is not finite.

    stderr, kl_stderr: of the means, over windows.   scored: bytes of all predicted tokens.
    """
    loss, error = evaluate.mean_and_error(found.losses)
    kl, kl_error = evaluate.mean_and_error(found.divergences)
    tokens = len(found.losses) * (length - 1)
    row = {
        "loss": loss,
        "stderr": error,
        "perplexity": evaluate.perplexity(loss) if math.isfinite(loss) else math.nan,
        "bits_per_byte": evaluate.bits_per_byte(loss, tokens, scored),
        "kl": kl,
        "kl_stderr": kl_error,
    }
    row = {name: value if value is not None and math.isfinite(value) else None for name, value in row.items()}
    for name, values in zip(SERIES, (found.losses, found.divergences), strict=True):
        row[name] = [value if math.isfinite(value) else None for value in values.tolist()]
    return row


def rank(row: dict[str, Any]) -> float:
    """What rows are sorted by: the loss; one that is not finite comes last."""
    return math.inf if row["loss"] is None else row["loss"]


def paired(row: dict[str, Any], other: dict[str, Any]) -> dict[str, float | None]:
    """Mean over windows of the loss of `row` minus that of `other`, and its standard error; None if not finite."""
    if None in row["window_losses"] or None in other["window_losses"]:
        return {"difference": None, "stderr": None}
    pairs = zip(row["window_losses"], other["window_losses"], strict=True)
    mean, error = evaluate.mean_and_error(torch.tensor([a - b for a, b in pairs], dtype=torch.float64))
    return {"difference": mean, "stderr": None if math.isnan(error) else error}


def clear(difference: dict[str, float | None]) -> bool:
    """Whether a paired difference is more than two standard errors from zero."""
    mean, error = difference["difference"], difference["stderr"]
    return mean is not None and error is not None and abs(mean) > 2 * error


def summary(results: dict[str, Any]) -> dict[str, Any]:
    """The results without what they hold for every window."""
    short = dict(results)
    for split in ("validation", "test"):
        if split in results:
            part = results[split]
            rows = {name: _without_series(row) for name, row in part["rows"].items()}
            short[split] = {**part, "dense": _without_series(part["dense"]), "rows": rows}
    return short


def _without_series(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in SERIES}


def _about(candidate: Candidate) -> dict[str, Any]:
    plan = candidate.plan
    return {
        "sparsity": plan.sparsity,
        "allocator": candidate.allocator,
        "method": candidate.recipe.method,
        "epsilon": plan.epsilon,
        "realized": plan.realized,
        "plan": candidate.file,
        "same_as": candidate.twin,
    }


def _check_plans(source: Source, settings: Settings) -> None:
    """ValueError if no plan can have such a sparsity or pattern, found out by the one that needs no measurement."""
    bare = analyze(source, fit=None)
    for sparsity in settings.sparsities:
        for epsilon in settings.epsilons:
            planning.plan(bare, sparsity, "uniform", epsilon, settings.pattern)


def _check_other(text: Text, used: dict[str, str]) -> None:
    """ValueError if a held-out text is one that was used already, by the sha256 of each."""
    for name, digest in used.items():
        if text.sha256 == digest:
            raise ValueError(f"{text.name}: the same text was given with --{name}; give one that has not been seen")


def _open(folder: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The results in a folder of the same comparison, or fresh ones in a folder that is new or empty."""
    file, identity = folder / RESULTS, json.loads(json.dumps(identity))
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file; name a folder for the results")
    if not file.is_file():
        if folder.is_dir() and any(f.name != f"{RESULTS}.part" for f in folder.iterdir()):
            raise ValueError(f"{folder}: this folder is not empty and holds no comparison; name another")
        results = {"kind": "comparison", "version": VERSION, "identity": identity}
        with explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
        atomic_write_text(file, json.dumps(results, indent=1) + "\n")
        return results
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        kind, version, before = results["kind"], results["version"], results["identity"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: cannot be read as the results of a comparison; name another folder") from error
    if (kind, version) != ("comparison", VERSION):
        raise ValueError(f"{file}: {kind} of version {version}; this release reads comparison {VERSION}")
    for key in {**before, **identity}:
        if before.get(key) != identity.get(key):
            raise ValueError(
                f"{folder}: a comparison with another {key} lies here ({_short(before.get(key))}, now "
                f"{_short(identity.get(key))}); repeat it as it was to go on with it, or name another folder"
            )
    return results


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 40 else text[:37] + "…"
