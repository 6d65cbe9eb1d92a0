"""Eigenvalues of a large symmetric float64 matrix on a CPU, by LAPACK's two-stage reduction in numpy's OpenBLAS.

What torch calls brings a matrix to three diagonals at once, and half of that work waits for the memory: every column is
multiplied by all that is left of the matrix. Two stages bring it to a band first, whose operations are products of
matrices, then to three diagonals inside the cache (Haidar, Ltaief, Dongarra: SC 2011). In float32 half as many bytes
wait, and the way through a band gains nothing (4096², two threads: 1.09 times as long; 8192²: 0.95).
"""

import ctypes
import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, byref, c_char_p, c_int, c_int32, c_int64, c_size_t, c_void_p
from typing import Any

import torch
from torch import Tensor

from alphaprune import hardware

PAYS_FROM = 1024  # rows; below, one stage is as fast: all is in the cache
BAND = 96  # diagonals below the main one: fewer make the first stage slower, more the second
# How builds of OpenBLAS name their functions: prefix, suffix and the integers that they take. First numpy's wheels.
NAMES = (("scipy_", "64_", c_int64), ("scipy_", "", c_int32), ("", "64_", c_int64), ("", "", c_int32))
# Arguments by Fortran's conventions: all are addresses, texts' lengths follow at the end.
SIGNATURES = {
    "dsytrd_sy2sb_": "text int int data int data int data data int int",
    "dsytrd_sb2st_": "text text text int int data int data data data int data int int",
    "dsterf_": "int data data int",
}


class Unusable(RuntimeError):
    """There is no OpenBLAS with these functions here; the text says why."""


class Library:
    """The functions of one OpenBLAS; Unusable if the file cannot be loaded or lacks one."""

    def __init__(self, path: str) -> None:
        try:
            functions = ctypes.CDLL(path)
        except OSError as error:
            raise Unusable(f"{path} cannot be loaded: {error}") from error
        named = [style for style in NAMES if hasattr(functions, f"{style[0]}dsytrd_sy2sb_{style[1]}")]
        if not named:
            raise Unusable(f"{path} has no dsytrd_sy2sb")
        prefix, suffix, self.integer = named[0]
        self._functions = {}
        for name, kinds in SIGNATURES.items():
            function = getattr(functions, f"{prefix}{name}{suffix}", None)
            if function is None:
                raise Unusable(f"{path} has no {name.rstrip('_')}")
            types: dict[str, Any] = {"text": c_char_p, "int": POINTER(self.integer), "data": c_void_p}
            texts = kinds.split().count("text")
            function.argtypes = [*(types[kind] for kind in kinds.split()), *[c_size_t] * texts]
            function.restype = None
            self._functions[name] = function
        self._threads = {way: self._control(functions, way, prefix, suffix) for way in ("get", "set")}
        self._lock, self._inside, self._before = threading.Lock(), 0, 1

    def eigenvalues(self, matrix: Tensor) -> Tensor:
        """Eigenvalues [n] ascending of `matrix` [n, n] float64, whose lower triangle is read; LinAlgError without
        convergence."""
        n, band = matrix.shape[0], min(BAND, matrix.shape[0] - 1)
        if n == 1:
            return matrix[0].clone()
        # By columns, as LAPACK has them: its way for lower triangles takes three quarters of the time of that for upper
        # ones, and the copy, which the first stage destroys, is needed anyway.
        columns = matrix.mT.clone(memory_format=torch.contiguous_format)
        diagonals = columns.new_zeros(n, band + 1)
        main, beside, scales = columns.new_empty(n), columns.new_empty(n), columns.new_empty(n)
        with self._one_thread():
            self._run("dsytrd_sy2sb_", "L", n, band, columns, n, diagonals, band + 1, scales, workspaces=1)
            self._run("dsytrd_sb2st_", "Y", "N", "L", n, band, diagonals, band + 1, main, beside, workspaces=2)
            self._run("dsterf_", n, main, beside)
        return main

    def _run(self, name: str, *arguments: str | int | Tensor, workspaces: int = 0) -> None:
        """One function, after it was asked how large its workspaces, the last arguments, must be."""
        spaces = [torch.zeros(1, dtype=torch.float64) for _ in range(workspaces)]
        if spaces:
            self._call(name, *arguments, *(given for space in spaces for given in (space, -1)))
            spaces = [torch.empty(max(1, int(space)), dtype=torch.float64) for space in spaces]
        self._call(name, *arguments, *(given for space in spaces for given in (space, space.numel())))

    def _call(self, name: str, *arguments: str | int | Tensor) -> None:
        info, passed = self.integer(0), []
        for given in arguments:
            if isinstance(given, Tensor):
                passed.append(given.data_ptr())
            else:
                passed.append(given.encode() if isinstance(given, str) else byref(self.integer(given)))
        lengths = [1 for given in arguments if isinstance(given, str)]
        self._functions[name](*passed, byref(info), *lengths)
        if info.value:
            raise torch.linalg.LinAlgError(f"{name.rstrip('_')} of LAPACK returned {info.value}")

    @contextmanager
    def _one_thread(self) -> Iterator[None]:
        """OpenBLAS with one thread while anyone is inside: matrices are solved side by side, and a result does not
        depend on how many. Its number of threads is the process's, not the caller's."""
        with self._lock:
            if not self._inside:
                self._before = self._threads["get"]()
                self._threads["set"](1)
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    self._threads["set"](self._before)

    @staticmethod
    def _control(functions: ctypes.CDLL, way: str, prefix: str, suffix: str) -> Any:
        function = getattr(functions, f"{prefix}openblas_{way}_num_threads{suffix}", None)
        if function is None:
            raise Unusable(f"this OpenBLAS has no openblas_{way}_num_threads")
        function.argtypes, function.restype = ([c_int], None) if way == "set" else ([], c_int)
        return function


def serves(matrix: Tensor) -> bool:
    """Whether `matrix` [n, n] is better solved here than by torch."""
    large = matrix.device.type == "cpu" and matrix.dtype == torch.float64 and matrix.shape[-1] >= PAYS_FROM
    return large and library() is not None


def eigvalsh(matrix: Tensor) -> Tensor:
    """Eigenvalues [n] ascending of a symmetric `matrix` [n, n], float64 on the CPU, by its lower triangle.

    Unusable without an OpenBLAS; torch.linalg.LinAlgError without convergence.
    """
    found = library()
    if found is None:
        raise Unusable("numpy works without an OpenBLAS that has LAPACK's two-stage reduction")
    return found.eigenvalues(matrix)


@functools.cache
def library() -> Library | None:
    """numpy's OpenBLAS, or None where numpy was built with another library."""
    import numpy.linalg  # noqa: F401  loads it

    for path in paths():
        try:
            return Library(path)
        except Unusable:
            continue
    return None


def paths(maps: str = "/proc/self/maps") -> list[str]:
    """The OpenBLAS libraries that this process has loaded."""
    return hardware.loaded(r"openblas[^/]*$", maps)
