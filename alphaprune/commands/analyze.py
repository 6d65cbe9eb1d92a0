"""`alphaprune analyze`: a model → its analysis file."""

from alphaprune import model as models
from alphaprune.commands.shared import calibration_windows, check_file
from alphaprune.commands.shared import window as window_length
from alphaprune.console import bar, table


def run(
    model: str,
    output: str,
    fit: str,
    device: str,
    solver: str,
    calibration: str | None,
    samples: int,
    length: int | None,
    seed: int,
    magnitudes: bool,
    farms: bool,
    window: int,
    windows: int,
    json: bool,
) -> None:
    from alphaprune import analysis
    from alphaprune.farms import Windows

    check_file(output)
    sampled = Windows(window, windows) if farms else None
    source = models.open_source(model)
    tokens, identity = None, None
    if calibration is not None:
        tokens, identity = calibration_windows(source, calibration, samples, window_length(length, source.config), seed)
    with bar(source.block_count(), "analyze", "block") as tick:
        found = analysis.analyze(source, fit, device, solver, tick, tokens, identity, magnitudes, sampled)
    found.save(output)
    if json:
        print(found.to_json())
        return
    rows = [[name, f"{s.shape[0]}×{s.shape[1]}", *_alpha_cells(s.columns)] for name, s in found.layers.items()]
    table(["layer", "shape", "alpha", "± stderr", "KS", "tail", ""], rows)
    print(f"{output}: {len(found.layers)} layers, fit {fit}, solver {found.solver}")


def _alpha_cells(columns: dict[str, float]) -> list[str]:
    return [
        f"{columns['alpha']:.3f}",
        f"{columns['stderr']:.3f}",
        f"{columns['ks']:.3f}",
        f"{columns['tail']:.0f}",
        "unstable" if columns["unstable"] else "",
    ]
