"""How much memory the keys and values of running requests may take."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from alphaprune import memory, shapes
from alphaprune.console import size
from alphaprune.serving.request import Defaults

CPU = torch.device("cpu")
MODEST = 10**9  # bytes beside a CPU, unless a quarter of what is free is less
SCRATCH = 10**9  # bytes that a GPU may need beside weights and KV: activations, logits, graphs, expanded rows


@dataclass(frozen=True)
class KV:
    """A cache of `blocks` blocks for `block` tokens each, `block_bytes` bytes per block over all layers.

    context: the most tokens a request may have, prompt and answer together.
    """

    blocks: int
    block: int
    block_bytes: int
    context: int

    @property
    def tokens(self) -> int:
        return self.blocks * self.block

    def __str__(self) -> str:
        room = f"{self.tokens} tokens in {self.blocks} blocks of {self.block}, {size(self.blocks * self.block_bytes)}"
        return f"KV cache for {room}; at most {self.context} tokens per request"


def defaults(settings: Any) -> Defaults:
    """What the generation_config of a model wants for requests that do not say otherwise."""
    wanted = {
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": settings.top_k,
        "min_p": settings.min_p,
        "repetition": settings.repetition_penalty,
    }
    return Defaults(**{name: value for name, value in wanted.items() if value is not None})


def room(device: torch.device) -> float:
    """Bytes for keys and values unless somebody says how many: of a GPU all that is free but SCRATCH."""
    free = memory.free(device)
    if device.type == "cuda":
        return free - SCRATCH
    return MODEST if free is None else min(MODEST, free / 4)


def room_for_copies(device: torch.device, asked: float | None) -> float:
    """Bytes that kernels may take for layouts of their own: of a GPU what is free but SCRATCH and the KV cache.

    asked: bytes of the KV cache; where nobody says how many, it is to have as much as the copies.
    """
    if device.type != "cuda":
        return math.inf
    free = memory.free(device) - SCRATCH
    return free / 2 if asked is None else free - asked


def block_bytes(config: Any, dtype: torch.dtype, block: int) -> int:
    """Bytes of a block of `block` tokens over all layers."""
    config = config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * head * dtype.itemsize * block


def plan(
    config: Any,
    dtype: torch.dtype,
    running: int,
    block: int,
    blocks: int | None = None,
    limit: float | None = None,
    device: torch.device = CPU,
) -> KV:
    """The cache for `running` requests at a time: `blocks` blocks, or as many as fit into `limit` bytes.

    By default no more than every request could fill, in the `room` of the device.
    Raises ValueError if that is less than one block.
    """
    if shapes.of(config).kv_heads:
        raise ValueError(
            "serve has one number of KV heads for all blocks, and this model has one for each; serve a model that lost "
            "channels only (compress --parts channels), or use generate and chat"
        )
    nbytes = block_bytes(config, dtype, block)
    longest = getattr(config.get_text_config(), "max_position_embeddings", None) or 2**31
    if blocks is None:
        given = limit is not None
        limit = limit if given else max(0, room(device))
        blocks = int(limit // nbytes)
        if blocks < 1:
            raise ValueError(
                f"{size(limit)} for keys and values is less than one block of {block} tokens, {size(nbytes)}; "
                f"give more --kv-memory or a smaller --block-size"
            )
        if not given:
            blocks = min(blocks, running * -(-longest // block))
    return KV(blocks, block, nbytes, min(longest, blocks * block))
