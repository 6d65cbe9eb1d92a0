"""The text of the demo: the running interpreter's own standard library.

Real text that is on every machine that can run this package: every `*.py` file of the standard library and
every documentation topic of `pydoc`. A document belongs to one of three splits by a hash of its path, so that
another Python version moves no file from one split to another.
"""

import hashlib
import os
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SPLITS = {"held-out": range(0, 4), "calibration": range(4, 8), "train": range(8, 100)}  # percent of the paths
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "node_modules"}
END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Corpus:
    """One split: the texts in order of their paths, and what is needed to name it in a result."""

    split: str
    documents: tuple[tuple[str, str], ...]  # (path, text)
    python: str
    sha256: str

    @property
    def text(self) -> str:
        return END_OF_TEXT.join(text for _, text in self.documents)


def split_of(path: str) -> str:
    """The split that a document belongs to; depends on nothing but its path."""
    percent = int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") % 100
    return next(name for name, share in SPLITS.items() if percent in share)


def load(split: str) -> Corpus:
    """All documents of `split` ("train", "calibration" or "held-out") of the running interpreter."""
    if split not in SPLITS:
        raise ValueError(f"no split is called {split!r}; there are {', '.join(SPLITS)}")
    documents = tuple(sorted((p, t) for p, t in _documents() if split_of(p) == split))
    digest = hashlib.sha256()
    for path, text in documents:
        digest.update(path.encode() + b"\0" + text.encode() + b"\0")
    return Corpus(split, documents, platform.python_version(), digest.hexdigest())


def _documents() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in SKIPPED_FOLDERS)
        for name in sorted(files):
            path = Path(folder, name)
            key = path.relative_to(root).as_posix()
            if not name.endswith(".py") or key == "pydoc_data/topics.py":  # the topics come as text, below
                continue
            try:
                text = path.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):  # the codec tests hold files in other encodings, on purpose
                continue
            if text.strip():
                yield key, text
    from pydoc_data.topics import topics

    for topic, text in topics.items():
        yield f"pydoc_data/topics/{topic}", text
