"""Files → a report: its sections in the order in which a reader needs them."""

from collections.abc import Sequence
from pathlib import Path

from alphaprune import __version__
from alphaprune.files import atomic_write_text
from alphaprune.report import inputs, origin, page, plans, quality, spectra, speed
from alphaprune.report.chart import Section
from alphaprune.report.inputs import Input, Inputs


def sections(found: Inputs) -> list[Section]:
    """All that the files give, and where they come from."""
    by_fit: dict[str | None, Input] = {}  # the last of each fit, as one may have been made again
    for one in found.of("analysis"):
        by_fit[one.content.fit] = one
    alphas = [section for one in by_fit.values() for section in spectra.alphas(one)]
    drawn = [section for one in by_fit.values() for section in spectra.spectra(one)]
    rest = [*plans.sections(found), *quality.sections(found), *speed.sections(found)]
    return [*alphas, *rest, *drawn, origin.section(found)]


def facts(found: Inputs) -> list[tuple[str, str]]:
    """What stands at the top."""
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
    """Writes the page; it appears whole or not at all."""
    text = page.html(
        f"{Path(found.model).name or found.model}: pruning report", facts(found), made, f"alphaprune {__version__}"
    )
    atomic_write_text(output, text)
