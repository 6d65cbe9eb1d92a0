"""Inputs → the last section: which files, which machines, and the commands that made them."""

import shlex
from typing import Any

from alphaprune.report.chart import Section, Table
from alphaprune.report.inputs import Input, Inputs

NAMES = {"recipe": "how a model was pruned", "eval": "evaluation", "tasks": "tasks", "machine": "what runs here"}


def section(inputs: Inputs) -> Section:
    files = tuple((one.file, NAMES.get(one.kind, one.kind), _about(one)) for one in inputs.found)
    commands = tuple(dict.fromkeys((one.file, command) for one in inputs.found if (command := command_of(one))))
    tables = [Table("Files", ("file", "kind", "about"), files, closed=False)]
    if commands:
        tables.append(Table("Commands", ("file", "command"), commands, closed=False))
    machines = _machines(inputs)
    if machines:
        tables.append(Table("Machine", ("what", "value"), machines, closed=False))
    words = (
        "Commands of bench, eval and info are as they were typed. Those of the other files are put together from the "
        "settings that stand in them; FILE is a text of which only the hash is known."
    )
    return Section("Where this comes from", words, tables=tuple(tables))


def _about(one: Input) -> str:
    model = one.model or ""
    known = f"fingerprint {one.fingerprint[:12]}…" if one.fingerprint else ""
    return ", ".join(filter(None, (model, known)))


def command_of(one: Input) -> str | None:
    """What made a file: as recorded, or from its settings."""
    content = one.content
    if isinstance(content, dict) and isinstance(content.get("command"), str):
        return content["command"]
    made = {"analysis": _analyze, "plan": _plan, "comparison": _compare, "recipe": _prune, "demo": lambda _: ["demo"]}
    if one.kind not in made:
        return None
    return shlex.join(["alphaprune", *map(str, made[one.kind](one))])


def _analyze(one: Input) -> list[Any]:
    stats = one.content
    first = next(iter(stats.layers.values()))
    words = ["analyze", stats.model, "-o", one.file] + ([] if stats.fit in (None, "robust") else ["--fit", stats.fit])
    if stats.calibration:
        words += _calibration(stats.calibration)
    words += ["--magnitudes"] if "magnitude_quantiles" in first.series else []
    return words + (["--farms"] if any("farms" in name for name in first.columns) else [])


def _calibration(found: dict[str, Any]) -> list[Any]:
    words = ["--calibration", "FILE"]
    return words + [w for key in ("samples", "length", "seed") if key in found for w in (f"--{key}", found[key])]


def _plan(one: Input) -> list[Any]:
    plan = one.content
    words = ["plan", "analysis.json", "--sparsity", f"{plan.sparsity:g}", "--allocator", plan.allocator]
    words += [] if plan.pattern == "unstructured" else ["--pattern", plan.pattern]
    return [*words, "--epsilon", f"{plan.epsilon:.4g}", "-o", one.file]


def _compare(one: Input) -> list[Any]:
    asked = one.content["identity"]
    words: list[Any] = ["compare", "MODEL", "--calibration", "FILE", "--text", "FILE"]
    words += ["--test", "FILE"] if "test" in one.content else []
    sparsities = [s for s in asked["sparsities"] if s is not None]
    words += ["--sparsity", ",".join(f"{s:g}" for s in sparsities)] if sparsities else []
    for name in ("allocators", "methods"):
        words += [f"--{name}", ",".join(asked[name])]
    words += ["--epsilon", ",".join(map(str, asked["epsilons"]))] if asked["epsilons"] != ["auto"] else []
    words += ["--pattern", asked["pattern"]] if asked["pattern"] != "unstructured" else []
    words += ["--refit"] if asked["refit"] else []
    return [*words, *(w for key in ("samples", "length", "seed") for w in (f"--{key}", asked[key]))]


def _prune(one: Input) -> list[Any]:
    made = one.content
    words = ["prune", made["source"], "--plan", "plan.json"]
    words += ["--method", made["method"]] if "method" in made else []
    words += ["--refit"] if made.get("refit") else []
    words += ["--values", made["values"]] if made.get("values") else []
    return words + (_calibration(made) if made.get("calibration") else [])


def _machines(inputs: Inputs) -> tuple[tuple[str, str], ...]:
    """What every file says of the machine, each line once."""
    rows: list[tuple[str, str]] = []
    for one in inputs.of("machine"):
        found = one.content
        rows += [
            (key, str(found[key]))
            for key in ("machine", "alphaprune", "torch", "transformers", "threads", "cuda")
            if key in found
        ]
        sets = found["hardware"].get("instruction_sets") if isinstance(found["hardware"], dict) else None
        rows += [("instruction sets", " ".join(map(str, sets)))] if sets else []
        rows += [(f"kernel {name}", str(state)) for name, state in dict(found["kernels"]).items()]
    for one in (*inputs.of("bench"), *inputs.of("demo")):
        rows += [("machine", one.content["machine"])]
        rows += [("threads", str(one.content["threads"]))] if one.content.get("threads") else []
        speed = one.content.get("bandwidth")
        rows += [("memory is read at", f"{speed / 1e9:.1f} GB/s")] if speed else []
    for one in inputs.of("analysis"):
        rows += [(f"{name} of the analysis", version) for name, version in one.content.versions.items()]
    return tuple((name, str(value)) for name, value in dict.fromkeys(rows))
