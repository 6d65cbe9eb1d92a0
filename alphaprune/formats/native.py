"""The compiled modules of the package, if they were built: found once, on first use."""

import functools
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import torch  # before _native, whose OpenMP symbols resolve to the libgomp that torch loads

from alphaprune.formats.packed import Packed

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 3}  # csrc/layout.h
PACKAGE = Path(__file__).resolve().parents[1]


def find(name: str) -> tuple[ModuleType | None, str]:
    """A compiled module of the package and an empty string, or None and the reason.

    Where setup.py could not build it, it left the reason in a file.
    """
    try:
        return importlib.import_module(f"alphaprune.{name}"), ""
    except ModuleNotFoundError as error:
        if error.name != f"alphaprune.{name}":
            return None, str(error)
        recorded = PACKAGE / f"{name}_reason.txt"
        return None, recorded.read_text().strip() if recorded.exists() else "the extension was never compiled"
    except ImportError as error:
        return None, str(error)


@functools.cache
def _find() -> tuple[ModuleType | None, str]:
    return find("_native")


def load() -> ModuleType | None:
    """alphaprune._native, or None where it was not built."""
    return _find()[0]


def weight(packed: Packed, isa: str) -> Any:
    """The native view of a validated weight, bound to an instruction set; it does not keep the tensors alive."""
    addresses = packed.weight.data_ptr(), packed.mask.data_ptr(), packed.offsets.data_ptr()
    scale, groups = (0, 0) if packed.scale is None else (packed.scale.data_ptr(), packed.scale[0].numel())
    kind = DTYPES[packed.dtype], packed.bytes_allowed
    return load().Weight(*addresses, scale, *packed.shape, groups, *kind, isa)


def status() -> str:
    """`built: …` with compiler and usable instruction sets, or `not built: ` and the reason."""
    module, reason = _find()
    if module is None:
        return f"not built: {reason}"
    usable = [name for name, missing in module.isas() if not missing]
    return f"built: {module.COMPILER}; {', '.join(usable)}"
