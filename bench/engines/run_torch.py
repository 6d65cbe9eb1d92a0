"""Dense linear layers in PyTorch, as torch.nn.functional.linear and prepacked as its compiler's freezing packs them."""

import numpy as np
import torch
import worker
from torch.nn import functional

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
PLAIN = worker.Variant("bfloat16", "bfloat16", "functional.linear, inference mode")
PACKED = worker.Variant("bfloat16 prepacked", "bfloat16", "mkldnn._linear_pointwise on a weight reordered for this M")
COMPILED = worker.Variant("bfloat16 compiled", "bfloat16", "torch.compile, freezing, max_autotune (CPP and ATEN)")
FLOATS = [
    worker.Variant("float32", "float32", "functional.linear, inference mode"),
    worker.Variant("float32 prepacked", "float32", "mkl._mkl_linear on a weight packed for this M"),
]


class Layers(torch.nn.Module):
    """Several dense weights that share their input."""

    def __init__(self, weights: list) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList([torch.nn.Parameter(w, requires_grad=False) for w in weights])

    def forward(self, x):
        return [functional.linear(x, w) for w in self.weights]


class Engine:
    """PyTorch on `threads` threads; float32 too where the CPU has no bfloat16 arithmetic, for it is faster there."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self.version = torch.__version__
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        self.variants = [PLAIN, PACKED, COMPILED] if native else [PLAIN, PACKED, *FLOATS]

    def load(self, name: str, made: np.ndarray, x: np.ndarray, target: int) -> worker.Job:
        dtype = DTYPES[name.split()[0]]
        nbytes = made.size * dtype.itemsize
        layers = worker.count(target, nbytes)
        weights = [torch.from_numpy(w).to(dtype) for w in worker.copies(made, layers)]
        call = self.calls(name, weights, torch.from_numpy(x).to(dtype))
        return worker.Job(call, lambda: call()[0].float().numpy(), layers, nbytes)

    @torch.inference_mode()
    def calls(self, name: str, weights: list, x: torch.Tensor):
        """A function that runs the layers one after another and returns their outputs."""
        tokens = len(x)
        if name.endswith("compiled"):
            import torch._inductor.config as settings

            settings.freezing = settings.max_autotune = True
            settings.max_autotune_gemm_backends = "CPP,ATEN"
            torch._dynamo.reset()
            compiled = torch.compile(Layers(weights).eval())
            return torch.inference_mode()(lambda: compiled(x))
        if name == "bfloat16 prepacked":
            packed = [torch.ops.mkldnn._reorder_linear_weight(w, tokens) for w in weights]
            linear = torch.ops.mkldnn._linear_pointwise
            return torch.inference_mode()(lambda: [linear(x, p, None, "none", [], "") for p in packed])
        if name == "float32 prepacked":
            pairs = [(torch.ops.mkl._mkl_reorder_linear_weight(w, tokens), w) for w in weights]
            return torch.inference_mode()(lambda: [torch.ops.mkl._mkl_linear(x, p, w, None, tokens) for p, w in pairs])
        return torch.inference_mode()(lambda: [functional.linear(x, w) for w in weights])


if __name__ == "__main__":
    worker.serve(Engine)
