"""What commands print: tables, a progress bar, sizes for a person."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

COMMAND: ContextVar[str | None] = ContextVar("COMMAND", default=None)  # the command line that runs, if one does

SHOWN = True  # of several processes that work together, one shows how far it is
EVERY = 30  # seconds between lines where there is no terminal


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
    """Progress on stderr with the time that is left; yields what to call after each step.

    In a terminal a bar, elsewhere a line every EVERY seconds.   total: None where it is not known.
    """
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    quiet = {"disable": not SHOWN} if terminal else {"file": _Nowhere(), "mininterval": EVERY}
    with tqdm(total=total, desc=description, unit=unit, leave=False, **quiet) as progress:
        last = time.monotonic()

        def tick(step: str) -> None:
            nonlocal last
            progress.set_postfix_str(step, refresh=terminal)
            progress.update()
            if SHOWN and not terminal and time.monotonic() - last >= EVERY:
                last = time.monotonic()
                print(line(description, unit, progress.n, total, progress.format_dict["elapsed"]), file=sys.stderr)

        yield tick


def line(description: str, unit: str, done: int, total: int | None, elapsed: float) -> str:
    """How far something is, and how long the rest takes if it goes on as it went so far."""
    text = f"{description}: {done}{f' of {total}' if total else ''} {unit}s, {clock(elapsed)}"
    return f"{text}, {clock(elapsed / done * (total - done))} left" if total and done else text


def clock(seconds: float) -> str:
    """1:02:03, or 2:03 within an hour."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


class _Nowhere:
    """Takes what a bar writes where there is no terminal."""

    def write(self, text: str) -> None: ...

    def flush(self) -> None: ...


def size(count: float) -> str:
    """Bytes for a person: 1.2 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError
