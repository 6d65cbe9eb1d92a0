"""`alphaprune demo`: the whole flow on the embedded model."""

from pathlib import Path

from alphaprune.commands.shared import dump
from alphaprune.console import bar, table


def run(output: str, json: bool) -> None:
    from alphaprune.demo import run

    result = run.run(Path(output), bar)
    if json:
        print(dump(result))
    else:
        run.show(result, table)
