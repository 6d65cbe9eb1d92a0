"""llama.cpp's matrix product alone: ggml's mul_mat on BF16, Q8_0 and Q4_0 weights, through its C interface.

Not llama-bench: that times whole models (attention, norms, sampling), so no layer of ours could be set beside it.
Weights go into the buffer type that llama.cpp's loader would take: the first of the CPU's extra ones (AMX, repacked)
that supports the product, else the plain one. Its build and its kernels are llama.cpp's own defaults.
"""

import ctypes
import itertools
import sys
from pathlib import Path

import numpy as np
import worker

DEFAULTS = "ggml mul_mat, llama.cpp's default build (-march=native, OpenMP, llamafile, repacking), x float32"
TYPES = {"Q4_0": 2, "Q8_0": 8, "BF16": 30}
BITS = {"Q4_0": "q4_0", "Q8_0": "q8_0", "BF16": "bfloat16"}
GRAPH_NODES = 64
FLOAT32 = 0
CPU_DEVICE = 0  # GGML_BACKEND_DEVICE_TYPE_CPU
P, LONG, INT, SIZE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_size_t


class Parameters(ctypes.Structure):
    """struct ggml_init_params"""

    _fields_ = (("mem_size", SIZE), ("mem_buffer", P), ("no_alloc", ctypes.c_bool))


SIGNATURES = {
    "ggml_init": (P, [Parameters]),
    "ggml_free": (None, [P]),
    "ggml_version": (ctypes.c_char_p, []),
    "ggml_commit": (ctypes.c_char_p, []),
    "ggml_tensor_overhead": (SIZE, []),
    "ggml_graph_overhead": (SIZE, []),
    "ggml_row_size": (SIZE, [INT, LONG]),
    "ggml_new_tensor_2d": (P, [P, INT, LONG, LONG]),
    "ggml_mul_mat": (P, [P, P, P]),
    "ggml_new_graph": (P, [P]),
    "ggml_build_forward_expand": (None, [P, P]),
    "ggml_quantize_chunk": (SIZE, [INT, P, P, LONG, LONG, LONG, P]),
    "ggml_backend_cpu_init": (P, []),
    "ggml_backend_cpu_set_n_threads": (None, [P, INT]),
    "ggml_backend_cpu_buffer_type": (P, []),
    "ggml_backend_alloc_ctx_tensors_from_buft": (P, [P, P]),
    "ggml_backend_buffer_free": (None, [P]),
    "ggml_backend_buft_name": (ctypes.c_char_p, [P]),
    "ggml_backend_tensor_set": (None, [P, P, SIZE, SIZE]),
    "ggml_backend_tensor_get": (None, [P, P, SIZE, SIZE]),
    "ggml_backend_graph_compute": (INT, [P, P]),
    "ggml_backend_dev_by_type": (P, [INT]),
    "ggml_backend_dev_backend_reg": (P, [P]),
    "ggml_backend_dev_supports_op": (ctypes.c_bool, [P, P]),
    "ggml_backend_reg_get_proc_address": (P, [P, ctypes.c_char_p]),
}


def library() -> dict:
    """The C functions by name, from the libraries that set-up built beside this environment."""
    folder = Path(sys.prefix) / "llama.cpp" / "bin"
    parts = [
        ctypes.CDLL(str(folder / f"lib{name}.so"), ctypes.RTLD_GLOBAL) for name in ("ggml-base", "ggml-cpu", "ggml")
    ]
    found = {}
    for name, (result, arguments) in SIGNATURES.items():
        function = next(getattr(part, name) for part in parts if hasattr(part, name))
        function.restype, function.argtypes = result, arguments
        found[name.removeprefix("ggml_")] = function
    return found


