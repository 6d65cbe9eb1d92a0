"""Eigenvalues of many symmetric matrices at once on a GPU, from the cuSOLVER library that torch works with.

torch before 2.12 solves matrices larger than 32 one after another (PyTorch #175403), and every torch hands a batch over
as a whole, whatever memory its workspace takes. `cusolverDnXsyevBatched` is in cuSOLVER from 11.7.1 on (CUDA 12.6.2).
Its interface: https://docs.nvidia.com/cuda/cusolver/index.html#cusolverdnxsyevbatched
"""

import ctypes
import functools
import importlib.util
import logging
import threading
from collections.abc import Callable, Iterator
from ctypes import POINTER, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from alphaprune import hardware, memory, tridiagonal
from alphaprune.tridiagonal import Unusable

# "batched": cusolverDnXsyevBatched. "looped": cusolverDnXsyevd for one matrix after another. "torch": torch.linalg.
# "tridiagonal": no library at all, see there.
Route = Literal["batched", "looped", "torch", "tridiagonal"]

LARGEST = 46340  # the solvers refuse matrices of more than 2³¹ − 1 entries
# (largest n, fewest matrices, route), by dtype: the first row that n and the number of matrices fit is the fastest way
# to them. bench/spectrum_gpu.py prints the rows to write here. Measured were one and seven matrices of 4096 rows; that
# three are enough follows from their times. Smaller sizes were NOT MEASURED by us: PyTorch
# #175403 and #175585 report the batched one as the fastest, or within 0.05 ms of it, wherever they looked.
FASTEST: dict[torch.dtype, tuple[tuple[int, int, Route], ...]] = {
    dtype: ((2048, 1, "batched"), (tridiagonal.LARGEST, 3, "tridiagonal"), (LARGEST, 1, "looped"))
    for dtype in (torch.float32, torch.float64)
}
MEASURED_ON = "NVIDIA H200"

SOLVERS = {"batched": "cusolverDnXsyevBatched", "looped": "cusolverDnXsyevd"}
KINDS = {torch.float32: 0, torch.float64: 1}  # CUDA_R_32F, CUDA_R_64F
NO_VECTORS = 0  # CUSOLVER_EIG_MODE_NOVECTOR
UPPER = 1  # CUBLAS_FILL_MODE_UPPER. cuSOLVER's matrices lie by columns: torch's lower triangle is its upper one
MOST_BYTES = 2**31 - 1  # of the matrices of one call; documented for entries, JAX keeps it for bytes (jax #33233)
MOST_MATRICES = 1 << 14  # of one call; some versions refuse more than 32 thousand (mjlab #732)
SHARE = 0.8  # of the free memory that a call may take: it is in pieces

_SHAPE = (c_void_p, c_void_p, c_int, c_int, c_int64, c_int, c_void_p, c_int64, c_int, c_void_p, c_int)
_SIZES = (POINTER(c_size_t), POINTER(c_size_t))
_WORK = (c_void_p, c_size_t, c_void_p, c_size_t, c_void_p)
SIGNATURES = {
    "cusolverDnCreate": (POINTER(c_void_p),),
    "cusolverDnSetStream": (c_void_p, c_void_p),
    "cusolverDnCreateParams": (POINTER(c_void_p),),
    "cusolverDnXsyevd_bufferSize": (*_SHAPE, *_SIZES),
    "cusolverDnXsyevd": (*_SHAPE, *_WORK),
    "cusolverDnXsyevBatched_bufferSize": (*_SHAPE, *_SIZES, c_int64),
    "cusolverDnXsyevBatched": (*_SHAPE, *_WORK, c_int64),
}
STATUS = {
    1: "not initialized",
    2: "allocation failed",
    3: "invalid value",
    4: "architecture mismatch",
    6: "execution failed",
    7: "internal error",
    9: "not supported",
    31: "invalid workspace",
}

log = logging.getLogger("alphaprune")


class Library:
    """The functions of one libcusolver; Unusable if the file cannot be loaded or is too old."""

    def __init__(self, path: str) -> None:
        try:
            self._functions = ctypes.CDLL(path)
        except OSError as error:
            raise Unusable(f"{path} cannot be loaded: {error}") from error
        for name, types in SIGNATURES.items():
            if not hasattr(self._functions, name):
                raise Unusable(f"{path} has no {name}: it is {self._version()}, wanted 11.7.1 (CUDA 12.6.2) or newer")
            function = getattr(self._functions, name)
            function.argtypes, function.restype = types, c_int

    def call(self, name: str, *arguments: object) -> None:
        """Calls one function; Unusable if its status is not success."""
        if status := getattr(self._functions, name)(*arguments):
            raise Unusable(f"{name} returned {status} ({STATUS.get(status, 'see cusolverStatus_t')})")

    def _version(self) -> str:
        found = c_int(0)
        ask = getattr(self._functions, "cusolverGetVersion", None)
        if ask is None or ask(ctypes.byref(found)):
            return "of an unknown version"
        return f"{found.value // 1000}.{found.value // 100 % 10}.{found.value % 100}"


