"""Files of rows, one JSON object per line."""

import json
import os
from pathlib import Path
from typing import Any


def replace(file: Path, made: list[dict[str, Any]], key: str) -> None:
    """Puts rows into a file in the place of those that have the same value of `key`."""
    news = {row[key] for row in made}
    before = file.read_text().splitlines() if file.exists() else []
    kept = [line for line in before if json.loads(line)[key] not in news]
    file.write_text("\n".join([*kept, *(json.dumps(row) for row in made)]) + "\n")


def append(file: "str | Path", row: dict[str, Any]) -> None:
    """Puts one row at the end of a file, for good: what was measured outlives whatever comes next."""
    with open(file, "a") as handle:
        handle.write(json.dumps(row, allow_nan=False) + "\n")
        handle.flush()
        os.fsync(handle.fileno())
