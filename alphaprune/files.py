"""Files that appear whole or not at all, and errors in one line."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NO_FILE = "is no regular file; name another"  # but a pipe or a device, which would be replaced


def atomic_write_text(path: "str | Path", text: str) -> None:
    """`atomic_write` of `text` as UTF-8."""
    atomic_write(path, text.encode())


def atomic_write(path: "str | Path", content: bytes) -> None:
    """Writes a file beside `path`, flushes it to the disk, and renames it into place.

    A link stays one: the file that it names is replaced.   Raises ValueError in one sentence if the disk is full, or
    the place is not writable or no place for a file, as a device is; `path` is then as it was.
    """
    path = Path(path)
    target = path.resolve()
    if target.exists() and not (target.is_file() or target.is_dir()):
        raise ValueError(f"{path}: not written: {NO_FILE}")
    beside = target.with_name(target.name + ".part")
    try:
        with beside.open("wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        beside.replace(target)
        fsync_folder(target.parent)
    except OSError as error:
        beside.unlink(missing_ok=True)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full; free some space and repeat" if full else error.strerror or str(error)
        raise ValueError(f"{path}: not written: {reason}") from error


@contextmanager
def explained(out: Path) -> Iterator[None]:
    """Turns a full or read-only disk into one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = "the disk is full; free some space and repeat the command: finished blocks are kept"
            raise ValueError(f"{out}: not written, {free}") from error
        raise ValueError(f"{out}: cannot be written: {error.strerror or error}") from error


def is_refusal(error: BaseException) -> bool:
    """Whether the same command would be refused again, so that nobody has use for what it had finished.

    Not so with a full disk, too little memory, the end of another process, or something in the place of the output.
    """
    return isinstance(error, ValueError) and not isinstance(error.__cause__, OSError | MemoryError | RuntimeError)


def first_line(error: Exception) -> str:
    """What an error says, in one line; its type if it says nothing."""
    if isinstance(error, KeyError) and len(error.args) == 1 and " " not in str(error.args[0]):
        return f"there is no {error}"  # it says the key alone
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def fsync_folder(folder: "str | Path") -> None:
    """Makes renames in `folder` survive a power loss."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
