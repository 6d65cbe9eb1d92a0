"""Our own packed layers: SparseLinear as users get it."""

import inspect
from dataclasses import fields

import numpy as np
import torch
import worker

import alphaprune
from alphaprune import formats

FLOAT = worker.Variant("bfloat16", "bfloat16", "SparseLinear, values bfloat16, x bfloat16", True)
INT8 = worker.Variant("int8", "int8", 'SparseLinear, values="int8", x bfloat16', True)
BYTES = worker.Variant("int8, x in int8", "int8", 'SparseLinear, values="int8", activations="int8", x bfloat16', True)


def duplicate(packed: formats.Packed) -> formats.Packed:
    """The same packed weight in other memory."""
    parts = (getattr(packed, field.name) for field in fields(packed))
    return formats.Packed(*(part.clone() if isinstance(part, torch.Tensor) else part for part in parts))


class Engine:
    """alphaprune with the automatic choice of kernel."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self.version = alphaprune.__version__
        self.variants = [FLOAT]
        if "values" in inspect.signature(alphaprune.SparseLinear.from_linear).parameters:
            self.variants.append(INT8)
        if hasattr(alphaprune, "round_activations"):
            self.variants.append(BYTES)

    @torch.inference_mode()
    def load(self, name: str, made: np.ndarray, x: np.ndarray, target: int) -> worker.Job:
        linear = torch.nn.Linear(made.shape[1], made.shape[0], bias=False, device="meta")
        linear.weight = torch.nn.Parameter(torch.from_numpy(made).to(torch.bfloat16), requires_grad=False)
        options = {} if name == FLOAT.name else {"values": "int8"}
        layer = alphaprune.SparseLinear.from_linear(linear, torch.from_numpy(made != 0), **options)
        nbytes = layer.packed.nbytes
        count = worker.count(target, nbytes)
        layers = [layer, *(alphaprune.SparseLinear(duplicate(layer.packed)) for _ in range(count - 1))]
        if name == BYTES.name:
            alphaprune.round_activations(torch.nn.ModuleList(layers))
        x = torch.from_numpy(x).to(torch.bfloat16)

        @torch.inference_mode()
        def call() -> list:
            return [one(x) for one in layers]

        kernel = layer.prepared().choice(len(x), x.dtype)[0].name
        return worker.Job(call, lambda: call()[0].float().numpy(), count, nbytes, f"kernel {kernel}")


if __name__ == "__main__":
    worker.serve(Engine)
