"""Files → a report: its sections in the order in which a reader needs them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from alphaprune import __version__
from alphaprune.files import atomic_write_text
from alphaprune.report import inputs, origin, page, plans, quality, spectra, speed
from alphaprune.report.chart import Section
from alphaprune.report.inputs import Input, Inputs

FAULTS = (*inputs.MALFORMED, ValueError)  # of numbers that are none
Drawn = TypeVar("Drawn")


def sections(found: Inputs) -> list[Section]:
    """All that the files give, and where they come from; ValueError naming a file that lacks what is drawn."""
    return _explained(_sections, found)


def facts(found: Inputs) -> list[tuple[str, str]]:
    """What stands at the top; ValueError as of `sections`."""
    return _explained(_facts, found)


def _explained(draw: Callable[[Inputs], Drawn], found: Inputs) -> Drawn:
    try:
        return draw(found)
    except FAULTS:
        for one in found.found:  # which of them?
            try:
                draw(Inputs((one,), found.layers))
            except FAULTS as error:
                raise inputs.malformed(one.file, one.kind, error) from error
        raise


def _sections(found: Inputs) -> list[Section]:
    by_fit: dict[str | None, Input] = {}  # the last of each fit, as one may have been made again
    for one in found.of("analysis"):
        by_fit[one.content.fit] = one
    alphas = [section for one in by_fit.values() for section in spectra.alphas(one)]
    drawn = [section for one in by_fit.values() for section in spectra.spectra(one)]
    rest = [*plans.sections(found), *quality.sections(found), *speed.sections(found)]
    return [*alphas, *rest, *drawn, origin.section(found)]


def _facts(found: Inputs) -> list[tuple[str, str]]:
    rows = [("model", found.model)]
    if found.layers:
        rows.append(("prunable layers", f"{len(found.layers)} in {len(set(found.layers.values()))} blocks"))
    for one in found.of("analysis")[:1]:
        stats = one.content.layers.values()
        rows.append(("prunable weights", f"{sum(s.shape[0] * s.shape[1] for s in stats):,}"))
        if all("alpha" in s.columns for s in stats):
            rows.append(("mean alpha", f"{sum(s.columns['alpha'] for s in stats) / len(stats):.2f}"))
    for one in found.of("comparison"):
        best = ", ".join(f"{r['sparsity']:g}: {r['id'].partition('-')[2]}" for r in one.content["recommended"])
        rows.append(("recommended", best))
    for one in found.of("info"):
        rows.append((f"sparsity of {Path(one.content['model']).name}", f"{one.content['sparsity']:.1%}"))
    prints = [one.fingerprint for one in found.found if one.fingerprint]
    return rows + ([("fingerprint", f"{prints[0][:12]}…")] if prints else [])


def read(files: Sequence["str | Path"]) -> Inputs:
    """See inputs.read."""
    return inputs.read(files)


def write(found: Inputs, made: Sequence[Section], output: "str | Path") -> None:
    """Writes the page; it appears whole or not at all. ValueError for a number that no picture holds."""
    title = f"{Path(found.model).name or found.model}: pruning report"
    try:
        text = page.html(title, facts(found), made, f"alphaprune {__version__}")
    except OverflowError as error:
        raise ValueError(f"a number in these files is too large to be drawn: {error}") from error
    atomic_write_text(output, text)
