"""What a comparison is of: settings → candidates, each a plan and a method; and all that they share, made once.

Shared are the analysis that every allocator reads, the statistics of the dense model's layers and the error curves of
its blocks. Analysis, curves and plans lie as files in the comparison's folder, where a later run finds them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from alphaprune import allocators, curves, curves_measure, observed, planning, pruners
from alphaprune.analysis import Analysis, analyze, arguments_for, needs_text
from alphaprune.calibrate import Need
from alphaprune.data import Text, sample_windows
from alphaprune.model import Source
from alphaprune.observed import Observed, gather
from alphaprune.pattern import parse
from alphaprune.plan_file import Plan
from alphaprune.pruning import Recipe
from alphaprune.states import Room

BASELINES = ("uniform", "ramp")  # what every other allocator is held against; first, so that ties go to them
NEEDS: tuple[Need, ...] = ("nothing", "norms", "gram")
CURVE_WINDOWS = 16  # of calibration text at most, for error curves

Bar = Callable[[int, str, str], Any]  # (steps, description, unit) → context manager of what to call after each


@dataclass(frozen=True)
class Settings:
    """What is compared and on what; with the model and the texts it identifies a comparison.

    sparsities: None where a pattern such as 2:4 implies it.   epsilons: numbers or "auto", each tried.   refit: after
    every method.   samples, length, seed: calibration windows.   windows: only the first so many of a held-out text.
    """

    sparsities: tuple[float | None, ...]
    allocators: tuple[str, ...]
    methods: tuple[str, ...]
    epsilons: tuple[float | str, ...] = ("auto",)
    pattern: str = "unstructured"
    refit: bool = False
    samples: int = 128
    length: int = 2048
    seed: int = 0
    windows: int | None = None

    def check(self) -> None:
        """ValueError for a name that is not known or a number that cannot be."""
        for name in self.allocators:
            allocators.get(name)
        for recipe in self.recipes():
            recipe.check()
        for epsilon in self.epsilons:
            if epsilon != "auto" and not 0 <= epsilon < 1:
                raise ValueError(f"epsilon {epsilon:g}: wanted a number from 0 to below 1, or auto")
        for sparsity in self.sparsities:
            if sparsity is not None and not 0 < sparsity < 1:
                raise ValueError(f"sparsity {sparsity:g}: wanted a number between 0 and 1")

    def recipes(self) -> list[Recipe]:
        """One per method; inputs are those behind dense blocks, which is what lets candidates share them."""
        return [Recipe(method, refit=self.refit, prefix="dense") for method in self.methods]


@dataclass(frozen=True)
class Candidate:
    """A plan, the file that it is in, and a recipe.

    allocator: as asked for; a plan that leaves nothing to allocate, such as 2:4 everywhere, says uniform.
    twin: the id of an earlier candidate that removes as many weights of every layer by the same method, so that both
    are one model.
    """

    id: str
    allocator: str
    plan: Plan
    file: str
    recipe: Recipe
    twin: str | None


def with_baselines(names: Sequence[str]) -> tuple[str, ...]:
    """The allocators to compare: baselines first, then those asked for, each once. "all" stands for every member of
    the room, "metrics" for the spectral metrics."""
    groups = {"all": allocators.MEMBERS, "metrics": allocators.METRICS}
    named = [name for word in names for name in groups.get(word, (word,))]
    return tuple(dict.fromkeys((*BASELINES, *named)))


def default_methods() -> tuple[str, ...]:
    return tuple(name for name in ("wanda", "sparsegpt") if name in pruners.MEMBERS)


def label(sparsity: float) -> str:
    """0.70 for 0.7, and as many digits as it takes for others."""
    return f"{sparsity:.2f}" if round(sparsity, 2) == sparsity else str(sparsity)


class Shared:
    """What candidates have in common, each made when it is first asked for."""

    def __init__(
        self, source: Source, settings: Settings, calibration: Text, folder: Path, bar: Bar, room: Room | None = None
    ) -> None:
        """source: the dense model.   folder: exists.   bar: see console.bar.   room: of hidden states."""
        self.source, self.settings, self.calibration, self.room = source, settings, calibration, room
        self.folder, self.bar, self.statistics = folder, bar, folder / "statistics"
        members = [allocators.get(name) for name in settings.allocators]
        read = {entry for member in members for entry in (*member.columns, *member.series)}
        self.measured = bool(read & set(curves.SERIES))
        self.read = read - set(curves.SERIES)  # of the analysis

    def close(self) -> None:
        """Deletes statistics that were too big for memory."""
        observed.delete(self.statistics)

    @cached_property
    def observed(self) -> Observed:
        """What is known of the inputs of every layer: as much as the methods and the allocators ask for."""
        use = self.settings
        needs = [recipe.need for recipe in use.recipes()]
        need = max([*needs, "gram"] if needs_text(self.read) else needs, key=NEEDS.index)
        if need == "nothing":
            return Observed({block.index: {} for block in self.source.blocks()}, None)
        tokens = sample_windows(self.calibration, use.samples, use.length, use.seed)
        with self.bar(self.source.block_count(), "calibrate", "block") as tick:
            return gather(self.source, tokens, need, self.statistics, tick, room=self.room)

    @cached_property
    def analysis(self) -> Analysis:
        """All that the allocators read."""
        file, use = self.folder / "analysis.json", self.settings
        if file.is_file():
            found = Analysis.load(file)
        else:
            active = needs_text(self.read)
            statistics = self.observed if active else None  # before the bar, since it has its own
            text = {"calibration": self.calibration.sha256, "samples": use.samples}
            text |= {"length": use.length, "seed": use.seed}
            with self.bar(self.source.block_count(), "analyze", "block") as tick:
                found = analyze(
                    self.source,
                    device=self.source.device.type,
                    progress=tick,
                    calibration=text if active else None,
                    statistics=statistics,
                    **arguments_for(self.read),
                )
            found.save(file)
        return curves.attach(found, self.curves) if self.measured else found

    @cached_property
    def curves(self) -> curves.Curves:
        """Error curves of the blocks by the first method, on calibration text other than that of the statistics."""
        file, part, use = self.folder / "curves.json", self.folder / "curves-started.json", self.settings
        if file.is_file():
            return curves.Curves.load(file)
        levels = curves_measure.levels([s for s in use.sparsities if s is not None] or [0.5])
        tokens = sample_windows(self.calibration, min(use.samples, CURVE_WINDOWS), use.length, use.seed + 1)
        data = {"calibration": self.calibration.sha256, "samples": len(tokens), "length": use.length}
        data |= {"seed": use.seed + 1, "refit": use.refit}
        statistics, recipe = self.observed, use.recipes()[0]
        with self.bar(self.source.block_count() * len(levels), "curves", "cut") as tick:
            made = curves_measure.measure(self.source, recipe, statistics, tokens, levels, part, data, tick, self.room)
        made.save(file)
        part.unlink()
        return made

    @cached_property
    def candidates(self) -> list[Candidate]:
        """Every sparsity, allocator, epsilon and method; their plans are files in `plans`.

        An epsilon that changes nothing for its allocator makes no candidate. ValueError if there is no such plan.
        """
        use, found = self.settings, []
        (self.folder / "plans").mkdir(exist_ok=True)
        for sparsity in use.sparsities:
            known: dict[tuple, tuple[str, str]] = {}  # counts → allocator and name of the first plan that has them
            for allocator in use.allocators:
                for epsilon in use.epsilons:
                    name = f"{label(self._meant(sparsity))}-{allocator}"
                    name += f"-{epsilon}" if len(use.epsilons) > 1 else ""
                    plan = self._plan(self.folder / f"plans/{name}.json", sparsity, allocator, epsilon)
                    counts = tuple((p.zeros, str(p.pattern)) for p in plan.layers.values())
                    owner, first = known.setdefault(counts, (allocator, name))
                    if owner == allocator and first != name:
                        continue
                    plan.save(self.folder / f"plans/{name}.json")
                    for recipe in use.recipes():
                        twin = None if first == name else f"{first}-{recipe.method}"
                        own = f"{name}-{recipe.method}"
                        found.append(Candidate(own, allocator, plan, f"plans/{name}.json", recipe, twin))
        return found

    def _plan(self, file: Path, sparsity: float | None, allocator: str, epsilon: float | str) -> Plan:
        """The plan of an earlier run, so that what was judged is what lies there, or a new one."""
        if file.is_file():
            return Plan.load(file)
        return planning.plan(self.analysis, sparsity, allocator, epsilon, self.settings.pattern)

    def _meant(self, sparsity: float | None) -> float:
        """The sparsity, or that which the pattern implies."""
        return parse(self.settings.pattern).sparsity if sparsity is None else sparsity
