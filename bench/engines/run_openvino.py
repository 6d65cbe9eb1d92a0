"""Linear layers in OpenVINO: dense floats, weights compressed to int8, and int8 weights and activations.

The graphs are those that NNCF makes: compress_weights (u8 with a zero point per output channel, its default) and
quantize (FakeQuantize on the input, i8 with a scale per output channel).
"""

from pathlib import Path

import numpy as np
import openvino
import worker
from openvino import opset13 as op

LATENCY = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
FLOAT = worker.Variant("float", "float32", "LATENCY hint, static shape, default inference precision")
WEIGHTS = worker.Variant("int8 weights", "int8", "LATENCY hint, static shape, as nncf.compress_weights INT8_ASYM")
QUANTIZED = worker.Variant("int8", "int8", "LATENCY hint, static shape, as nncf.quantize (int8 activations)")
SPARSE = worker.Variant(
    "int8 sparse", "int8", "as int8, CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE just below the sparsity", True
)


def constant(value: float):
    return op.constant(np.float32(value))


def per_channel(made: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(integers −127…127 [N, K], scale [N, 1])."""
    scale = np.abs(made).max(1, keepdims=True) / np.float32(127)
    return np.rint(made / scale), scale


def compressed(made: np.ndarray):
    """W as NNCF compresses it: (u8 − zero point) · scale, the multiplication in f16."""
    whole, scale = per_channel(made)
    stored = op.convert(op.constant((whole + 128).astype(np.uint8)), np.float16)
    zero = op.convert(op.constant(np.full((len(made), 1), 128, np.uint8)), np.float16)
    return op.convert(op.multiply(op.subtract(stored, zero), op.constant(scale.astype(np.float16))), np.float32)


def quantized(made: np.ndarray):
    whole, scale = per_channel(made)
    return op.multiply(op.convert(op.constant(whole.astype(np.int8)), np.float32), op.constant(scale))


class Engine:
    """OpenVINO's CPU plugin with `threads` threads and one stream."""

    def __init__(self, threads: int) -> None:
        self.core = openvino.Core()
        self.settings = LATENCY | {"INFERENCE_NUM_THREADS": threads}
        self.version = openvino.__version__
        can = self.core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        values = "bfloat16" if "BF16" in can else "float32"
        self.variants = [worker.Variant(FLOAT.name, values, f"{FLOAT.config} ({values})"), WEIGHTS, QUANTIZED]
        if "amx_int8" in Path("/proc/cpuinfo").read_text():
            self.variants.append(SPARSE)

    def graph(self, name: str, made: np.ndarray, x: np.ndarray, layers: int) -> openvino.Model:
        """`layers` products that share their input."""
        node = source = op.parameter(list(x.shape), np.float32)
        weigh = {"float": op.constant, "int8 weights": compressed}.get(name, quantized)
        if name in ("int8", "int8 sparse"):
            low = -float(np.abs(x).max())
            ends = (constant(low), constant(-low * 127 / 128))
            node = op.fake_quantize(source, *ends, *ends, 256)
        products = [op.matmul(node, weigh(w), False, True) for w in worker.copies(made, layers)]
        return openvino.Model(products, [source])

    def load(self, name: str, made: np.ndarray, x: np.ndarray, target: int) -> worker.Job:
        variant = next(v for v in self.variants if v.name == name)
        nbytes = made.size * {"int8": 1, "bfloat16": 2, "float32": 4}[variant.values]
        layers = worker.count(target, nbytes)
        settings = dict(self.settings)
        if variant.sparse:
            settings["CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE"] = float((made == 0).mean()) - 0.02
        compiled = self.core.compile_model(self.graph(name, made, x, layers), "CPU", settings)
        request = compiled.create_infer_request()
        request.set_input_tensor(openvino.Tensor(x))
        precision = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()

        def output() -> np.ndarray:
            request.infer()
            return request.get_output_tensor(0).data

        return worker.Job(request.infer, output, layers, nbytes, f"inference precision {precision}")


if __name__ == "__main__":
    worker.serve(Engine)