class Solver:
    """A cuSOLVER handle on one device, for the life of the process.

    free() -> bytes of memory that may be taken there; stream() -> the address of its current stream.
    """

    def __init__(self, library: Library, free: Callable[[], int], stream: Callable[[], int]) -> None:
        self._library, self._free, self._stream = library, free, stream
        self._handle, self._params = c_void_p(), c_void_p()
        self._lock = threading.Lock()  # a handle has one stream at a time
        library.call("cusolverDnCreate", ctypes.byref(self._handle))
        library.call("cusolverDnCreateParams", ctypes.byref(self._params))

    def eigenvalues(self, gram: Tensor, route: Route = "batched") -> tuple[Tensor, list[int]]:
        """Eigenvalues [b, n], ascending, of gram [b, n, n] by its lower triangles, and cuSOLVER's `info` of each: 0 if
        they were found. gram is not changed.

        Unusable if cuSOLVER refuses the call or not even one matrix and its workspace fit into the free memory.
        """
        batch, n, _ = gram.shape
        values = gram.new_full((batch, n), float("nan"))
        info = torch.full((batch,), -1, dtype=torch.int32, device=gram.device)
        with self._lock, torch.cuda.device_of(gram):
            self._library.call("cusolverDnSetStream", self._handle, self._stream())
            count = 1 if route == "looped" else self._count(gram, values)
            need = [self._workspace(gram, values, size, route) for size in {count, batch % count} - {0}]
            on_device = torch.empty(max(size for size, _ in need), dtype=torch.uint8, device=gram.device)
            on_host = torch.empty(max(size for _, size in need), dtype=torch.uint8)
            copy = torch.empty_like(gram[:count], memory_format=torch.contiguous_format)
            work = on_device.data_ptr(), on_device.numel(), on_host.data_ptr(), on_host.numel()
            for start in range(0, batch, count):
                part = gram[start : start + count]
                copy[: len(part)] = part  # the solver destroys what it is given
                outputs = values[start:], *work, info[start:].data_ptr()
                self._call(SOLVERS[route], copy, *outputs, batch=len(part))
            return values, info.tolist()  # waits for the stream: the workspace is free after that

    def _call(self, name: str, gram: Tensor, values: Tensor, *rest: object, batch: int) -> None:
        """One call of a solver or of its `_bufferSize`, with what is between their common first and last arguments."""
        kind, n = KINDS[gram.dtype], gram.shape[-1]
        first = self._handle, self._params, NO_VECTORS, UPPER, n
        matrices = kind, gram.data_ptr(), n, kind, values.data_ptr(), kind
        last = [batch] if name.startswith(SOLVERS["batched"]) else []
        self._library.call(name, *first, *matrices, *rest, *last)

    def _workspace(self, gram: Tensor, values: Tensor, count: int, route: Route = "batched") -> tuple[int, int]:
        """Bytes on the device and on the host for `count` matrices."""
        device, host = c_size_t(), c_size_t()
        sizes = ctypes.byref(device), ctypes.byref(host)
        self._call(f"{SOLVERS[route]}_bufferSize", gram, values, *sizes, batch=count)
        return device.value, host.value

    def _count(self, gram: Tensor, values: Tensor) -> int:
        """Matrices of one call: as few calls as the limits and the free memory allow, all about as large."""
        batch, n, _ = gram.shape
        room, count = int(SHARE * self._free()), min(batch, most(n, gram.dtype))
        while (need := count * n * n * gram.itemsize + self._workspace(gram, values, count)[0]) > room:
            if count == 1:
                raise Unusable(f"one matrix [{n}, {n}] and its workspace need {need} bytes, and {room} may be taken")
            count = max(1, min(count - 1, count * room // need))
        return -(-batch // -(-batch // count))


def eigvalsh(gram: Tensor, route: Route | None = None, solver: Solver | None = None) -> Tensor:
    """Eigenvalues [b, n], ascending, of symmetric gram [b, n, n], float32 or float64; the lower triangles are read and
    nothing is changed.

    route: by the table FASTEST if None; then torch.linalg steps in, with one line in the log, for what cuSOLVER refuses
    or does not solve. One that is asked for raises Unusable instead. solver: that of gram's device if None.
    ValueError for other shapes and dtypes; torch.linalg.LinAlgError if torch.linalg does not converge either.
    """
    if gram.dim() != 3 or gram.shape[1] != gram.shape[2] or gram.dtype not in KINDS:
        raise ValueError(f"gram: wanted [b, n, n] in float32 or float64, got {tuple(gram.shape)} in {gram.dtype}")
    n = gram.shape[-1]
    taken = route or fastest(n, gram.dtype, len(gram))
    if taken == "torch" or not gram.numel() or not (gram.is_cuda or solver or route):
        return _by_torch(gram)
    try:
        if taken == "tridiagonal":
            return tridiagonal.eigvalsh(gram)
        values, info = (solver or _solver(gram.device)).eigenvalues(gram, taken)
    except (Unusable, torch.OutOfMemoryError) as reason:
        if route:
            raise
        _log_once(f"eigenvalues by torch.linalg, because {reason}")
        return _by_torch(gram)
    failed = [i for i, code in enumerate(info) if code]
    if failed:
        found = ", ".join(f"{i} (info {info[i]})" for i in failed)
        sentence = f"cuSOLVER has not solved matrices {found} of {len(info)} [{n}, {n}]"
        if route:
            raise Unusable(sentence)
        log.warning("%s; torch.linalg solves them again", sentence)
        values[failed] = _by_torch(gram[failed])
    return values


def fastest(n: int, dtype: torch.dtype, count: int) -> Route:
    """The route of the table FASTEST for `count` matrices [n, n]; "torch" for those larger than all of it."""
    return next((route for largest, fewest, route in FASTEST[dtype] if n <= largest and count >= fewest), "torch")


def most(n: int, dtype: torch.dtype) -> int:
    """Matrices [n, n] that one call may have, by cuSOLVER's limits."""
    return min(MOST_MATRICES, max(1, MOST_BYTES // (n * n * dtype.itemsize)))


def status() -> str | None:
    """None if torch's cuSOLVER has the batched solver, or the sentence that says why not."""
    found = _library()
    return found if isinstance(found, str) else None


def _by_torch(gram: Tensor) -> Tensor:
    if not gram.numel():
        return gram.new_zeros(gram.shape[:2])
    # The lower triangle of rows is the upper one of columns, as LAPACK has them: no transposed copy, and a faster way.
    parts = gram.split(most(gram.shape[-1], gram.dtype))
    return torch.cat([torch.linalg.eigvalsh(part.mT, UPLO="U") for part in parts])


@functools.cache
def _log_once(sentence: str) -> None:
    log.warning(sentence)


@functools.cache
def _library() -> "Library | str":
    """torch's cuSOLVER, or why there is none."""
    reasons = []
    for path in paths():
        try:
            return Library(path)
        except Unusable as error:
            reasons.append(str(error))
    return "; ".join(reasons) or "no libcusolver is loaded or lies beside torch"


_solvers: dict[torch.device, Solver] = {}


def _solver(device: torch.device) -> Solver:
    library = _library()
    if isinstance(library, str):
        raise Unusable(library)
    if device.type != "cuda":
        raise Unusable(f"cuSOLVER solves on CUDA devices, and the matrices are on {device}")
    if device not in _solvers:
        with torch.cuda.device(device):
            _solvers[device] = Solver(
                library,
                lambda: memory.free(device) or 0,
                lambda: torch.cuda.current_stream(device).cuda_stream,
            )
    return _solvers[device]


def paths(maps: str = "/proc/self/maps", cuda: str | None = torch.version.cuda) -> Iterator[str]:
    """Where libcusolver may be: what this process has loaded; if nothing, what NVIDIA's packages beside torch have, and
    what the system's loader finds, of the version that goes with torch's CUDA."""
    loaded = hardware.loaded(r"/libcusolver\.so", maps)
    yield from loaded
    major = int((cuda or "0").split(".")[0])
    if loaded or not major:
        return
    name = f"libcusolver.so.{11 if major < 13 else major - 1}"  # CUDA 11 and 12 have 11, CUDA 13 has 12
    package = importlib.util.find_spec("nvidia")
    for folder in (package and package.submodule_search_locations) or ():
        yield from map(str, sorted(Path(folder).glob(f"*/lib/{name}")))
    yield name
