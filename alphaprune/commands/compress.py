"""`alphaprune compress`: a model and a budget of bits, ranks or channels → a smaller checkpoint, or its plan."""

import hashlib
from pathlib import Path
from typing import Any

from alphaprune import model as models
from alphaprune.commands.shared import calibration_windows, check_file, dump, rounding_loss, window, written_as_dict
from alphaprune.console import bar, size, table

OF = {  # options that belong to one method
    "bits": ("choices", "scales"),
    "rank": (),
    "structured": ("parts", "multiple", "score", "refit"),
}
OPTIONS = {"bits": "--bits", "rank": "--rank-ratio", "structured": "--structured"}


def run(
    model: str,
    output: str | None,
    bits: float | None,
    rank_ratio: float | None,
    structured: float | None,
    plan: str | None,
    save_plan: str | None,
    analysis: str | None,
    allocator: str,
    epsilon: str,
    per: str,
    calibration: str | None,
    samples: int,
    length: int | None,
    seed: int,
    device: str | None,
    format: str,  # noqa: A002
    json: bool,
    **options: Any,
) -> None:
    from alphaprune import compressions

    _check_places(output, save_plan)
    source = _open(model)
    goals = {"bits": bits, "rank": rank_ratio, "structured": structured}
    method, budget = next(((name, value) for name, value in goals.items() if value is not None), (None, None))
    chosen = None if plan is None else compressions.CompressionPlan.load(plan)
    _check_options(chosen.method if chosen else method, options, planned=chosen is not None)
    if output is not None and options["refit"] and calibration is None:
        raise ValueError("--refit needs --calibration FILE, the text that the model should stay good at")
    tokens, identity = None, {}
    if calibration is not None:
        tokens, identity = calibration_windows(source, calibration, samples, window(length, source.config), seed)
    if chosen is None:
        chosen = _planned(source, method, budget, allocator, epsilon, per, options, analysis, tokens, device)
    compressions.parts.check(chosen, source)
    if save_plan is not None:
        chosen.save(save_plan)
    if output is None:
        _report_plan(chosen, save_plan, json)
        return
    recipe = compressions.Recipe(
        packed=format == "packed",
        calibrated=calibration is not None,
        group=None if options["scales"] == "row" else 128,
        score=options["score"],
        refit=options["refit"],
        device=device,
    )
    written = _written(source, output, chosen, recipe, identity, tokens)
    _report(written, chosen, json)


def _check_places(output: str | None, save_plan: str | None) -> None:
    from alphaprune import unfinished

    if output is None and save_plan is None:
        raise ValueError("give -o OUT for the compressed model, or --save-plan FILE for its plan, or both")
    if output is not None:
        unfinished.check_free(Path(output))
    if save_plan is not None:
        check_file(save_plan)


def _open(model: str) -> models.Source:
    """The dense blocks of a folder; what is packed was rounded or pruned already."""
    folder = models.resolve(model)
    if models.is_packed(folder):
        raise ValueError(
            f"{model}: is packed already; compress the model from before that, or expand it with "
            f"`alphaprune convert {model} NEW --format dense`"
        )
    return models.open_source(folder)


def _check_options(method: str, options: dict[str, Any], planned: bool = False) -> None:
    """ValueError naming the first option that is another method's, or that the plan has decided."""
    for owner, names in OF.items():
        for name in names:
            given = options[name] not in (None, False)
            if given and owner != method:
                raise ValueError(f"--{name} belongs to {OPTIONS[owner]}, and this is {OPTIONS[method]}")
            if given and planned and name in ("choices", "parts", "multiple"):
                raise ValueError(f"--{name}: the plan has decided that; leave it out, or plan anew")


def _planned(
    source: models.Source,
    method: str,
    budget: float,
    allocator: str,
    epsilon: str,
    per: str,
    options: dict[str, Any],
    analysis: str | None,
    tokens: Any,
    device: str | None,
) -> Any:
    from alphaprune import compressions
    from alphaprune.commands.prune import analyzed

    choices = {}
    if options["choices"] is not None:
        try:
            choices["choices"] = tuple(sorted({int(bits) for bits in options["choices"].split(",")}))
        except ValueError:
            raise ValueError(f"--choices {options['choices']}: wanted whole numbers with commas, such as 4,8") from None
    if epsilon != "auto":
        try:
            epsilon = float(epsilon)
        except ValueError:
            raise ValueError(f"--epsilon {epsilon}: wanted a number or auto") from None
    if options["parts"] is not None:
        choices["which"] = options["parts"]
    if options["multiple"] is not None:
        choices["multiple"] = options["multiple"]
    compressions.parts.check_budget(method, budget, choices.get("choices", compressions.parts.BITS))
    stats = analyzed(source, analysis, allocator, tokens, device)
    return compressions.plan(source, stats, method, budget, allocator, epsilon, per, **choices)


def _written(source: models.Source, output: str, plan: Any, recipe: Any, identity: dict[str, Any], tokens: Any) -> Any:
    from alphaprune import __version__, compressions, unfinished

    how = {name: value for name, value in vars(recipe).items() if name != "device"}
    recipe.need(plan)  # what does not go together is said before the model is read
    identity = {"method": plan.method, **how, **identity, "model": source.description().fingerprint}
    identity["plan"] = hashlib.sha256(plan.to_json().encode()).hexdigest()
    made = {"alphaprune": __version__, "source": source.name, **identity, "plan": plan.to_dict()}
    progress = bar(source.block_count(), f"compress ({plan.method})", "block")
    with unfinished.nothing_left(output), progress as tick:
        return compressions.write(source, output, plan, recipe, identity, made, tokens, tick)


def _goal(plan: Any) -> str:
    """What the plan keeps, in words."""
    asked = "" if abs(plan.realized - plan.budget) < 1e-6 else f" ({plan.budget:g} asked for)"
    words = {
        "bits": f"{plan.realized:.4f} bits per weight on average{asked}, scales not counted",
        "rank": f"factors with {plan.realized:.4f} of the weights{asked}",
        "structured": f"{plan.realized:.4f} of the weights removed{asked}",
    }
    return f"{words[plan.method]}, allocator {plan.allocator}, epsilon {plan.epsilon:.4g}"


def _report_plan(plan: Any, file: str, json: bool) -> None:
    if json:
        print(dump(plan.to_dict()))
        return
    what = {"bits": "bits", "rank": "rank", "structured": "kept"}[plan.method]
    table(["part", what, "of"], [[name, str(kept.amount), str(kept.of)] for name, kept in plan.parts.items()])
    print(f"{file}: {_goal(plan)}")


def _report(written: Any, plan: Any, json: bool) -> None:
    if json:
        found = {"method": plan.method, "budget": plan.budget, "realized": plan.realized, "epsilon": plan.epsilon}
        print(dump(written_as_dict(written) | found))
        return
    print(f"{written.folder}: {_goal(plan)}, linears {size(written.dense_bytes)} → {size(written.stored_bytes)}")
    if written.errors:
        print(rounding_loss(written.errors, "rounded values"))
