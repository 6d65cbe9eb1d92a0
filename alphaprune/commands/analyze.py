"""`alphaprune analyze`: a model → its analysis file."""

from pathlib import Path
from typing import Any

from alphaprune import journal
from alphaprune import model as models
from alphaprune.commands.shared import calibration_windows, check_file, room_for
from alphaprune.commands.shared import window as window_length
from alphaprune.console import bar, table


def run(json: bool, **options: Any) -> None:
    from alphaprune import ranks

    with ranks.joined("analyze", options) as world:
        found = _analyze(**options)
        if not world.leads:
            return
    if json:
        print(found.to_json())
        return
    rows = [[name, f"{s.shape[0]}×{s.shape[1]}", *_alpha_cells(s.columns)] for name, s in found.layers.items()]
    table(["layer", "shape", "alpha", "± stderr", "KS", "tail", ""], rows)
    print(f"{options['output']}: {len(found.layers)} layers, fit {found.fit}, solver {found.solver}")


def _analyze(
    model: str,
    output: str,
    fit: str,
    device: str,
    solver: str,
    calibration: str | None,
    samples: int,
    length: int | None,
    seed: int,
    memory: float | None,
    spill: str | None,
    magnitudes: bool,
    farms: bool,
    window: int,
    windows: int,
    weights: str | None,
    blocks: str | None,
) -> Any:
    """The analysis, which the first process has written to its file."""
    from alphaprune import analysis, ranks
    from alphaprune.farms import Windows

    check_file(output)
    sampled = Windows(window, windows) if farms else None
    source = _open(model, weights, blocks, calibration)
    ranks.agree({"model": source.description().fingerprint})
    tokens, identity = None, None
    if calibration is not None:
        tokens, identity = calibration_windows(source, calibration, samples, window_length(length, source.config), seed)
        ranks.agree(identity)  # files of one name may differ between machines
    room = room_for(memory, spill, output)
    total = analysis.steps(source.block_count(), fit, magnitudes, sampled, tokens is not None)
    with bar(total, "analyze", "block") as tick:
        found = analysis.analyze(
            *(source, fit, device, solver, tick, tokens, identity, magnitudes, sampled),
            journal=output,
            keep_journal=True,
            room=room,
        )
    if ranks.world().leads:
        found.save(output)
    ranks.share(None)  # when it is there
    journal.delete(Path(output))
    return found


def _open(model: str, weights: str | None, blocks: str | None, calibration: str | None) -> models.Source:
    if not model.startswith("timm:"):
        if weights or blocks:
            raise ValueError(f"--{'weights' if weights else 'blocks'} belongs to a model timm:NAME")
        return models.open_source(model)
    if calibration is not None:
        raise ValueError(
            f"{model}: reads images, not text: leave out --calibration, or give images in Python (inputs=…)"
        )
    from alphaprune.timm_models import open_timm

    return open_timm(model, weights, blocks)


def _alpha_cells(columns: dict[str, float]) -> list[str]:
    return [
        f"{columns['alpha']:.3f}",
        f"{columns['stderr']:.3f}",
        f"{columns['ks']:.3f}",
        f"{columns['tail']:.0f}",
        "unstable" if columns["unstable"] else "",
    ]
