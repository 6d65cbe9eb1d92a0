"""One lean decoder for the LLaMA family: the modules of a loaded transformers model, a static cache, and no more.

transformers' own forward spends milliseconds per token around the products; here a block is about twenty calls of
torch. Weights are shared with the model, never copied. `Decoder` is stateless, `State` is one batch of sequences:

    decoder = Decoder(model)
    state = decoder.state(batch=1, capacity=512)
    logits = decoder.prefill(state, prompt)      # [batch, tokens] → [batch, vocabulary]
    logits = decoder.step(state, logits.argmax(-1))   # [batch] → [batch, vocabulary]
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from alphaprune import blocks, pages, shapes
from alphaprune.blocks import Block
from alphaprune.kernels import cpu_attention

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3")
STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # frequencies that do not depend on the length
GROWING_ROPE = ("dynamic", "longrope")
CHUNK = 1024  # tokens per pass of a prefill: bounds the activations, and the mask where one is needed


def why_not(config: Any, model: nn.Module | None = None) -> str | None:
    """Why this decoder does not run models of such a config (or this very model), in one sentence; None if it does."""
    kind = getattr(config, "model_type", None)
    if kind not in FAMILIES:
        return f"model type {kind} is none of {', '.join(FAMILIES)}"
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") not in STATIC_ROPE + GROWING_ROPE:
        return f"rope type {rope.get('rope_type')} is none of {', '.join(STATIC_ROPE + GROWING_ROPE)}"
    if kind == "phi3" and rope.get("rope_type", "default") in GROWING_ROPE:
        return "Phi-3 computes all keys anew where its frequencies change"
    if (rope.get("partial_rotary_factor") or 1.0) != 1.0:
        return "only a part of each head is rotated (partial_rotary_factor)"
    others = {*(getattr(config, "layer_types", None) or ())} - {"full_attention", "sliding_attention"}
    if others:
        return f"attention of type {', '.join(sorted(others))} is not known"
    if model is not None and not hasattr(getattr(model, "model", None), "layers"):
        return f"{type(model).__name__} is no plain causal language model of transformers"
    if model is not None and shapes.observe(model.model.layers, "", config).kv_heads:
        return "its blocks have different numbers of heads"
    if model is not None:
        devices = {str(tensor.device) for tensor in (*model.parameters(), *model.buffers())}
        if len(devices) > 1:
            return f"the model is spread over several devices ({', '.join(sorted(devices))}); load it onto one of them"
    return None


class State:
    """A batch of sequences of equal length: their keys and values, and how many positions are taken.

    cache: [blocks, 2, batch, key heads, capacity, head dim] in the model's dtype; paged: of each block the same memory,
    a page per sequence, [2, batch, capacity, key heads, head dim]. cos, sin: [capacity, 1, 2, dim / 2], the sine with
    its sign for each half of a head.
    """

    def __init__(self, decoder: "Decoder", batch: int, capacity: int) -> None:
        shape = (len(decoder.blocks), 2, batch, decoder.key_heads, capacity, decoder.head_dim)
        self.cache = pages.empty(shape, decoder.dtype, decoder.device)
        self.batch, self.capacity, self.length = batch, capacity, 0
        self.cos, self.sin = decoder.rotations(0, min(capacity, decoder.table_end), decoder.table_end)
        self.paged = self.cache.transpose(3, 4).unbind(0)
        self.slots = torch.arange(batch, device=decoder.device)
        self.table = self.slots[:, None]  # the page of each
        self.positions = torch.zeros_like(self.slots)
        self.one = _Heads(decoder, batch, 1)

    def reset(self) -> None:
        """Forgets the sequences; the memory stays."""
        self.length = 0

    def take(self, tokens: int) -> tuple[int, int]:
        """Positions [start, end) of the next tokens; ValueError if the cache does not hold so many."""
        end = self.length + tokens
        if end > self.capacity:
            raise ValueError(
                f"the cache holds {self.capacity} positions, {self.length} are taken and {tokens} more are wanted; "
                f"make a state with a larger capacity"
            )
        return self.length, end


class _Heads:
    """The projections of one pass, side by side in one buffer that all blocks share, and the views that they need.

    rows: [tokens of all sequences, heads × dim], heads of q, k, v. turned: q and k [batch, tokens, heads, 2, dim / 2].
    """

    def __init__(self, decoder: "Decoder", batch: int, tokens: int) -> None:
        d, per_key = decoder, decoder.heads // decoder.key_heads
        # On CPUs the product of a single half-precision row with the keys takes 3 times as long as that of two.
        self.twice = tokens == per_key == 1 and d.device.type == "cpu" and d.dtype.itemsize == 2
        queries = d.heads * (1 + self.twice)
        rows = queries + 2 * d.key_heads
        self.batch, self.tokens, self.shared = batch, tokens, tokens > 1 and per_key > 1
        self.rows = torch.empty(batch * tokens, rows * d.head_dim, dtype=d.dtype, device=d.device)
        self.halves = self.rows.view(batch, tokens, rows, 2, d.head_dim // 2)[:, :, : queries + d.key_heads]
        heads = self.rows.view(batch, tokens, rows, d.head_dim)
        self.turned = heads[:, :, : queries + d.key_heads]  # the same memory as halves
        if tokens == 1:  # the queries that share a key head are the rows of one product
            self.q = heads[:, 0, :queries].unflatten(1, (2, -1) if self.twice else (d.key_heads, per_key))
            self.q = self.q.transpose(1, 2) if self.twice else self.q  # [batch, key heads, rows, dim]
        else:
            self.q = heads[:, :, :queries].transpose(1, 2)  # [batch, heads, tokens, dim]
        kv = heads[:, :, queries:].view(batch, tokens, 2, d.key_heads, d.head_dim)
        self.kv = kv.permute(2, 0, 3, 1, 4)  # [2, batch, key heads, tokens, dim]

    def take(self, block: Block, h: Tensor, delta: Tensor | None, rope: tuple[Tensor, Tensor]) -> None:
        """Takes the block's projections of h + delta, rotated."""
        q, k, v = block.qkv(h, delta)  # each [tokens of all sequences, heads × dim]
        torch.cat((q, q, k, v) if self.twice else (q, k, v), -1, out=self.rows)
        if block.head_norm is not None:
            block.head_norm(self.turned)
        cos, sin = rope
        swapped = self.halves.flip(3)
        self.halves.mul_(cos).addcmul_(swapped, sin)

    def attend(self, keys: Tensor, values: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """Attention of the queries over keys and values [batch, key heads, length, dim] → [tokens, heads × dim]."""
        found = functional.scaled_dot_product_attention(
            self.q, keys, values, attn_mask=mask, is_causal=causal, enable_gqa=self.shared
        )
        return self.joined(found[:, :, 0] if self.twice else found)

    def joined(self, found: Tensor) -> Tensor:
        """[tokens, heads × dim] of what attention gives."""
        if self.tokens > 1:
            found = found.transpose(1, 2)
        return found.reshape(self.batch * self.tokens, -1)


class _New:
    """Attention of one new token of each sequence, of position `start`, where it is one native call."""

    def __init__(self, state: State, start: int, rope: tuple[Tensor, Tensor]) -> None:
        self.state, (cos, sin) = state, rope  # [1, 1, 2, dim / 2]
        self.turns = cos[:, 0, 0], sin[:, 0, 1]
        state.positions.fill_(start)

    def __call__(self, index: int, block: Block, h: Tensor, delta: Tensor | None) -> Tensor:
        """[batch, heads × dim] of h + delta in the block of that number."""
        s = self.state
        where = s.paged[index], s.slots, s.positions, s.table
        how = self.turns, block.window, block.head_norms, block.isa
        return cpu_attention.attend_new(*block.qkv(h, delta), *where, *how)


class _Pass:
    """Attention of new tokens [start, end) of each sequence over all that they see, by torch."""

    def __init__(
        self, heads: _Heads, state: State, start: int, end: int, rope: tuple[Tensor, Tensor], windows: set[int | None]
    ) -> None:
        self.heads, self.rope, self.start = heads, rope, start
        self.ours = cpu_attention.takes_prompts(heads.rows, end - start, end)
        self.slots = state.cache[:, :, :, :, start:end].unbind(0)  # per block [2, batch, key heads, count, dim]
        self.contexts = {window: self._context(state, start, end, window) for window in windows}

    def __call__(self, index: int, block: Block, h: Tensor, delta: Tensor | None) -> Tensor:
        """[tokens, heads × dim] of h + delta in the block of that number."""
        keys, values, first, mask, causal = self.contexts[block.window]
        self.heads.take(block, h, delta, self.rope)
        self.slots[index].copy_(self.heads.kv)
        if self.ours:
            found = cpu_attention.attend_prompt(
                self.heads.q, keys[index], values[index], self.start, first, block.window
            )
            return self.heads.joined(found)
        return self.heads.attend(keys[index], values[index], mask, causal)

    def _context(self, state: State, start: int, end: int, window: int | None) -> tuple:
        """Keys and values of each block that they see, the first position, the mask if one is needed, causal."""
        first = 0 if window is None else max(0, start - window + 1)
        seen = state.cache[:, :, :, :, first:end]
        plain = start == first == 0 and (window is None or end <= window)
        needed = not (end - start == 1 or plain or self.ours)
        mask = cpu_attention.visible(first, start, end, window, state.cache.device) if needed else None
        return (*(part.unbind(0) for part in seen.unbind(1)), first, mask, plain and end > 1)


class Decoder:
    """The decoder of a loaded model as it is now: make it again after layers were exchanged.

    Raises ValueError with the reason of `why_not` for a model that it does not run.
    """

    def __init__(self, model: nn.Module, direct: bool = True) -> None:
        config, inner = model.config, getattr(model, "model", None)
        if reason := why_not(config, model):
            raise ValueError(f"this decoder does not run the model: {reason}")
        attention = inner.layers[0].self_attn
        self.config, self.embedding = config, inner.embed_tokens.weight
        self.dtype, self.device = self.embedding.dtype, self.embedding.device
        hooked = blocks.hooked(inner.embed_tokens)  # its weight may then be a part of the table
        self._embed = inner.embed_tokens if hooked else partial(functional.embedding, weight=self.embedding)
        ranks = getattr(model, "_tp_size", None) or 1  # that share the model, of transformers' tensor parallelism
        self.heads, self.key_heads = config.num_attention_heads // ranks, config.num_key_value_heads // ranks
        self.head_dim = attention.head_dim
        self._rotary = inner.rotary_emb
        self._rope = (config.rope_parameters or {}).get("rope_type", "default")
        rope = config.rope_parameters or {}
        context = rope.get("original_max_position_embeddings") if self._rope == "longrope" else None
        # Up to this length the frequencies are those that the model was made with.
        self.table_end = (context or config.max_position_embeddings) if self._rope in GROWING_ROPE else 1 << 62
        with torch.inference_mode():
            self.blocks = [blocks.build(layer, config, self.head_dim, direct, ranks) for layer in inner.layers]
        self._channels = [layer.mlp.down_proj.in_features for layer in inner.layers]
        self._norm, self._head = blocks.norm(inner.norm), blocks.linear(model.lm_head, direct)

    @torch.inference_mode()
    def state(self, batch: int = 1, capacity: int | None = None) -> State:
        """An empty cache for `batch` sequences of up to `capacity` positions, by default the context of the model."""
        if batch < 1 or (capacity is not None and capacity < 1):
            raise ValueError(f"a state needs at least one sequence and one position, got {batch} and {capacity}")
        return State(self, batch, capacity or self.config.max_position_embeddings)

    @torch.inference_mode()
    def prefill(self, state: State, tokens: Tensor, chunk: int = CHUNK) -> Tensor:
        """Logits [batch, vocabulary] after the last of `tokens` [batch, count], in the model's dtype.

        They continue what the state holds. ValueError if they do not fit into it.
        """
        if tokens.dim() != 2 or tokens.shape[0] != state.batch or tokens.shape[1] == 0:
            raise ValueError(
                f"prefill of {state.batch} sequences needs tokens [{state.batch}, 1…], got {[*tokens.shape]}"
            )
        _, end = state.take(tokens.shape[1])
        for part in tokens.split(chunk, 1):
            h = self._run(state, part, end)
        return self.logits(h[:, -1])

    @torch.inference_mode()
    def step(self, state: State, tokens: Tensor) -> Tensor:
        """Logits [batch, vocabulary] after one more token of each sequence: tokens [batch]."""
        if tokens.shape != (state.batch,):
            raise ValueError(f"a step of {state.batch} sequences needs tokens [{state.batch}], got {[*tokens.shape]}")
        _, end = state.take(1)
        return self.logits(self._run(state, tokens[:, None], end)[:, -1])

    def products(self) -> list[tuple[Callable[[Tensor], Any], int]]:
        """Every product of a step with a weight, in order: what to call with x [batch, K], and K. For timing."""
        hidden, found = self.config.hidden_size, []
        for block, inside in zip(self.blocks, self._channels, strict=True):
            found += [(block.qkv.multiply, hidden), (block.out.product, self.heads * self.head_dim)]
            found += [(block.inside.multiply, hidden), (block.down.product, inside)]
        return [*found, (self._head, hidden)]

    def rotations(self, start: int, end: int, length: int) -> tuple[Tensor, Tensor]:
        """Cosine and signed sine [end - start, 1, 2, dim / 2] for positions [start, end) of a sequence of `length`.

        Frequencies and scaling are transformers' own; the formula is that of its rotary embedding.
        """
        frequencies, scaling = self._rotary.original_inv_freq, self._rotary.attention_scaling
        if length > self.table_end:
            frequencies, scaling = ROPE_INIT_FUNCTIONS[self._rope](self.config, self.device, seq_len=length)
        position = torch.arange(start, end, device=self.device).float()
        angles = position[:, None] * frequencies.to(self.device, torch.float32)  # [positions, dim / 2]
        cos, sin = ((f(angles) * scaling).to(self.dtype) for f in (torch.cos, torch.sin))
        return torch.stack((cos, cos), 1)[:, None], torch.stack((-sin, sin), 1)[:, None]

    def _run(self, state: State, tokens: Tensor, length: int) -> Tensor:
        """Hidden states [batch, count, hidden] of tokens [batch, count], whose keys and values the state then holds.

        length: of the whole sequence that they are a part of.
        """
        batch, count = tokens.shape
        start, end = state.take(count)
        if length > self.table_end:
            rope = self.rotations(start, end, length)
        else:
            rope = state.cos[start:end], state.sin[start:end]
        h, delta = self._embed(tokens).view(batch * count, -1), None
        if count == 1 and cpu_attention.takes(h, state.paged[0]):
            attend = _New(state, start, rope)
        else:
            heads = state.one if count == 1 else _Heads(self, batch, count)
            attend = _Pass(heads, state, start, end, rope, {block.window for block in self.blocks})
        for index, block in enumerate(self.blocks):
            delta = block.mlp(h, block.out(attend(index, block, h, delta), h))
        state.length = end
        return (h if delta is None else h.add_(delta)).view(batch, count, -1)

    def logits(self, h: Tensor, delta: Tensor | None = None) -> Tensor:
        """Logits [M, vocabulary] of hidden states [M, hidden] behind the last block; h takes `delta` in place."""
        return self._head(self._norm(h, delta))
