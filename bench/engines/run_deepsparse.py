"""Pruned linear layers in DeepSparse: fp32, and int8 as sparseml's exporter writes quantised linears.

fp32: MatMul with a constant [K, N]. int8: QuantizeLinear → MatMulInteger → Cast → Mul, which its compiler takes as one
sparse integer product; QuantizeLinear/DequantizeLinear pairs around a MatMul it runs dense in fp32 (tried).
"""

import os
import tempfile

import deepsparse
import numpy as np
import onnx
import worker
from onnx import TensorProto, helper, numpy_helper

os.environ["NM_BIND_THREADS_TO_CORES"] = "1"  # as its own benchmark does by default
SETTINGS = "ONNX, batch size M, num_cores = threads, single_stream, threads bound to cores"
FLOAT = worker.Variant("float32", "float32", f"{SETTINGS}; MatMul", True)
INT8 = worker.Variant("int8", "int8", f"{SETTINGS}; QuantizeLinear, MatMulInteger, Cast, Mul", True)
MOST = 2  # layers: it compiles each for some seconds,
FEW_TOKENS = 4  # above so many for half a minute: then one


def save(model, folder: str) -> str:
    path = os.path.join(folder, "layers.onnx")
    onnx.save(model, path, save_as_external_data=True, location="layers.data")
    return path


class Graph:
    """`layers` products of one input [M, K] as ONNX."""

    def __init__(self, made: np.ndarray, x: np.ndarray, layers: int) -> None:
        self.made, self.x, self.layers = made, x, layers
        self.nodes, self.constants = [], []

    def constant(self, name: str, value) -> str:
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def add(self, kind: str, inputs: list[str], output: str, **settings) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], **settings))
        return output

    def float32(self) -> None:
        for i, w in enumerate(worker.copies(self.made, self.layers)):
            self.add("MatMul", ["x", self.constant(f"w{i}", w.T)], f"y{i}")

    def int8(self) -> None:
        scale = np.abs(self.made).max() / np.float32(127)
        whole = np.rint(self.made / scale).astype(np.int8)
        step = np.float32(np.abs(self.x).max() / 127)
        self.constant("step", step)
        self.constant("middle", np.uint8(128))
        self.constant("zero", np.int8(0))
        self.constant("both", np.float32(step * scale))
        self.add("QuantizeLinear", ["x", "step", "middle"], "q")
        for i, w in enumerate(worker.copies(whole, self.layers)):
            self.add("MatMulInteger", ["q", self.constant(f"w{i}", w.T), "middle", "zero"], f"i{i}")
            self.add("Cast", [f"i{i}"], f"f{i}", to=TensorProto.FLOAT)
            self.add("Mul", [f"f{i}", "both"], f"y{i}")

    def model(self):
        tokens, n = len(self.x), len(self.made)
        source = helper.make_tensor_value_info("x", TensorProto.FLOAT, list(self.x.shape))
        ends = [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, [tokens, n]) for i in range(self.layers)]
        graph = helper.make_graph(self.nodes, "layers", [source], ends, self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
        model.ir_version = 7  # the newest that it reads
        return model


class Engine:
    """DeepSparse on `threads` cores."""

    def __init__(self, threads: int) -> None:
        self.threads, self.cores = threads, os.sched_getaffinity(0)
        self.version = deepsparse.__version__
        self.variants = [FLOAT, INT8]

    def load(self, name: str, made: np.ndarray, x: np.ndarray, target: int) -> worker.Job:
        kept = int(np.count_nonzero(made))
        nbytes = kept * (4 if name == "float32" else 1) + made.size // 8  # it stores the kept values and a bitmap
        layers = worker.count(target, nbytes, MOST) if len(x) <= FEW_TOKENS else 1
        graph = Graph(made, x, layers)
        getattr(graph, name)()
        with tempfile.TemporaryDirectory() as folder:
            path = save(graph.model(), folder)
            del graph
            os.sched_setaffinity(0, self.cores)
            engine = deepsparse.Engine(path, len(x), num_cores=self.threads, scheduler="single_stream")
            os.sched_setaffinity(0, {min(self.cores)})  # the caller computes too, and only the others were bound
        if engine.fraction_of_supported_ops < 1:
            raise ValueError(f"only {engine.fraction_of_supported_ops:.0%} of the graph is supported")

        def output() -> np.ndarray:
            return engine.run([x])[0]

        return worker.Job(lambda: engine.run([x], val_inp=False), output, layers, nbytes)


if __name__ == "__main__":
    worker.serve(Engine)
