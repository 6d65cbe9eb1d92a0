"""`alphaprune compare`: every allocator with every pruner on a user's own model and text."""

import shlex
from pathlib import Path
from typing import Any

from alphaprune import model as models
from alphaprune.commands.shared import dump, room_for, window
from alphaprune.console import bar, table

FIGURES = ["allocator", "method", "perplexity", "± stderr", "KL", "bits per byte"]


def run(
    model: str,
    output: str,
    text: str,
    test: str | None,
    calibration: str,
    sparsity: str | None,
    allocators: str,
    methods: str | None,
    epsilon: str,
    pattern: str,
    refit: bool,
    samples: int,
    length: int | None,
    seed: int,
    memory: float | None,
    spill: str | None,
    windows: int | None,
    device: str,
    dtype: str,
    json: bool,
) -> None:
    from alphaprune import candidates, compare, data, picture

    folder = models.resolve(model)
    config = models.read_config(folder)
    settings = candidates.Settings(
        sparsities=_sparsities(sparsity, pattern),
        allocators=candidates.with_baselines(_names(allocators, "--allocators")),
        methods=tuple(_names(methods, "--methods")) if methods is not None else candidates.default_methods(),
        epsilons=_numbers(epsilon, "--epsilon", ("auto",)),
        pattern=pattern,
        refit=refit,
        samples=samples,
        length=window(length, config),
        seed=seed,
        windows=windows,
    )
    settings.check()
    if test is not None and not Path(test).is_file():
        raise ValueError(f"{test}: there is no such text file")
    tokenizer = data.load_tokenizer(folder)

    def read(file: str) -> data.Text:
        return data.encode(tokenizer, data.read_text(file), file, config)

    calibrating, validating = read(calibration), read(text)
    place = Path(output), bar, room_for(memory, spill, output)
    made = compare.Comparison(_load(folder, device, dtype), settings, calibrating, validating, *place)
    results = made.run()
    if test is not None:
        results = made.test(lambda: read(test))
    made.close()
    found = compare.summary(results)
    for chosen in found["recommended"]:
        row = found["validation"]["rows"][chosen["id"]]
        chosen["command"] = _command(model, output, calibration, settings, chosen, row)
    found["picture"] = picture.draw(results, Path(output) / "compare.png")
    print(dump(found)) if json else _show(found, output)


def _names(text: str, option: str) -> list[str]:
    names = [part.strip() for part in text.split(",")]
    if not all(names):
        raise ValueError(f"{option} {text}: wanted names with commas between them")
    return list(dict.fromkeys(names))


def _numbers(text: str, option: str, others: tuple[str, ...] = ()) -> tuple[float | str, ...]:
    """Numbers, and words that may stand for one, each once."""
    try:
        return tuple(dict.fromkeys(p if p in others else float(p) for p in map(str.strip, text.split(","))))
    except ValueError:
        raise ValueError(
            f"{option} {text}: wanted {', '.join([*others, 'numbers'])} with commas between them"
        ) from None


def _sparsities(text: str | None, pattern: str) -> tuple[float | None, ...]:
    if text is not None:
        return _numbers(text, "--sparsity")
    if pattern == "unstructured" or pattern.startswith("N:"):
        raise ValueError("give --sparsity, such as 0.5,0.7")
    return (None,)


def _load(folder: Path, device: str, dtype: str) -> models.Source:
    """The dense model of a folder, block by block, in a dtype and on a device."""
    import torch

    from alphaprune import devices

    where = str(devices.named(device, auto=True))
    return models.DirectorySource(folder, None if dtype == "auto" else getattr(torch, dtype), where)


def _command(
    model: str, output: str, calibration: str, settings: Any, chosen: dict[str, Any], row: dict[str, Any]
) -> str:
    """What makes the recommended model."""
    words = ["alphaprune", "prune", model, "-o", f"{Path(model).name}-{chosen['plan'][5:-5]}"]
    words += ["--plan", str(Path(output) / chosen["plan"]), "--method", row["method"], "--prefix", "dense"]
    words += ["--calibration", calibration, "--samples", settings.samples, "--length", settings.length]
    words += ["--seed", settings.seed] + (["--refit"] if settings.refit else [])
    return shlex.join(map(str, words))


def _show(found: dict[str, Any], output: str) -> None:
    """Prints a table for each sparsity, what is recommended, and how sure that is."""
    dense = found["validation"]["dense"]
    print(f"dense: perplexity {dense['perplexity']:.4f}, {_cell(dense['bits_per_byte'])} bits per byte")
    for chosen in found["recommended"]:
        rows = {n: r for n, r in found["validation"]["rows"].items() if r["sparsity"] == chosen["sparsity"]}
        print(f"\nsparsity {chosen['sparsity']:g}, on the text that candidates are chosen by")
        table([*FIGURES, "sparsity", "epsilon", ""], [_cells(row, name == chosen["id"]) for name, row in rows.items()])
        best = rows[chosen["id"]]
        print(f"recommended: {best['allocator']} with {best['method']}, {Path(output) / chosen['plan']}")
        for baseline, versus in chosen["versus"].items():
            if best["allocator"] != baseline:
                print(f"  against {baseline} with {best['method']}: {_difference(versus)}")
        if "test" in found:
            _show_test({name: found["test"]["rows"][name] for name in rows}, chosen["id"])
        print(f"  {chosen['command']}")
    print("\n" + (found["picture"] or "No picture: matplotlib is missing (pip install 'alphaprune[demo]')."))


def _show_test(rows: dict[str, dict[str, Any]], chosen: str) -> None:
    """The other text: every candidate beside the one that is best there, and what became of the recommended one."""
    print("\non the test text, which was not read before the choice")
    columns = [*FIGURES, "nats over the best ± stderr", ""]
    table(columns, [[*_figures(row), _plain(row["versus_best"]), _note(row, n == chosen)] for n, row in rows.items()])
    versus = rows[chosen]["versus_best"]
    best = rows[versus["id"]]
    if versus["id"] == chosen:
        print("  the recommended one is the best here, too")
    else:
        print(f"  against the best here, {best['allocator']} with {best['method']}: {_difference(versus)}")


def _cells(row: dict[str, Any], recommended: bool) -> list[str]:
    return [*_figures(row), f"{row['realized']:.4f}", f"{row['epsilon']:.3g}", _note(row, recommended)]


def _figures(row: dict[str, Any]) -> list[str]:
    perplexity, error = row["perplexity"], row["stderr"]
    spread = None if perplexity is None or error is None else perplexity * error  # d exp(loss) = exp(loss) d loss
    figures = (perplexity, spread, row["kl"], row["bits_per_byte"])
    return [row["allocator"], row["method"], *map(_cell, figures)]


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}" if value < 1000 else f"{value:.4g}"


def _note(row: dict[str, Any], recommended: bool) -> str:
    same = f"same plan as {row['same_as'].rpartition('-')[0].partition('-')[2]}" if row["same_as"] else ""
    return ", ".join(filter(None, ["recommended" if recommended else "", same]))


def _plain(difference: dict[str, float | None]) -> str:
    mean, error = difference["difference"], difference["stderr"]
    return "–" if mean is None else f"{mean:+.4f}" + ("" if error is None else f" ± {error:.4f}")


def _difference(difference: dict[str, float | None]) -> str:
    from alphaprune.compare import clear

    if difference["difference"] is None:
        return "no difference in numbers, one loss is not finite"
    if difference["stderr"] is None:
        return f"{difference['difference']:+.4f} nats per token, on one window"
    verdict = "beyond" if clear(difference) else "within"
    return f"{_plain(difference)} nats per token, {verdict} 2 standard errors of no difference"
