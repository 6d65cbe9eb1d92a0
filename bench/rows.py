"""Files of rows, one JSON object per line."""

import json
import os
import shlex
from pathlib import Path
from typing import Any


def replace(file: Path, made: list[dict[str, Any]], key: str) -> None:
    """Puts rows into a file in the place of those that have the same value of `key`."""
    news = {row[key] for row in made}
    before = file.read_text().splitlines() if file.exists() else []
    kept = [line for line in before if json.loads(line)[key] not in news]
    file.write_text("\n".join([*kept, *(json.dumps(row) for row in made)]) + "\n")


def command(script: str, arguments: list[str]) -> str:
    """What to type for the same rows, but for the file that they are written to."""
    kept = [given for before, given in zip(["", *arguments], arguments, strict=False)
            if given.partition("=")[0] != "--out" and before != "--out"]  # fmt: skip
    return shlex.join(["python", script, *kept])


def kept(row: dict[str, Any]) -> str:
    """Of a row with sparsity and pattern: dense, the pattern, or which share of the weights are zeros; its head."""
    if not row["sparsity"]:
        return "dense"
    weights = row["pattern"] if ":" in row["pattern"] else f"{row['sparsity']:.0%}"
    return weights + (f", head in {row['head']}" if row.get("head") else "")


def append(file: "str | Path", row: dict[str, Any]) -> None:
    """Puts one row at the end of a file, for good: what was measured outlives whatever comes next."""
    with open(file, "a") as handle:
        handle.write(json.dumps(row, allow_nan=False) + "\n")
        handle.flush()
        os.fsync(handle.fileno())
