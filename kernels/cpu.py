"""The native CPU kernels, one per instruction set of csrc/cpu, and which of those may run here."""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from alphaprune import hardware
from alphaprune.formats import Packed, native
from alphaprune.kernels.base import Bound, Kernel

# Best first.
ISAS = ("amx", "avx512bf16", "avx512", "avx512vnni", "avx512bw", "avxvnni", "avx2", "neondot", "neon", "scalar")
# Multiply int8 values by x in 8 bits, where they may round it.
BYTES = ("amx", "avx512bf16", "avx512", "avx512vnni", "avxvnni", "neondot")
CODES = native.DTYPES
FLOATS = tuple(dtype for dtype in CODES if dtype.is_floating_point)  # of activations and biases
# Past so many tokens, expanding a chunk of rows for torch's matmul is faster. Measured at 4096 x 4096 in bfloat16 on
# Sapphire Rapids without AMX: avx512 15 ms and expand 32 ms for 64 tokens, 33 and 53 for 128, about equal for 256.
MOST_TOKENS = {
    "amx": 256,
    "avx512bf16": 128,
    "avx512": 128,
    "avx512vnni": 128,
    "avx512bw": 128,
    "avxvnni": 32,
    "avx2": 32,
    "neondot": 32,
    "neon": 32,
    "scalar": 4,
}
# Densities up to which zeros are skipped.
SKIP = {"avx512bf16": 0.55, "avx512": 0.4, "avx512vnni": 0.4, "avx512bw": 0.4}
ISA_FLAGS = {"avx2", "avx512f"}  # of CPUs for which `fast_in_torch` knows the answer
# Limits of oneDNN, which multiplies 16-bit floats for torch, that leave it no instructions for them.
SLOW_LIMITS = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI"}


def missing(isa: str) -> str | None:
    """Why `isa` does not run here, or None. The environment variable ALPHAPRUNE_ISA names the best one allowed.

    It is for products, norms and attention alike, and is read when they are bound: by a decoder when that is made.
    """
    module = native.load()
    if module is None:
        return native.status()
    allowed = os.environ.get("ALPHAPRUNE_ISA")
    if allowed is not None and allowed not in ISAS:
        raise ValueError(f"ALPHAPRUNE_ISA={allowed}: wanted one of {', '.join(ISAS)}")
    if allowed is not None and ISAS.index(isa) < ISAS.index(allowed):
        return f"ALPHAPRUNE_ISA={allowed} rules it out"
    return dict(module.isas()).get(isa, "this build has no code for it") or None


def best() -> str | None:
    """The best instruction set that is usable here; None without the native module."""
    return next((isa for isa in ISAS if missing(isa) is None), None)


def handle(packed: Packed, isa: str | None = None) -> Any:
    """The native weight bound to an instruction set, the best one if none is named; it does not keep tensors alive."""
    return native.weight(packed, isa or best())


