"""`alphaprune plan`: an analysis file → a plan file."""

from typing import Any

from alphaprune.commands.shared import check_file, dump
from alphaprune.console import table


def run(
    analysis: str,
    output: str,
    json: bool,
    times: str | None,
    tokens: int,
    values: str | None,
    activations: str | None,
    curves: str | None,
    **options: Any,
) -> None:
    from alphaprune.analysis import Analysis
    from alphaprune.curves import Curves, attach

    check_file(output)
    stats, break_even, seconds, dense = Analysis.load(analysis), None, None, None
    if curves is not None:
        stats = attach(stats, Curves.load(curves))
    if times is not None:
        from alphaprune import layer_times

        shapes = {name: stat.shape for name, stat in stats.layers.items()}
        wanted = layer_times.Wanted(stats.dtype, times, tokens, options["pattern"], values, activations)
        break_even, seconds = layer_times.break_evens(shapes, wanted), layer_times.time_curves(shapes, wanted)
        dense = layer_times.dense_seconds(shapes, wanted)
    elif values or activations:
        raise ValueError("--values and --activations say which times count; give --times FILE, or auto, too")
    made = make_plan(stats, **options, break_even=break_even, times=seconds)
    made.save(output)
    predicted = _predicted(made, stats if curves is not None else None, seconds, dense)
    if json:
        print(dump(made.to_dict() | predicted))
        return
    rows = [[name, str(p.pattern), f"{p.sparsity:.4f}", f"{p.zeros:,}"] for name, p in made.layers.items()]
    table(["layer", "pattern", "sparsity", "zeros"], rows)
    asked, realized = f"{made.sparsity:.6g}", f"{made.realized:.6g}"
    reached = asked if asked == realized else f"{asked} ({realized} by what the pattern allows)"
    print(f"{output}: sparsity {reached}, allocator {made.allocator}, epsilon {made.epsilon:.4g}")
    if "predicted_loss" in predicted:
        print(f"predicted loss {predicted['predicted_loss']:.4g}, the sum of what the blocks lose alone")
    if "predicted_seconds" in predicted:
        now, dense = predicted["predicted_seconds"], predicted["dense_seconds"]
        print(f"predicted {now:.4g} s in linear layers for {tokens} tokens, {dense:.4g} s dense: {dense / now:.2f}×")


def _predicted(made: Any, stats: Any, seconds: Any, dense: float | None) -> dict[str, float]:
    """What error curves and times, where they are given, say of the plan."""
    from alphaprune import speed_planning

    found = {}
    if stats is not None:
        found["predicted_loss"] = speed_planning.predicted_loss(made, stats)
    if seconds is not None:
        found |= {"predicted_seconds": speed_planning.predicted_seconds(made, seconds), "dense_seconds": dense}
    return found


def make_plan(analysis, sparsity, allocator, epsilon, pattern, per, min_sparsity, max_sparsity, **options: Any) -> Any:
    """options: break_even, latency, max_loss and times, as `planning.plan` takes them."""
    from alphaprune import planning

    if epsilon != "auto":
        try:
            epsilon = float(epsilon)
        except ValueError:
            raise ValueError(f"--epsilon {epsilon}: wanted a number or auto") from None
    return planning.plan(
        analysis,
        sparsity,
        allocator=allocator,
        epsilon=epsilon,
        pattern=pattern,
        granularity=per,
        bounds=(min_sparsity, max_sparsity),
        **options,
    )
