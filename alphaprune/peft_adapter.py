"""LoRA on packed layers, as PEFT has it on nn.Linear: every LoraConfig takes SparseLinear, "all-linear" included.

Imported by the hook in the package's `__init__` as soon as PEFT's own LoRA model is. PEFT lets a LoraConfig name
classes for layers that it does not know; here they are named for all of them, also those that are read from a file.
"""

import functools
from typing import Any

from peft.tuners import tuners_utils
from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.layer import Linear
from torch import nn

from alphaprune.layer import SparseLinear

ALL_LINEAR = "all-linear"
# Values that read and change no base weight. None: of versions of PEFT that have no such setting.
HARMLESS = {"init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"), "use_dora": (False, None)}


class LoraSparseLinear(Linear):
    """y = x Wᵀ + b + s·B A x with a packed W, which stays as it is; A and B train.

    ValueError naming the layer where a setting needs the dense weight, and on merging.
    """

    def update_layer(self, adapter_name: str, *arguments: Any, **settings: Any) -> None:
        # For the first adapter called by __init__, for later ones by PEFT itself.
        def asked(name: str) -> Any:
            return getattr(settings.get("config"), name, settings.get(name))

        for name, harmless in HARMLESS.items():
            if asked(name) not in harmless:
                raise ValueError(
                    f"{packed_name(self)}: {name}={asked(name)!r} needs the dense weight, this layer is packed; "
                    f"leave it out, or expand the model with model.dequantize() first"
                )
        super().update_layer(adapter_name, *arguments, **settings)

    @property
    def lora_variants(self) -> dict:
        return {(): None}

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return module.in_features, module.out_features

    def merge(self, *_: Any, **__: Any) -> None:
        raise ValueError(
            f"{packed_name(self)}: an adapter cannot be merged into a packed layer, for the sum has no zeros; keep the "
            f"adapter beside it, or load it onto model.dequantize() and merge it there"
        )


def packed_name(layer: nn.Module) -> str:
    """The name that a packed layer has in its model, adapters on it or not."""
    while hasattr(layer, "base_layer"):
        layer = layer.base_layer
    return layer.name or "SparseLinear"


def _after_init(original: Any) -> Any:
    @functools.wraps(original)
    def init(self: LoraConfig) -> None:
        original(self)
        self._register_custom_module({SparseLinear: LoraSparseLinear})

    return init


def _with_packed(original: Any) -> Any:
    @functools.wraps(original)
    def include(peft_config: Any, model: nn.Module) -> Any:
        asked = getattr(peft_config, "target_modules", None)
        every = isinstance(asked, str) and asked.lower() == ALL_LINEAR
        peft_config = original(peft_config, model)
        if every:
            packed = {name for name, module in model.named_modules() if isinstance(module, SparseLinear)}
            # Those that have an adapter already count as that adapter, which PEFT itself has found.
            peft_config.target_modules |= {name for name in packed if not name.endswith(".base_layer")}
        return peft_config

    return include


LoraConfig.__post_init__ = _after_init(LoraConfig.__post_init__)
tuners_utils._maybe_include_all_linear_layers = _with_packed(tuners_utils._maybe_include_all_linear_layers)