def bind(isa: str, packed: Packed) -> Bound:
    """The native product with one packed weight: about 2 µs a call beside its work."""
    multiply = handle(packed, isa).multiply
    n, k = packed.shape

    def run(x: Tensor, bias: Tensor | None, packed: Packed = packed) -> Tensor:  # packed: kept alive with the closure
        y = x.new_empty(*x.shape[:-1], n)  # a third cheaper than with a tuple
        if bias is None:
            multiply(x.data_ptr(), CODES[x.dtype], x.numel() // k, k, 0, 0, y.data_ptr())
        else:
            multiply(x.data_ptr(), CODES[x.dtype], x.numel() // k, k, bias.data_ptr(), CODES[bias.dtype], y.data_ptr())
        return y

    return run


def bind_group(isa: str, weights: Sequence[Packed]) -> Callable[..., list[Tensor]]:
    """The native product of one x with several packed weights [N_i, K] in one parallel region.

    It does not keep the tensors alive: whoever calls it holds the weights.
    """
    multiply = native.load().Group(tuple(handle(packed, isa) for packed in weights)).multiply
    rows, k = [packed.shape[0] for packed in weights], weights[0].shape[1]
    none = (0,) * len(rows)

    def run(x: Tensor, biases: Sequence[Tensor | None] | None, norm: None = None) -> list[Tensor]:
        leading = x.shape[:-1]
        out = [x.new_empty(*leading, n) for n in rows]
        addresses = codes = none
        if biases is not None:
            addresses = [0 if bias is None else bias.data_ptr() for bias in biases]
            codes = [0 if bias is None else CODES[bias.dtype] for bias in biases]
        multiply(x.data_ptr(), CODES[x.dtype], x.numel() // k, k, addresses, codes, [y.data_ptr() for y in out])
        return out

    return run


def supports(shape: tuple[int, int], tokens: int, weight: torch.dtype, x: torch.dtype) -> str | None:
    """None for weights in float32, float16, bfloat16 and int8 with activations in any of the floats."""
    unknown = [str(dtype) for dtype, known in ((weight, CODES), (x, FLOATS)) if dtype not in known]
    return f"it computes with float32, float16 and bfloat16, not {', '.join(unknown)}" if unknown else None


def supports_bytes(isa: str, shape: tuple[int, int], tokens: int, weight: torch.dtype, x: torch.dtype) -> str | None:
    """As `supports`; x is int8 where `isa` may round it so, beside int8 values."""
    return None if isa in BYTES and weight == x == torch.int8 else supports(shape, tokens, weight, x)


def rounds_to_bytes(packed: Packed) -> bool:
    """Whether the best instruction set that is usable here rounds x to 8 bits beside this weight."""
    if packed.device.type != "cpu" or not packed.bytes_allowed:
        return False
    return best() in BYTES


@functools.cache
def fast_in_torch(dtype: torch.dtype) -> bool:
    """Whether torch multiplies matrices of `dtype` about as fast as this CPU can: what expansion lives on.

    With 256 tokens and a layer of 11008 x 4096 a Zen 5 took 25 ms in bfloat16, 118 in float32, for which MKL takes its
    AVX2 code there, and 377 in float16; held to AVX2, 370 in bfloat16. Where nothing is known the answer is yes.
    """
    sets = hardware.instruction_sets()
    if not ISA_FLAGS & set(sets):
        return True
    if dtype == torch.float32:
        return hardware.maker() != "AuthenticAMD"
    if os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in SLOW_LIMITS:
        return False
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    return f"avx512_{name}" in sets or f"amx_{name}" in sets


def takes_any(isa: str, weight: torch.dtype, x: torch.dtype, density: float | None) -> bool:
    """Whether MOST_TOKENS does not hold: expansion multiplies floats, zeros among them, and no bytes.

    Where torch has no fast product of x's dtype expansion never pays: on a Zen 5 128 tokens of float16 took 32 ms at
    50 % (11008 x 4096), with int8 values 14, and expanded 97 and 88; held to AVX2, bfloat16 43 and 31, and 195 and 88.
    """
    if weight == x == torch.int8 or (isa != "scalar" and not fast_in_torch(x)):
        return True
    return skips_zeros(isa, weight, x, density)


def skips_zeros(isa: str, weight: torch.dtype, x: torch.dtype, density: float | None) -> bool:
    """Whether `isa` multiplies non-zeros alone, whose time follows the density for any number of tokens.

    At 1024 tokens pairs of bfloat16 were 1.1 times as fast as dense at 50 % on a Zen 4 and 1.05 times on a Zen 5, 1.5
    times at 70 % on both (bench/results/linear.jsonl); single floats gain from about 60 % on.
    """
    if density is None or isa not in SKIP:
        return False
    if isa == "avx512bf16" and weight in (torch.bfloat16, torch.int8) and x == torch.bfloat16:
        return density <= SKIP[isa]
    return weight in FLOATS and density <= SKIP["avx512"]


KERNELS = tuple(
    Kernel(
        *(isa, "cpu", functools.partial(missing, isa), functools.partial(supports_bytes, isa)),
        *(functools.partial(bind, isa), MOST_TOKENS[isa]),
        any_tokens=functools.partial(takes_any, isa),
    )
    for isa in ISAS
)
