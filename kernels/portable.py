"""The GPU kernels in Triton: which there are, and why they do not run here. Triton is imported with the first weight.

Importing Triton takes a third of a second, which machines without a GPU would pay for nothing; so these records stand
apart from the files of the kernels.
"""

import functools
import importlib
import importlib.util

import torch

from alphaprune import devices
from alphaprune.formats import Packed
from alphaprune.kernels import cpu
from alphaprune.kernels.base import Bound, Kernel

FILES = {"triton_ell": "triton_ell", "triton": "triton_linear", "triton_expand": "triton_expand"}
MOST_TOKENS = {"triton_ell": 2, "triton": 64}  # of triton a prediction: past them the expansion is faster
MOST_DENSITY = {"triton_ell": 0.2}  # a prediction from bytes and instructions, not measured


def available() -> str | None:
    """None, or why Triton's kernels do not run on this machine."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install triton"
    return devices.no_cuda() or devices.too_old()


def bind(file: str, packed: Packed) -> Bound:
    """The product of one kernel with one packed weight; ValueError unless that lies on a GPU."""
    if packed.device.type != "cuda":
        raise ValueError(f"Triton's kernels need a packed weight on a GPU, got one on {packed.device}; move the layer")
    return importlib.import_module(f"alphaprune.kernels.{file}").bind(packed)


def supports_ell(shape: tuple[int, int], tokens: int, weight: torch.dtype, x: torch.dtype) -> str | None:
    """As the other kernels, and at most two tokens."""
    if tokens > MOST_TOKENS["triton_ell"]:
        return f"it multiplies one or two tokens at a time, not {tokens}"
    return cpu.supports(shape, tokens, weight, x)


KERNELS = tuple(
    Kernel(
        name,
        "cuda",
        available,
        supports_ell if name == "triton_ell" else cpu.supports,
        functools.partial(bind, file),
        MOST_TOKENS.get(name),
        MOST_DENSITY.get(name, 1.0),
    )
    for name, file in FILES.items()
)
