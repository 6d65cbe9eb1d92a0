"""The devices that PyTorch can use here, by the names that users type, and why one is not among them."""

import os
import warnings

import torch

from alphaprune import hardware

OLDEST = (8, 0)  # compute capability that the kernels for GPUs need: an A100


def named(name: str, auto: bool = False) -> torch.device:
    """The device called cpu, cuda or cuda:N; with `auto`, "auto" is the first GPU, or the CPU where there is none.

    ValueError in one sentence with the remedy if it is no such name, or there is no such device here.
    """
    if auto and name == "auto":
        return torch.device("cuda" if no_cuda() is None else "cpu")
    kind, colon, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (colon and (kind == "cpu" or not index.isdecimal())):
        raise ValueError(f"--device {name}: wanted {'auto, ' if auto else ''}cpu, cuda or cuda:N")
    if kind == "cuda":
        if reason := no_cuda():
            raise ValueError(f"--device {name}: {reason}")
        count = torch.cuda.device_count()
        if index and int(index) >= count:
            raise ValueError(f"--device {name}: PyTorch sees {count} GPUs here, the last of which is cuda:{count - 1}")
    return torch.device(name)


def no_cuda() -> str | None:
    """None, or why PyTorch can use no NVIDIA GPU here, and the remedy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a driver that is too old it warns in many lines; here it is one sentence
        if torch.cuda.is_available():
            return None
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} was built without CUDA; install a wheel from PyTorch's CUDA index"
    return f"PyTorch {torch.__version__} finds no NVIDIA GPU: {no_device(torch.version.cuda)}"


def no_device(made_for: str) -> str:
    """Why the driver offers no GPU to a program that was made for a version of CUDA, such as "13.0", and the remedy."""
    served = hardware.cuda_driver()
    if served is None:
        return f"no NVIDIA driver is installed; it takes one for CUDA {made_for} or newer"
    major, minor = served
    if major < int(made_for.split(".")[0]):  # within a major version older drivers serve newer programs
        return (
            f"the NVIDIA driver serves CUDA up to {major}.{minor}, and this was made for CUDA {made_for}; update the "
            f"driver or install a build for CUDA {major}"
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return f"the environment has CUDA_VISIBLE_DEVICES={visible}, which hides those that there are"
    return "the NVIDIA driver shows none; nvidia-smi tells what it sees"


def too_old() -> str | None:
    """None, or why the kernels do not run on the current CUDA device, and the remedy."""
    major, minor = torch.cuda.get_device_capability()
    return None if (major, minor) >= OLDEST else f"{torch.cuda.get_device_name()} {older(10 * major + minor)}"


def older(capability: int) -> str:
    """What is said of a device of this compute capability, major · 10 + minor, that the kernels do not run on."""
    wanted = ".".join(map(str, OLDEST))
    return f"has compute capability {capability / 10}, wanted {wanted} (A100) or newer; take another GPU, or the CPU"
