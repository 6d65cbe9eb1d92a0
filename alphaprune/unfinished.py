"""Output folders that appear whole or not at all: finished blocks in, a Hugging Face folder out.

While a run is under way everything lies in `OUT.part` beside the goal: one safetensors file per finished block and a
journal that names the run. Only a complete folder is renamed to OUT. A run that was interrupted finds its journal,
refuses to go on if it is not the same run, and skips the blocks that are done. For the moment of the renaming the
journal lies beside both, as `OUT.journal`, so that an interruption there costs nothing either. A run that is refused
leaves nothing: what it has would be of use to the same run alone, which would be refused again. One run at a time
writes there.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from alphaprune import __version__, shards
from alphaprune.files import atomic_write_text, explained, fsync_folder, is_refusal
from alphaprune.formats.quantize import Error

RECIPE = "alphaprune.json"  # how the directory was made
JOURNAL = "journal.json"
LOCK = "lock.part"
FILES = "files"  # in the identity of a run: what its model's files are known by


@dataclass(frozen=True)
class Written:
    """What a directory holds: bytes of the prunable layers, dense and as stored; how many of them are packed.

    errors: of the layers that were rounded to int8, what that lost.
    """

    folder: Path
    dense_bytes: int
    stored_bytes: int
    packed_layers: int
    layers: int
    errors: dict[str, Error] = field(default_factory=dict)


def identified(identity: dict[str, Any], stamps: dict[str, list[int]]) -> dict[str, Any]:
    """The identity of a run with what belongs to that of all: the files of its model, and the code."""
    return {**identity, FILES: stamps, "version": __version__}


class Writer:
    """Builds one output directory, block by block."""

    def __init__(
        self, out: "str | Path", identity: dict[str, Any], blocks: int, stored_name: Callable[[str], str] = str
    ) -> None:
        """identity: what makes this run this run; a started OUT.part with another identity is refused.

        stored_name: what a tensor of the module is called in files.
        """
        self.out, self.identity, self.total, self.stored_name = Path(out), identity, blocks + 1, stored_name
        self.work, self.beside = place(self.out), journal_beside(self.out)
        self.done: dict[str, dict[str, int]] = {}  # file → {tensor: bytes}
        self.errors: dict[str, Error] = {}  # layer → what rounding it to int8 lost
        self.stage = "blocks"  # then "finishing", when only the last files and the name are missing, then "finished"
        check_free(self.out)
        with explained(self.out):
            if self.beside.exists() and not (self.work.exists() or any_in(self.out)):
                self.beside.unlink()  # somebody has taken the result away
            journal = self.beside if self.beside.exists() else self.work / JOURNAL
            if journal.exists() and not self.work.exists():
                self._continue(_read(journal))
                self.stage = "finished"
                self.beside.unlink()
                return
            self.work.mkdir(parents=True, exist_ok=True)
            self._held = hold(self.work / LOCK)
            if journal.exists():
                self._continue(_read(journal))
                return
            if others := [f.name for f in sorted(self.work.iterdir()) if not _is_own(f.name)]:
                raise ValueError(
                    f"{self.work}: holds {others[0]}, which is of no interrupted run; move the folder away, or name "
                    f"another output"
                )
            fsync_folder(self.out.parent)
            self._remember()

    def file(self, index: int) -> str:
        return f"model-{index + 1:05d}-of-{self.total:05d}.safetensors"

    def has(self, index: int) -> bool:
        return self.file(index) in self.done

    def write(self, index: int, tensors: dict[str, Tensor], errors: dict[str, Error] | None = None) -> None:
        """Stores the tensors of block `index` (block count: what is outside the blocks), durably."""
        with explained(self.out):
            named = [(self.stored_name(name), tensor) for name, tensor in tensors.items()]
            self.done[self.file(index)] = shards.write(self.work / self.file(index), named)
            self.errors |= errors or {}
            self._remember()

    def losses(self) -> dict[str, Any]:
        """What the recipe says of layers that were rounded to int8."""
        return {"quantization_error": {name: e._asdict() for name, e in self.errors.items()}} if self.errors else {}

    def finish(self, config: dict[str, Any], recipe: dict[str, Any], companions: Callable[[Path], None]) -> None:
        """Index, config and recipe; then the folder gets its name."""
        sizes = {name: size for tensors in self.done.values() for name, size in tensors.items()}
        weight_map = {name: file for file in sorted(self.done) for name in self.done[file]}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        with explained(self.out):
            self.stage = "finishing"
            self._remember()
            companions(self.work)
            atomic_write_text(self.work / shards.INDEX, json.dumps(index, indent=2) + "\n")
            atomic_write_text(self.work / "config.json", json.dumps(config, indent=2) + "\n")
            atomic_write_text(self.work / RECIPE, json.dumps(recipe, indent=2) + "\n")
            for leftover in [file for file in self.work.iterdir() if _is_own(file.name)]:
                leftover.unlink()
            for file in self.work.iterdir():
                if file.name not in (*self.done, JOURNAL):  # these were flushed when they were written
                    _fsync(file)
            check_free(self.out)
            os.replace(self.work / JOURNAL, self.beside)
            fsync_folder(self.work)
            fsync_folder(self.out.parent)
            os.replace(self.work, self.out)
            fsync_folder(self.out.parent)
            self.beside.unlink()
            fsync_folder(self.out.parent)

    def _continue(self, journal: dict[str, Any]) -> None:
        for key in {**journal["identity"], **self.identity}:
            before, now = journal["identity"].get(key), self.identity.get(key)
            if before != now and not self.work.exists():
                raise ValueError(f"{self.out}: this folder exists and is not empty; name another, or delete it")
            if before != now and key == FILES and before is not None:
                files = now or {}  # of a model without files now
                changed = next(name for name in {**before, **files} if before.get(name) != files.get(name))
                raise ValueError(
                    f"{self.work}: an interrupted run lies here, and {changed} of the model was written since it "
                    f"began; delete the folder to start anew"
                )
            if before != now:
                raise ValueError(
                    f"{self.work}: an interrupted run with another {key} lies here "
                    f"({_short(before)}, now {_short(now)}); "
                    f"repeat it as it was to finish it, or delete the folder to start anew"
                )
        where = self.work if self.work.exists() else self.out
        self.done = {file: sizes for file, sizes in journal["done"].items() if _is_whole(where / file, sizes)}
        self.stage = journal.get("stage", "blocks") if len(self.done) == len(journal["done"]) else "blocks"
        self.errors = {name: Error(*error) for name, error in journal.get("errors", {}).items()}

    def _remember(self) -> None:
        journal = {"identity": self.identity, "done": self.done, "errors": self.errors, "stage": self.stage}
        atomic_write_text(self.work / JOURNAL, json.dumps(journal, indent=1) + "\n")


def hold(file: Path) -> Any:
    """Keeps a file locked for as long as what is returned lives, or this process; ValueError if another one has it."""
    handle = file.open("w")
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise ValueError(f"{file.parent}: another run is writing there now; wait for it, or name another") from error
    except OSError:  # a file system without locks
        pass
    return handle


def _read(journal: Path) -> dict[str, Any]:
    """The journal of an interrupted run; ValueError if it cannot be one."""
    try:
        found = json.loads(journal.read_text(encoding="utf-8"))
        if isinstance(found["identity"], dict) and isinstance(found["done"], dict):
            return found
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{journal}: is no journal of an interrupted run, or damaged; delete it with its folder")


def _is_own(name: str) -> bool:
    """Whether a file is of a run that was killed while writing, or what runs keep in their folder until the end."""
    return name.endswith(".part") or ".started-" in name


def _is_whole(file: Path, sizes: dict[str, int]) -> bool:
    """Whether a finished file has the tensors that the journal says."""
    try:
        found = shards.read_header(file)
    except (ValueError, OSError):
        return False
    return {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in found.items()} == sizes


def place(out: "str | Path") -> Path:
    """Where the directory `out` lies until it is whole; files in it that end in .part never become part of it."""
    return Path(out).with_name(Path(out).name + ".part")


@contextmanager
def nothing_left(out: "str | Path") -> Iterator[None]:
    """What is refused inside (files.is_refusal) leaves no OUT.part that was not there before."""
    work = place(out)
    new = not work.exists()
    try:
        yield
    except ValueError as error:
        if new and is_refusal(error):
            shutil.rmtree(work, ignore_errors=True)
        raise


def check_free(out: Path) -> None:
    """ValueError if there is something at `out` that writing there would overwrite, or it has no name."""
    if out.name in ("", ".."):
        raise ValueError(f"{out}: name a folder that does not exist yet")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        kind = "link" if out.is_symlink() else "file"  # a folder cannot be renamed to either
        raise ValueError(f"{out}: is a {kind}; name a folder that does not exist yet") from FileExistsError(str(out))
    if any_in(out) and not journal_beside(out).is_file():
        reason = "this folder exists and is not empty; name another, or delete it"
        raise ValueError(f"{out}: {reason}") from FileExistsError(str(out))


def any_in(folder: Path) -> bool:
    """Whether there is such a folder with something in it."""
    return folder.is_dir() and any(folder.iterdir())


def journal_beside(out: Path) -> Path:
    """Where the journal lies while the folder gets its name."""
    return out.with_name(out.name + ".journal")


def _fsync(file: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:21] + "…"
