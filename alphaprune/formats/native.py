"""The compiled module alphaprune._native, if it was built: found once, on first use."""

import functools
from pathlib import Path
from types import ModuleType
from typing import Any

import torch  # before _native, whose OpenMP symbols resolve to the libgomp that torch loads

from alphaprune.formats.packed import Packed

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 3}  # csrc/layout.h
REASON_FILE = Path(__file__).resolve().parents[1] / "_native_reason.txt"  # written by setup.py when it could not build


@functools.cache
def _find() -> tuple[ModuleType | None, str]:
    """The module and an empty string, or None and the reason."""
    try:
        from alphaprune import _native
    except ImportError as error:
        if "_native" not in str(error) or "cannot import name" not in str(error):
            return None, str(error)
        recorded = REASON_FILE.read_text().strip() if REASON_FILE.exists() else "the extension was never compiled"
        return None, recorded
    return _native, ""


def load() -> ModuleType | None:
    """alphaprune._native, or None where it was not built."""
    return _find()[0]


def weight(packed: Packed, isa: str) -> Any:
    """The native view of a validated weight, bound to an instruction set; it does not keep the tensors alive."""
    addresses = packed.weight.data_ptr(), packed.mask.data_ptr(), packed.offsets.data_ptr()
    scale, groups = (0, 0) if packed.scale is None else (packed.scale.data_ptr(), packed.scale[0].numel())
    return load().Weight(*addresses, scale, *packed.shape, groups, DTYPES[packed.dtype], isa)


def status() -> str:
    """`built: …` with compiler and usable instruction sets, or `not built: ` and the reason."""
    module, reason = _find()
    if module is None:
        return f"not built: {reason}"
    usable = [name for name, missing in module.isas() if not missing]
    return f"built: {module.COMPILER}; {', '.join(usable)}"
