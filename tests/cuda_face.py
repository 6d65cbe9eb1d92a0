"""One CUDA kernel compiled with g++ and run thread by thread on tensors of the host, inputs and output under guard."""

import ctypes
import faulthandler
import mmap
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # csrc/layout.h
ORDERS = (0, 1, 2)  # forwards, backwards, warps apart
GUARD = 0xA5

_regions: list[mmap.mmap] = []  # never unmapped while tests run


def build(name: str, folder: Path, changes: dict[str, str] | None = None, optimize: str = "-O1") -> ctypes.CDLL:
    """tests/native/NAME_face.cpp as a library; changes: text of csrc/cuda/*.cuh that is replaced before compiling."""
    source, others = (
        folder / "csrc",
        ["cpu", "sbt_mma*", "sbt_expand*", "sbt_wgmma*" if name == "nm" else "nm_*"],
    )
    shutil.copytree(ROOT / "csrc", source, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*others))
    for old, new in (changes or {}).items():
        files = [file for file in (source / "cuda").glob("*.cuh") if old in file.read_text()]
        assert len(files) == 1 and files[0].read_text().count(old) == 1, f"{old!r} is not once in csrc/cuda"
        files[0].write_text(files[0].read_text().replace(old, new))
    library = folder / f"{name}.so"
    face = ROOT / "tests" / "native" / f"{name}_face.cpp"
    command = ["g++", "-std=c++17", optimize, "-fPIC", "-shared", "-Wall", f"-I{source / 'cuda'}", face, "-o", library]
    subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)
    return ctypes.CDLL(str(library))


@dataclass
class Guarded:
    """Bytes that end, rounded to 16, at a page that nobody may touch; those before them are known."""

    region: mmap.mmap
    tensor: Tensor
    before: int

    def intact(self) -> bool:
        """Whether the bytes before and the padding behind are as they were."""
        padding = -self.tensor.nbytes % 16
        page = mmap.PAGESIZE
        end = len(self.region) - page
        return set(self.region[: self.before]) | set(self.region[end - padding : end]) <= {GUARD}

    @property
    def address(self) -> int:
        return self.tensor.data_ptr()


def guard(tensor: Tensor, shift: int = 0) -> Guarded:
    """A copy under guard, aligned to 16 bytes, or `shift` bytes before that."""
    page, size = mmap.PAGESIZE, tensor.nbytes + -tensor.nbytes % 16 + shift
    length = -(-max(size, 1) // page) * page
    region = mmap.mmap(-1, length + page)
    region[:length] = bytes([GUARD]) * length
    _regions.append(region)
    address = ctypes.addressof(ctypes.c_char.from_buffer(region))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + length), ctypes.c_size_t(page), 0) == 0
    if not tensor.nbytes:
        return Guarded(region, tensor, length)
    raw = torch.frombuffer(region, dtype=torch.uint8, count=tensor.nbytes, offset=length - size)
    copy = raw.view(tensor.dtype).view(tensor.shape).copy_(tensor)
    return Guarded(region, copy, length - size)


def run(function, weight: list[Tensor], counts: list[int], x: Tensor, rows: int, **options) -> tuple[str, Tensor]:
    """(what the emulator says, y [tokens, rows]); options: bias, residual, order, shift (bytes that x is off 16)."""
    function.restype = ctypes.c_char_p
    bias, residual = options.get("bias"), options.get("residual")
    held = [guard(tensor.contiguous()) for tensor in weight]  # without elements: null
    given = guard(x, options.get("shift", 0))
    extra = [None if tensor is None else guard(tensor) for tensor in (bias, residual)]
    y = guard(torch.full((len(x), rows), float("nan"), dtype=x.dtype))
    codes = [len(x), DTYPES[x.dtype], DTYPES[x.dtype if bias is None else bias.dtype]]
    text = function(
        (ctypes.c_void_p * len(held))(*(part.address if part.tensor.numel() else None for part in held)),
        (ctypes.c_int64 * (len(counts) + 3))(*counts, *codes),
        ctypes.c_void_p(given.address),
        *(None if part is None else ctypes.c_void_p(part.address) for part in extra),
        ctypes.c_void_p(y.address),
        options.get("order", 0),
    ).decode()
    assert y.intact(), "bytes around y were written"
    out = y.tensor.clone()
    for part in (*held, given, *extra, y):
        if part is not None:
            _regions.remove(part.region)
    return text, out


def fails(test: Callable[[], None]) -> bool:
    """Whether `test`, in a process of its own, fails: by an assertion or at a guard page. It must end in 5 minutes."""
    return complaint(test) is not None


def complaint(test: Callable[[], None]) -> str | None:
    """As `fails`: what the failure says, `signal 11` at a guard page; None without one."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        signal.alarm(300)
        torch.set_num_threads(1)  # the threads of the parent's pool are not here
        code = 1
        try:
            test()
            code = 0
        except BaseException as error:
            os.write(writer, f"{type(error).__name__}: {error}".encode()[:4000])
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader, "rb") as said:
        text = said.read().decode()
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) != signal.SIGALRM, "the test did not end"
        return f"signal {os.WTERMSIG(status)}"
    return text if status else None
