"""`alphaprune plan`: an analysis file → a plan file."""

from typing import Any

from alphaprune.commands.shared import check_file
from alphaprune.console import table


def run(analysis: str, output: str, json: bool, times: str | None, tokens: int, **options: Any) -> None:
    from alphaprune.analysis import Analysis

    check_file(output)
    stats, break_even = Analysis.load(analysis), None
    if times is not None:
        from alphaprune import tuning

        shapes = {name: stat.shape for name, stat in stats.layers.items()}
        break_even = tuning.break_evens(shapes, stats.dtype, times, tokens)
    made = make_plan(stats, **options, break_even=break_even)
    made.save(output)
    if json:
        print(made.to_json())
        return
    rows = [[name, str(p.pattern), f"{p.sparsity:.4f}", f"{p.zeros:,}"] for name, p in made.layers.items()]
    table(["layer", "pattern", "sparsity", "zeros"], rows)
    print(f"{output}: sparsity {made.sparsity:.6g}, allocator {made.allocator}, epsilon {made.epsilon:.4g}")


def make_plan(analysis, sparsity, allocator, epsilon, pattern, per, min_sparsity, max_sparsity, break_even=None) -> Any:
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
        break_even=break_even,
    )
