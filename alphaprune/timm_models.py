"""Image models of timm from a checkpoint on this machine, as trees of modules."""

import importlib
from pathlib import Path

from alphaprune.files import first_line
from alphaprune.trees import Tree

PREFIX = "timm:"


def open_timm(name: str, weights: "str | None", blocks: str | None = None) -> Tree:
    """The architecture `timm:NAME` with the weights of a file (safetensors or pt); nothing is ever downloaded.

    blocks: as `Tree` has it.   ValueError in one sentence if timm, the architecture or the file cannot be used.
    """
    if weights is None:
        raise ValueError(f"{name}: give --weights FILE, a checkpoint of it (safetensors or pt); nothing is downloaded")
    if not Path(weights).is_file():
        raise ValueError(f"--weights {weights}: there is no such file")
    try:
        timm = importlib.import_module("timm")
    except Exception as error:  # torchvision, which it needs, fails in ways of its own beside another torch
        raise ValueError(
            f"{name}: timm cannot be imported here ({first_line(error)}): pip install 'alphaprune[vision]', with the "
            f"torchvision that belongs to this torch"
        ) from error
    kind = name.removeprefix(PREFIX)
    if not timm.is_model(kind):
        raise ValueError(f"{name}: timm has no such architecture; timm.list_models() names them")
    module = timm.create_model(kind, pretrained=False).eval()
    try:
        timm.models.load_checkpoint(module, weights)
    except Exception as error:  # of pickle, safetensors, zip files and torch
        raise ValueError(
            f"--weights {weights}: cannot be read as a checkpoint of {kind}: {first_line(error)}"
        ) from error
    tree = Tree(module, blocks)
    tree.name = name
    return tree
