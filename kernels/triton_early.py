"""Triton kernels that begin while the one before them ends: programmatic dependent launch, from Hopper on.

A kernel of a step is over in a few microseconds, and a launch behind another costs one. So every kernel here and in
csrc/cuda says at once that the next may begin, and waits, before it reads or writes anything but weights, until the
one before has ended. As all of them wait, the end of one means the end of all before it. Kernels of other libraries
between them are right without a word: one that is started as usual begins after the end of those before it, and one
that says nothing lets the next begin when it has ended.
"""

import ctypes
import functools
import importlib.util

import torch
import triton
import triton.language as tl
from torch import Tensor

GRAPHS = 12030  # graphs hold such launches from CUDA 12.3 on, as cuDriverGetVersion says it


@triton.jit
def let_next_begin(EARLY: tl.constexpr):
    """The next kernel may begin as soon as every program of this one has been here; it then waits by itself."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_kernels_before(EARLY: tl.constexpr):
    """Until the kernels before this one have ended and all that they wrote is there. Every program has to call it."""
    if EARLY:
        tl.extra.cuda.gdc_wait()


def driver_version() -> int:
    """CUDA's version of the driver, 12030 for 12.3; 0 if it does not say."""
    version = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return 0
    return version.value


@functools.cache
def possible(index: int) -> bool:
    """Whether a GPU, its driver and this Triton start kernels early."""
    capable = torch.cuda.get_device_capability(index) >= (9, 0) and driver_version() >= GRAPHS
    return capable and importlib.util.find_spec("triton.language.extra.cuda.gdc") is not None


def options(x: Tensor) -> dict[str, bool]:
    """What a launch is given for a kernel that works beside x: nothing but a constant where nothing starts early."""
    if x.is_cuda and possible(x.device.index or 0):
        return {"EARLY": True, "launch_pdl": True}
    return {"EARLY": False}
