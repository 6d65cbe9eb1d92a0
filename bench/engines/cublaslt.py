"""y = x Wᵀ by each of the algorithms that cuBLASLt's heuristic proposes, through ctypes from the library torch loaded.

torch takes the first proposal only. Interface: https://docs.nvidia.com/cuda/cublas/#using-the-cublaslt-api
"""

import ctypes
from collections.abc import Callable
from ctypes import POINTER, byref, c_float, c_int, c_int32, c_int64, c_size_t, c_uint64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

FLOAT, COMPUTE_FLOAT = 0, 68  # CUDA_R_32F, CUBLAS_COMPUTE_32F
KINDS = {torch.float16: 2, torch.bfloat16: 14}  # CUDA_R_16F, CUDA_R_16BF
TRANSPOSE_FIRST = 3  # CUBLASLT_MATMUL_DESC_TRANSA
MOST_WORKSPACE = 1  # CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES
WORKSPACE = 32 << 20  # bytes, what cuBLAS recommends for Hopper
TOP = 8  # proposals to try


class Proposal(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algorithm", c_uint64 * 8),
        ("workspace", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


SIGNATURES = {
    "cublasLtCreate": (POINTER(c_void_p),),
    "cublasLtMatmulDescCreate": (POINTER(c_void_p), c_int, c_int),
    "cublasLtMatmulDescSetAttribute": (c_void_p, c_int, c_void_p, c_size_t),
    "cublasLtMatrixLayoutCreate": (POINTER(c_void_p), c_int, c_uint64, c_uint64, c_int64),
    "cublasLtMatmulPreferenceCreate": (POINTER(c_void_p),),
    "cublasLtMatmulPreferenceSetAttribute": (c_void_p, c_int, c_void_p, c_size_t),
    "cublasLtMatmulAlgoGetHeuristic": (*[c_void_p] * 7, c_int, POINTER(Proposal), POINTER(c_int)),
    "cublasLtMatmul": (*[c_void_p] * 14, c_size_t, c_void_p),
}


def loaded(maps: str = "/proc/self/maps") -> str:
    """The libcublasLt of this process; ValueError if there is none."""
    found = {line[line.index("/") :] for line in Path(maps).read_text().splitlines() if "/libcublasLt.so" in line}
    if not found:
        raise ValueError("this process has loaded no libcublasLt; torch's CUDA builds do")
    return sorted(found)[0]


class CublasLt:
    """Handle, workspace and functions on one device, for the life of the process. stream() -> its current stream."""

    def __init__(self, path: str, device: torch.device, stream: Callable[[], int]) -> None:
        self._functions, self._stream = ctypes.CDLL(path), stream
        for name, types in SIGNATURES.items():
            function = getattr(self._functions, name)
            function.argtypes, function.restype = types, c_int
        self._handle = self._make("cublasLtCreate")
        self._workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=device)
        self._one, self._zero = c_float(1), c_float(0)

    def linear(self, x: Tensor, weight: Tensor) -> list[Callable[[Tensor], Tensor]]:
        """One call(weight) -> y [M, N] per proposed algorithm, best guess first, for x [M, K] and such weights [N, K].

        x and the weights: contiguous, float16 or bfloat16, summed in float32. RuntimeError if cuBLASLt refuses.
        """
        (m, k), n, kind = x.shape, weight.shape[0], KINDS[x.dtype]
        # cuBLASLt's matrices lie by columns: it sees Wᵀ [K, N] and xᵀ [K, M], and is to write yᵀ [N, M] = W xᵀ.
        product = self._make("cublasLtMatmulDescCreate", COMPUTE_FLOAT, FLOAT)
        self._set("cublasLtMatmulDescSetAttribute", product, TRANSPOSE_FIRST, c_int32(1))
        layouts = [self._make("cublasLtMatrixLayoutCreate", kind, *of) for of in ((k, n, k), (k, m, k), (n, m, n))]
        wanted = self._make("cublasLtMatmulPreferenceCreate")
        self._set("cublasLtMatmulPreferenceSetAttribute", wanted, MOST_WORKSPACE, c_uint64(WORKSPACE))
        found, count = (Proposal * TOP)(), c_int(0)
        of_w, of_x, of_y = layouts
        self._call(
            "cublasLtMatmulAlgoGetHeuristic", self._handle, product, *layouts, of_y, wanted, TOP, found, byref(count)
        )

        def call(weight: Tensor, proposal: Proposal) -> Tensor:
            y = x.new_empty(m, n)
            operands = byref(self._one), weight.data_ptr(), of_w, x.data_ptr(), of_x, byref(self._zero)
            result = y.data_ptr(), of_y, y.data_ptr(), of_y
            work = byref(proposal.algorithm), self._workspace.data_ptr(), WORKSPACE, self._stream()
            self._call("cublasLtMatmul", self._handle, product, *operands, *result, *work)
            return y

        usable = [one for one in found[: count.value] if one.state == 0 and one.workspace <= WORKSPACE]
        return [lambda weight, one=one: call(weight, one) for one in usable]

    def _make(self, name: str, *arguments: int) -> c_void_p:
        made = c_void_p()
        self._call(name, byref(made), *arguments)
        return made

    def _set(self, name: str, of: c_void_p, attribute: int, value: "c_int32 | c_uint64") -> None:
        self._call(name, of, attribute, byref(value), ctypes.sizeof(value))

    def _call(self, name: str, *arguments: object) -> None:
        if status := getattr(self._functions, name)(*arguments):
            raise RuntimeError(f"{name} returned {status}")
