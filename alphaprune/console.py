"""What commands print: tables, a progress bar, sizes for a person."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def table(columns: list[str], rows: list[list[str]], header: bool = True) -> None:
    """Prints rows; in a terminal with rules and colours, in a pipe as plain aligned text."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    made = Table(box=box.SIMPLE_HEAD, show_header=header, pad_edge=False)
    for place, name in enumerate(columns):
        made.add_column(name, justify="left" if place == 0 or not header else "right", no_wrap=place == 0)
    for row in rows:
        made.add_row(*row)
    console.print(made)


@contextmanager
def bar(total: int | None, description: str, unit: str) -> Iterator[Callable[[str], None]]:
    """A progress bar on stderr; yields what to call after each step. total: None where it is not known."""
    from tqdm import tqdm

    with tqdm(total=total, desc=description, unit=unit, leave=False, disable=not sys.stderr.isatty()) as progress:

        def tick(step: str) -> None:
            progress.set_postfix_str(step)
            progress.update()

        yield tick


def size(count: float) -> str:
    """Bytes for a person: 1.2 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError
