"""Safetensors files of a folder: checked headers, lazy tensors, and a writer that aligns every tensor.

Layout of a file (https://github.com/huggingface/safetensors#format): u64 length of the header, JSON header, data.
safetensors aligns only to 8 bytes; this writer pads the header with spaces and orders tensors so that each starts on
64 bytes, which the format allows and kernels that run on the mapped file like.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from alphaprune.files import fsync_folder

AGAIN = "repeat the command when nothing writes there any more"
ALIGNMENT = 64  # bytes: one cache line, one AVX-512 register
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
    # No weight of a layer that is pruned may be of these; what is beside them is copied as it is.
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
}
BY_CODE = {code: name for name, code in DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def read_header(file: Path) -> dict[str, dict]:
    """Tensor name → {dtype, shape, data_offsets}, after checking that the file is as long as its header says.

    Raises ValueError in one sentence if the file is missing, truncated or no safetensors file.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if size < 8 or length > size - 8:
                raise ValueError(f"{file}: truncated, or no safetensors file ({size} bytes); copy it again")
            header = json.loads(handle.read(length), object_pairs_hook=partial(_once, file))
        header.pop("__metadata__", None)
        end = 0
        for first, last, nbytes in sorted((*entry["data_offsets"], _nbytes(entry)) for entry in header.values()):
            if first != end or last - first != nbytes:
                raise ValueError(f"{file}: its header has tensors with holes between or other sizes; copy it again")
            end = last
    except FileNotFoundError as error:
        raise ValueError(f"{file}: missing, although the index or config names it") from error
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{file}: its safetensors header cannot be read; copy the file again") from error
    if size != 8 + length + end:
        raise ValueError(f"{file}: has {size} bytes, its header describes {8 + length + end}; copy it again")
    return header


def _once(file: Path, pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object; ValueError if a name stands in it twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"{file}: names {twice} twice, so which values count is not said; copy or write it again")
    return found


def _nbytes(entry: dict) -> int:
    """The bytes that a tensor of this header takes; of a dtype that is not known here those that it says."""
    first, last = entry["data_offsets"]
    name, count = BY_CODE.get(entry["dtype"]), math.prod(entry["shape"])
    return last - first if name is None else count * getattr(torch, name).itemsize


class Shards:
    """All tensors of a folder, by name; nothing is read until it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._headers: dict[str, dict[str, dict]] = {}
        self._file_of: dict[str, str] = {}
        self._stamps: dict[str, tuple[int, ...]] = {}
        index = read_index(folder)
        for file in checkpoint_files(folder):
            place = str(file.relative_to(folder))
            self._headers[place] = read_header(file)
            self._stamps[place] = _stamp(file)
            for name in self._headers[place]:
                if name in self._file_of:
                    raise ValueError(f"{folder}: {name} is in both {self._file_of[name]} and {place}")
                self._file_of[name] = place
        for name, named in index.items():
            if (found := self._file_of.get(name, named)) != named:
                raise ValueError(f"{folder / INDEX}: says that {name} is in {named}, it is in {found}; copy both again")

    def names(self) -> list[str]:
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entry(name)["shape"])

    def dtype(self, name: str) -> str:
        code = self._entry(name)["dtype"]
        return BY_CODE.get(code, code)

    def tensor(self, name: str) -> Tensor:
        """The values, mapped from the file."""
        with self._open(name) as file:
            return file.get_tensor(name)

    def loaded(self, name: str) -> Tensor:
        """The values, read into memory.

        Whoever computes with a mapped file while another program cuts it off is ended by a signal; a read says so.
        """
        entry, file = self._entry(name), self.folder / self._file_of[name]
        first, last = entry["data_offsets"]
        data = torch.empty(last - first, dtype=torch.uint8)
        view, done = memoryview(data.numpy()), 0
        with file.open("rb", buffering=0) as handle:
            handle.seek(8 + int.from_bytes(handle.read(8), "little") + first)
            while done < len(view):  # one call reads 2 GB at most
                count = handle.readinto(view[done:])
                if not count:
                    raise ValueError(f"{file}: was cut off while it was read; {AGAIN}")
                done += count
        return data.view(getattr(torch, BY_CODE[entry["dtype"]])).reshape(entry["shape"])

    def stamps(self) -> dict[str, list[int]]:
        """Of every file its bytes and when it was written, in nanoseconds: by which a later run knows it again."""
        return {place: list(stamp[:2]) for place, stamp in self._stamps.items()}

    def rows(self, name: str, rows: list[int]) -> Tensor:
        """Some rows of a matrix; the rest is not read."""
        with self._open(name) as file:
            view = file.get_slice(name)
            return torch.stack([view[row : row + 1][0] for row in rows])

    def check_unchanged(self) -> None:
        """ValueError naming the first file that is another one than when this was made: by size, time or place."""
        for name, stamp in self._stamps.items():
            file = self.folder / name
            if not file.is_file():
                raise ValueError(f"{file}: was removed while it was read; put it back and repeat the command")
            if _stamp(file) != stamp:
                raise ValueError(
                    f"{file}: was changed while it was read, so a part of it would be of another model; {AGAIN}"
                )

    def part(self, name: str, index: int, rows: slice) -> Tensor:
        """Rows of one matrix of a stack [B, N, K]; the rest is not read."""
        with self._open(name) as file:
            return file.get_slice(name)[index : index + 1, rows][0]

    def _entry(self, name: str) -> dict:
        if name not in self._file_of:
            raise ValueError(f"{self.folder}: no tensor {name} in its safetensors files, though config.json needs it")
        return self._headers[self._file_of[name]][name]

    def _open(self, name: str):
        self._entry(name)
        return open_file(self.folder / self._file_of[name])


def _stamp(file: Path) -> tuple[int, ...]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino


def open_file(file: Path):
    """A safetensors file opened for lazy reading; ValueError naming it if that fails."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: cannot be read as safetensors ({error}); copy it again") from error


def read_index(folder: Path) -> dict[str, str]:
    """Tensor → file, of the index of a folder, {} where it has none; ValueError if a tensor stands there twice."""
    index = folder / INDEX
    if not index.is_file():
        return {}
    try:
        found = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=partial(_once, index))["weight_map"]
        return {name: str(Path(file)) for name, file in found.items()}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: is no index of safetensors files; copy it again") from error


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in the order of the index; ValueError if there is none."""
    if (folder / INDEX).is_file():
        return [folder / name for name in dict.fromkeys(read_index(folder).values())]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if any(folder.glob("*.bin")):
        raise ValueError(f"{folder}: only pickled weights (*.bin) here; save the model with safe_serialization=True")
    raise ValueError(f"{folder}: no safetensors file in it (wanted {SINGLE} or {INDEX})")


def write(file: Path, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
    """Writes one safetensors file whose tensors start on 64 bytes; returns the bytes of each.

    The file appears whole or not at all: written beside, flushed to the disk, renamed.
    """
    # largest alignment need first is not enough: a tensor whose size is no multiple of 64 would shift all after it,
    # and the format allows no holes, so those go to the end.
    ordered = sorted(tensors, key=lambda item: item[1].nbytes % ALIGNMENT != 0)
    header, place = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in ordered:
        end = place + tensor.nbytes
        header[name] = {
            "dtype": DTYPES[dtype_name(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [place, end],
        }
        place = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    beside = file.with_name(file.name + ".part")
    try:
        with beside.open("wb") as handle:
            handle.write(len(text).to_bytes(8, "little") + text)
            for _, tensor in ordered:
                flat = tensor.detach().to("cpu").contiguous().reshape(-1)
                handle.write(memoryview(flat.view(torch.uint8).numpy()))
            handle.flush()
            os.fsync(handle.fileno())
        beside.replace(file)
        fsync_folder(file.parent)
    except OSError:  # a full disk: what is of no use gives its place back
        beside.unlink(missing_ok=True)
        raise
    return {name: tensor.nbytes for name, tensor in ordered}
