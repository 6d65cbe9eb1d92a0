"""What a run has finished so far, in a file beside its goal: the next run takes it from there.

One JSON object per line, the first of which says what run this is. A line is on the disk before its work counts as
done; the last one may be cut off by a crash, and is then no line. Of several processes each writes a file of its own
and reads all that it sees.
"""

import glob
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alphaprune import ranks
from alphaprune.files import atomic_write_text, explained, is_refusal


class Journal:
    """Values by key. `known` holds what was there at the start, the same on every process."""

    def __init__(self, goal: "str | Path | None", identity: Mapping[str, Any]) -> None:
        """goal: the file that the run is to make; None keeps no file. Journals of another identity are of no use."""
        self.goal = None if goal is None else Path(goal)
        self.identity = json.loads(json.dumps(dict(identity)))
        self.entries: dict[str, Any] = {}
        for found in ranks.gather(self._read()):
            self.entries |= found
        self.known, self._handle = dict(self.entries), None
        if self.goal is not None:
            lines = [{"identity": self.identity}, *({"key": k, "value": v} for k, v in self.entries.items())]
            self._own = self.goal.with_name(f"{self.goal.name}.started-{ranks.world().rank}")
            atomic_write_text(self._own, "".join(json.dumps(line) + "\n" for line in lines))
            self._handle = self._own.open("ab", buffering=0)  # or closing it would fail once more on a full disk

    def add(self, key: str, value: Any) -> None:
        """Keeps a value for good; ValueError in one sentence if the disk is full."""
        self.entries[key] = value
        if self._handle is not None:
            with explained(self.goal):
                line = memoryview(json.dumps({"key": key, "value": value}).encode() + b"\n")
                while line:  # a disk that is nearly full takes a part
                    line = line[self._handle.write(line) :]
                os.fsync(self._handle.fileno())

    def all(self) -> dict[str, Any]:
        """The entries of all processes."""
        found: dict[str, Any] = {}
        for entries in ranks.gather(self.entries):
            found |= entries
        return found

    def close(self) -> None:
        if self._handle is not None:
            self._handle.close()

    def stop(self, error: BaseException) -> None:
        """Ends a run by an error; one that is refused leaves no file of this process, unless it went on from one."""
        self.close()
        if self.goal is not None and not self.known and is_refusal(error):
            self._own.unlink(missing_ok=True)

    def delete(self) -> None:
        """Removes the files; to be called when the goal is there."""
        self.close()
        ranks.gather(None)  # every process has what it needs
        if self.goal is not None:
            delete(self.goal)

    def _read(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for file in _files(self.goal) if self.goal is not None else ():
            lines = []
            for text in file.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    lines.append(json.loads(text))
                except ValueError:  # cut off
                    break
            if lines and lines[0] == {"identity": self.identity}:
                found |= {line["key"]: line["value"] for line in lines[1:]}
        return found


def delete(goal: Path) -> None:
    """Removes the journals of a goal, if there are any."""
    for file in _files(goal):
        file.unlink(missing_ok=True)


def _files(goal: Path) -> list[Path]:
    return sorted(goal.parent.glob(f"{glob.escape(goal.name)}.started-*"))
