"""What is known of every family of models, by the `model_type` of its config. Nothing is guessed from names.

A family that is not here is refused. To add one: a line in FAMILIES, or in MULTIMODAL where a text model is one part of
the whole, and a small config in tests/family_models.py, with which it goes through analysis, pruning, packing and
generation; `python bench/families.py` writes docs/families.md.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

HEAD = "lm_head"  # what multimodal models call it


@dataclass(frozen=True)
class Experts:
    """The experts of a block, of which a router chooses some for every token.

    path: of the module that holds them, inside the block. In the model of transformers its parameters are
    `gate_up_proj` [experts, 2·I, H] and `down_proj` [experts, H, I]; in checkpoints each expert has its own matrices.
    gate, up, down: what those are called there, behind the number of the expert: down(act(gate x) · up x).
    """

    path: str
    gate: str
    up: str
    down: str

    def holds(self, inner: str) -> bool:
        """Whether a layer of this name inside a block belongs to an expert."""
        layers = "|".join(re.escape(name) for name in (self.gate, self.up, self.down))
        return re.fullmatch(rf"{re.escape(self.path)}\.\d+\.({layers})(\..*)?", inner) is not None

    def groups(self, index: "int | str") -> tuple[tuple[str, ...], ...]:
        """The layers of one expert, by name inside the block; those of one group are given the same input."""
        inner = f"{self.path}.{index}."
        return (inner + self.gate, inner + self.up), (inner + self.down,)


@dataclass(frozen=True)
class Family:
    """One kind of model.

    blocks: path of the list of decoder blocks in the causal language model.
    prunable: the linear layers inside a block that are pruned, where the block has them; the layers of one group are
    given the same input.   experts: those besides.   dense: what stays as it is though it multiplies, such as routers.
    resizable: the layers are those of GATED, and the forward pass takes the numbers of heads and channels from their
    tensors, so that blocks may have fewer of them than the config says, see shapes.py.
    stored: what parts of tensor names are called in the module and in checkpoints, where that differs; one that starts
    with a dot may stand anywhere, any other begins the name.
    text: path of the text model, where there are others beside it, such as for pictures, which stay as they are.
    """

    blocks: str
    prunable: tuple[tuple[str, ...], ...]
    experts: Experts | None = None
    dense: tuple[str, ...] = ()
    resizable: bool = False
    stored: tuple[tuple[str, str], ...] = ()
    text: str = ""

    def prunes(self, inner: str) -> bool:
        """Whether a layer of this name inside a block is pruned; so are the layers that one consists of."""
        if self.experts is not None and self.experts.holds(inner):
            return True
        return any(inner == name or inner.startswith(f"{name}.") for group in self.prunable for name in group)

    def groups(self, experts: "int | str" = "*") -> Iterator[tuple[str, ...]]:
        """All groups of a block, experts once each or, by default, one that stands for all."""
        yield from self.prunable
        if self.experts is not None:
            for index in range(experts) if isinstance(experts, int) else (experts,):
                yield from self.experts.groups(index)

    def is_text(self, name: str) -> bool:
        """Whether a tensor of the module belongs to the text model or its head."""
        return not self.text or name.startswith((f"{self.text}.", f"{HEAD}."))

    def stored_name(self, name: str) -> str:
        """What a tensor of the module is called in a checkpoint."""
        return _renamed(name, self.stored)

    def module_name(self, name: str) -> str:
        """What a tensor of a checkpoint is called in the module; the inverse of `stored_name`.

        Some checkpoints have the names of the module already.
        """
        if any(name.startswith(here) for here, _ in self.stored if not here.startswith(".")):
            return name
        return _renamed(name, tuple((there, here) for here, there in self.stored))


def _renamed(name: str, parts: tuple[tuple[str, str], ...]) -> str:
    for before, after in parts:
        if before.startswith(".") and before in name:
            return name.replace(before, after, 1)
        if not before.startswith(".") and name.startswith(before):
            return after + name.removeprefix(before)
    return name


@dataclass(frozen=True)
class Multimodal:
    """A model that holds a text model, of which the layers are pruned, beside others that are copied as they are.

    stored: as of a family.   like: the family that its text model is of, where `model_type` of `text_config` has a name
    that only stands there; by default that is it.
    """

    stored: tuple[tuple[str, str], ...] = ()
    like: str | None = None


_ATTENTION = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",))
_MLP = (("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))
_SHARED_EXPERT = (("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"), ("mlp.shared_expert.down_proj",))
_QWEN_EXPERTS = Experts("mlp.experts", "gate_proj", "up_proj", "down_proj")
GATED = _ATTENTION + _MLP

LLAMA = Family("model.layers", GATED, resizable=True)
FAMILIES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma": LLAMA,
    "gemma2": LLAMA,
    "gemma3_text": LLAMA,
    "phi3": Family(
        "model.layers", (("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",))
    ),
    "opt": Family("model.decoder.layers", (_ATTENTION[0], ("self_attn.out_proj",), ("fc1",), ("fc2",))),
    "falcon": Family(
        "transformer.h",
        (
            ("self_attention.query_key_value",),
            ("self_attention.dense",),
            ("mlp.dense_h_to_4h",),
            ("mlp.dense_4h_to_h",),
        ),
    ),
    "mpt": Family("transformer.blocks", (("attn.Wqkv",), ("attn.out_proj",), ("ffn.up_proj",), ("ffn.down_proj",))),
    "mixtral": Family(
        "model.layers",
        _ATTENTION,
        Experts("mlp.experts", "w1", "w3", "w2"),
        dense=("mlp.gate",),
        stored=((".mlp.", ".block_sparse_moe."),),
    ),
    "qwen2_moe": Family(
        "model.layers", GATED + _SHARED_EXPERT, _QWEN_EXPERTS, dense=("mlp.gate", "mlp.shared_expert_gate")
    ),
    "qwen3_moe": Family("model.layers", GATED, _QWEN_EXPERTS, dense=("mlp.gate",)),
}

_LLAVA_NAMES = (
    ("model.language_model.", "language_model.model."),
    (f"{HEAD}.", f"language_model.{HEAD}."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.image_newline", "image_newline"),
)
_QWEN_NAMES = (("model.language_model.", "model."), ("model.visual.", "visual."))
SIZES = {  # of a text model, that all families count from 1 if they have them
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings"),
}
TEXT = "model.language_model"  # path of the text model in all of these
MULTIMODAL = {
    "gemma3": Multimodal(_LLAVA_NAMES),
    "llava": Multimodal(_LLAVA_NAMES),
    "llava_next": Multimodal(_LLAVA_NAMES),
    "mistral3": Multimodal(_LLAVA_NAMES),
    "paligemma": Multimodal(_LLAVA_NAMES),
    "qwen2_vl": Multimodal(_QWEN_NAMES, like="qwen2"),
    "qwen2_5_vl": Multimodal(_QWEN_NAMES, like="qwen2"),
    "qwen3_vl": Multimodal(like="qwen3"),
}


def text_config(config: Any) -> Any:
    """What a config of transformers says of the text model: all of it, but in multimodal models."""
    return config.get_text_config()


def check_written(found: Any) -> None:
    """ValueError if what a config.json holds can be of no model; transformers says less of it, or nothing."""
    if not isinstance(found, dict):
        raise ValueError(f"wanted one JSON object, it is {json.dumps(found)[:40]}")
    settings = found.get("quantization_config", {})
    if not isinstance(settings, dict):
        raise ValueError(f"quantization_config should be an object, it is {settings!r}")
    text = found.get("text_config")
    for part in (found, text if isinstance(text, dict) else {}):
        for name in sorted(SIZES & part.keys()):
            if isinstance(part[name], int) and part[name] < 1:
                raise ValueError(f"{name} is {part[name]}; wanted 1 or more")


def of(config: Any) -> Family | None:
    """The line of a model's family, with the paths that there are in a multimodal model; None if there is none."""
    if (whole := MULTIMODAL.get(config.model_type)) is None:
        return FAMILIES.get(config.model_type)
    family = FAMILIES.get(whole.like or text_config(config).model_type)
    if family is None or family.stored:
        return None
    _, _, inside = family.blocks.partition(".")
    return replace(family, blocks=f"{TEXT}.{inside}", stored=whole.stored, text=TEXT)