class Layers:
    """Copies of one quantised weight and the graph of their products with one x; memory is freed with it."""

    def __init__(self, c: dict, kind: int, made: np.ndarray, x: np.ndarray, layers: int) -> None:
        self.c, self.buffers, self.contexts = c, [], []
        n, k = made.shape
        self.nbytes, self.shape = c["row_size"](kind, k) * n, (len(x), n)
        stored = np.empty(self.nbytes, np.uint8)
        c["quantize_chunk"](kind, made.ctypes.data, stored.ctypes.data, 0, n, k, None)
        plain = c["backend_cpu_buffer_type"]()
        place = next((extra for extra in self.extra_places() if self.fits(kind, extra)), plain)
        self.place = c["backend_buft_name"](place).decode()
        weights, work = self.context(), self.context()
        tensors = [c["new_tensor_2d"](weights, kind, k, n) for _ in range(layers)]
        self.allocate(weights, place)
        source = c["new_tensor_2d"](work, FLOAT32, k, len(x))
        self.products = [c["mul_mat"](work, tensor, source) for tensor in tensors]
        self.graph = c["new_graph"](work)
        for product in self.products:
            c["build_forward_expand"](self.graph, product)
        self.allocate(work, plain)
        for tensor in tensors:
            c["backend_tensor_set"](tensor, stored.ctypes.data, 0, self.nbytes)
        c["backend_tensor_set"](source, x.ctypes.data, 0, x.nbytes)

    def context(self):
        size = GRAPH_NODES * self.c["tensor_overhead"]() + self.c["graph_overhead"]()
        self.contexts.append(self.c["init"](Parameters(size, None, True)))
        return self.contexts[-1]

    def allocate(self, context, place) -> None:
        self.buffers.append(self.c["backend_alloc_ctx_tensors_from_buft"](context, place))
        if not self.buffers[-1]:
            raise MemoryError("ggml could not allocate the tensors")

    def extra_places(self) -> list:
        """The CPU's extra buffer types in llama.cpp's order."""
        c = self.c
        registry = c["backend_dev_backend_reg"](c["backend_dev_by_type"](CPU_DEVICE))
        address = c["backend_reg_get_proc_address"](registry, b"ggml_backend_dev_get_extra_bufts")
        if not address:
            return []
        listed = ctypes.CFUNCTYPE(ctypes.POINTER(P), P)(address)(c["backend_dev_by_type"](CPU_DEVICE))
        return list(itertools.takewhile(bool, listed)) if listed else []

    def fits(self, kind: int, place) -> bool:
        """Whether the CPU multiplies by weights of this kind there: asked, as the loader asks, with a small product."""
        c = self.c
        weights, work = self.context(), self.context()
        tensor = c["new_tensor_2d"](weights, kind, 512, 512)
        self.allocate(weights, place)
        product = c["mul_mat"](work, tensor, c["new_tensor_2d"](work, FLOAT32, 512, 512))
        return c["backend_dev_supports_op"](c["backend_dev_by_type"](CPU_DEVICE), product)

    def output(self) -> np.ndarray:
        y = np.empty(self.shape, np.float32)
        self.c["backend_tensor_get"](self.products[0], y.ctypes.data, 0, y.nbytes)
        return y

    def __del__(self) -> None:
        for buffer in filter(None, self.buffers):
            self.c["backend_buffer_free"](buffer)
        for context in self.contexts:
            self.c["free"](context)


class Engine:
    """ggml's CPU back-end with `threads` threads."""

    def __init__(self, threads: int) -> None:
        self.c = library()
        self.backend = self.c["backend_cpu_init"]()
        self.c["backend_cpu_set_n_threads"](self.backend, threads)
        self.version = f"ggml {self.c['version']().decode()} ({self.c['commit']().decode()})"
        self.variants = [worker.Variant(name, BITS[name], DEFAULTS) for name in TYPES]

    def load(self, name: str, made: np.ndarray, x: np.ndarray, target: int) -> worker.Job:
        nbytes = self.c["row_size"](TYPES[name], made.shape[1]) * len(made)
        count = worker.count(target, nbytes, GRAPH_NODES // 4)
        layers = Layers(self.c, TYPES[name], made, x, count)

        def run() -> None:
            if self.c["backend_graph_compute"](self.backend, layers.graph):
                raise RuntimeError("ggml's graph failed")

        def output() -> np.ndarray:
            run()
            return layers.output()

        return worker.Job(run, output, count, nbytes, f"buffer {layers.place}")


if __name__ == "__main__":
    worker.serve(Engine)
