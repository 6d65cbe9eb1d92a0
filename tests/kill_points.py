"""Runs a command again and again in forked children that die at random calls to the file system, until it is through.

    python tests/kill_points.py SEED KILLS GOAL WHOLE COMMAND…

GOAL: what the command makes; WHOLE: the same from an uninterrupted run, made first. A child dies before or after a
call, as by kill -9, or as by a power loss: then what was not flushed is lost, that is, the file whose fsync it was
about to call is cut at a random place, and a rename whose folder was not flushed is undone. Prints the seed and one
line for every finished round; exits with 1 if bytes differ.
"""

import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

CALLS = ("fsync", "replace", "unlink", "mkdir", "rmdir")


class Killer:
    """Counts calls, and dies at number `at`."""

    def __init__(self, at: int | None, generator: random.Random) -> None:
        self.at, self.generator, self.count = at, generator, 0
        self.renamed: list[tuple[str, str]] = []  # to names that did not exist, in folders not flushed since
        for name in CALLS:
            setattr(os, name, self.wrapped(name, getattr(os, name)))

    def wrapped(self, name: str, original: Callable) -> Callable:
        def call(*arguments, **keywords):
            self.count += 1
            dies, before = self.count == self.at, self.generator.random() < 0.5
            if dies and before:
                self.die(name, arguments)
            new = name == "replace" and not os.path.lexists(arguments[1])
            result = original(*arguments, **keywords)
            if new:
                self.renamed.append((os.fspath(arguments[0]), os.fspath(arguments[1])))
            elif name == "fsync":
                self.flushed(arguments[0])
            if dies:
                self.die("", ())
            return result

        return call

    def flushed(self, descriptor: int) -> None:
        folder = os.readlink(f"/proc/self/fd/{descriptor}")
        self.renamed = [pair for pair in self.renamed if os.path.dirname(os.path.abspath(pair[1])) != folder]

    def die(self, name: str, arguments: tuple) -> None:
        if self.generator.random() < 0.5:  # the power is lost
            file = os.readlink(f"/proc/self/fd/{arguments[0]}") if name == "fsync" else ""
            if os.path.isfile(file):
                os.truncate(file, self.generator.randint(0, os.path.getsize(file)))
            for source, target in reversed(self.renamed):
                if os.path.lexists(target) and not os.path.lexists(source):
                    os.rename(target, source)
        os._exit(77)


def child(command: list[str], at: int | None, seed: int, calls: Path | None = None) -> int:
    """Runs a command in a process of its own; its exit status, 77 if it was killed."""
    process = os.fork()
    if process == 0:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        killer = Killer(at, random.Random(seed))
        from alphaprune.cli import main

        status = main(command)
        if calls is not None:
            calls.write_text(str(killer.count))
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def content(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(path.iterdir())
    return {"" if file == path else file.name: file.read_bytes() for file in files}


def differing(goal: Path, wanted: dict[str, bytes]) -> str:
    """What files differ, and where the first one does."""
    found = content(goal) if goal.exists() else {}
    names = sorted(name for name in {**found, **wanted} if found.get(name) != wanted.get(name))
    if not names:
        return "no file"
    one, other = (files.get(names[0], b"") for files in (wanted, found))
    at = next((i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), len(one))
    begin = max(0, at - 60)
    return (
        f"{names}, in the first of {len(one)} and {len(other)} bytes: {one[begin : at + 60]} {other[begin : at + 60]}"
    )


def main() -> int:
    seed, kills = int(sys.argv[1]), int(sys.argv[2])
    goal, whole, command = Path(sys.argv[3]), Path(sys.argv[4]), sys.argv[5:]
    import torch

    import alphaprune.commands.analyze
    import alphaprune.commands.compress
    import alphaprune.commands.convert
    import alphaprune.commands.prune
    import alphaprune.commands.recover
    import alphaprune.hf  # children take over what is imported

    if command[0] == "recover":
        import alphaprune.masked_lora  # noqa: F401

    torch.set_num_threads(1)
    print(f"seed {seed}")
    generator, calls = random.Random(seed), whole.with_name("calls")
    outputs = [str(whole) if word == str(goal) else word for word in command]
    if child(outputs, None, 0, calls):
        return 1
    wanted, total = content(whole), int(calls.read_text())
    done = rounds = 0
    while done < kills:
        killed: list[int] = []
        while (status := child(command, at := generator.randint(1, total), generator.randrange(1 << 30))) == 77:
            killed.append(at)
            if len(killed) >= 6:  # so that rounds end
                status = child(command, None, 0)
                break
        done, rounds = done + len(killed), rounds + 1
        same = goal.exists() and content(goal) == wanted
        if killed and status == 2 and same:
            status = 0  # the run had ended but for its exit status: the next one is told that its result is there
        if status or not same:
            what = differing(goal, wanted)
            print(f"after kills at calls {killed} of {total}: status {status}, other bytes in {what}")
            return 1
        left = [file.name for file in goal.parent.iterdir() if file.name.startswith(f"{goal.name}.")]
        if left:
            print(f"after kills at calls {killed} of {total}: {left} left over")
            return 1
        print(f"killed at calls {killed} of {total}: the same bytes")
        shutil.rmtree(goal) if goal.is_dir() else goal.unlink()
    print(f"{done} kills in {rounds} rounds")
    return 0


if __name__ == "__main__":
    sys.exit(main())