def kind(config: Any) -> str:
    """The model type in quotes, with that of the text model where it is one part of the whole."""
    if config.model_type not in MULTIMODAL:
        return repr(config.model_type)
    return f"{config.model_type!r} with a text model {text_config(config).model_type!r}"


def auto_class(config: Any) -> Any:
    """The class of transformers that makes a causal language model of a config, pictures included where it has them."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if config.model_type in MULTIMODAL else AutoModelForCausalLM


def known() -> str:
    """The model types that there are lines for, in a list with commas."""
    return ", ".join((*FAMILIES, *MULTIMODAL))


def linears_of(name: str, block: nn.Module, family: Family) -> dict[str, nn.Linear]:
    """The prunable layers of a block by full name, in order.

    ValueError naming a linear layer of which the family's line does not say what becomes of it.
    """
    linears = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
    found = {f"{name}.{inner}": layer for inner, layer in linears.items() if family.prunes(inner)}
    if others := [inner for inner in linears if not family.prunes(inner) and inner not in family.dense]:
        raise ValueError(
            f"{name}.{others[0]}: a linear layer that the line of this family in alphaprune/families.py does not name; "
            f"add it there, to what is prunable or to what stays dense"
        )
    return found


def module_lists(skeleton: nn.Module) -> str:
    """A sentence on the lists of modules that a model has, and the linear layers in the first of each; or nothing."""
    lists = [(n, m) for n, m in skeleton.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    told = []
    for name, modules in lists:
        if any(name.startswith(f"{outer}.") for outer, _ in lists):
            continue
        names = [n for n, m in modules[0].named_modules() if isinstance(m, nn.Linear)]
        others = sorted({type(m).__name__ for m in modules[0].modules() if _multiplies(m)})
        inside = f"{len(names)} linear layers ({', '.join(names)})" if names else "no linear layer"
        inside += "".join(f", and {other}, which is not pruned" for other in others)
        told.append(f"{name}, {len(modules)} of them, in the first {inside}")
    return f"Its lists of modules: {'; '.join(told)}. " if told else ""


def _multiplies(module: nn.Module) -> bool:
    """Whether a module that is no nn.Linear has a matrix of its own."""
    matrix = any(parameter.ndim > 1 for parameter in module.parameters(recurse=False))
    return matrix and not isinstance(module, nn.Linear | nn.Embedding)
