"""Heavy-tailed layerwise pruning of language models, and the sparse kernels that make the result fast.

Importing this package is cheap: public names are imported on first use. transformers learns of our packed directories
and PEFT of our packed layers when they are imported themselves, before or after this package.
"""

import importlib
import importlib.abc
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the names below, for those who read types
    from alphaprune.analysis import Analysis as Analysis
    from alphaprune.analysis import analyze as analyze
    from alphaprune.checkpoint import save as save
    from alphaprune.compressions import CompressionPlan as CompressionPlan
    from alphaprune.compressions import compress as compress
    from alphaprune.head import round_head as round_head
    from alphaprune.hf import AlphaPruneConfig as AlphaPruneConfig
    from alphaprune.hf import load as load
    from alphaprune.layer import SparseLinear as SparseLinear
    from alphaprune.layer import round_activations as round_activations
    from alphaprune.layer import sparsify as sparsify
    from alphaprune.pages import huge_pages as huge_pages
    from alphaprune.plan_file import Plan as Plan
    from alphaprune.planning import plan as plan
    from alphaprune.pruning import prune as prune
    from alphaprune.recovery import recover as recover
    from alphaprune.textgen import TextGeneration as TextGeneration
    from alphaprune.trees import Tree as Tree

__version__ = "0.1.0"

_PUBLIC = {
    "analyze": "analysis",
    "Analysis": "analysis",
    "plan": "planning",
    "Plan": "planning",
    "prune": "pruning",
    "recover": "recovery",
    "Tree": "trees",
    "compress": "compressions",
    "CompressionPlan": "compressions",
    "sparsify": "layer",
    "SparseLinear": "layer",
    "save": "checkpoint",
    "load": "hf",
    "round_activations": "layer",
    "round_head": "head",
    "huge_pages": "pages",
    "AlphaPruneConfig": "hf",
    "TextGeneration": "textgen",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})


# Modules of others → ours that makes itself known to them.
_FOLLOWERS = {"transformers.quantizers.auto": "hf", "peft.tuners.lora.model": "peft_adapter"}


class _ImportAfter(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Lets the import of a module run as usual, then imports ours that adds to it."""

    _loader: Any  # that of the watched module

    def __init__(self, watched: str) -> None:
        self.watched = watched

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.watched:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: Any) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        importlib.import_module(f"alphaprune.{_FOLLOWERS[self.watched]}")


for _watched, _follower in _FOLLOWERS.items():
    if _watched in sys.modules:
        importlib.import_module(f"alphaprune.{_follower}")
    else:
        sys.meta_path.insert(0, _ImportAfter(_watched))
