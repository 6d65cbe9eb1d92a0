"""Sequences of different lengths that are decoded together: keys and values in pages, a slot for each sequence.

    batch = Ragged(Decoder(model), slots=4, capacity=512)
    slot = batch.open()
    logits = batch.prefill([(slot, prompt)])          # prompts, whole or in pieces → [prompts, vocabulary]
    batch.begin(slot, logits[0].argmax())             # its first new token
    steps = Steps(batch); steps([slot])               # the next ones: see graphs.py

Everything a step reads lies at addresses that stay: lengths, tokens and pages of all slots are tables on the device,
and a step gets numbers of slots. So one CUDA graph serves whatever sequences are in the batch.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional

from alphaprune import memory
from alphaprune import pages as huge
from alphaprune.blocks import Block
from alphaprune.decoder import Decoder
from alphaprune.kernels import attention, cpu_attention, neighbours

PAGE = 32  # positions
Choose = Callable[[Tensor, Tensor, Tensor], Tensor]  # logits [M, vocabulary], slots, positions → tokens [M]


def why_not(decoder: Decoder, capacity: int) -> str | None:
    """Why sequences of up to `capacity` positions cannot be decoded like this, in one sentence; None if they can."""
    if capacity > decoder.table_end:
        return f"its rotary frequencies change past {decoder.table_end} positions, and {capacity} are asked for"
    return None


def page_bytes(decoder: Decoder, page: int = PAGE) -> int:
    """Bytes of keys and values of all blocks in one page."""
    return 2 * len(decoder.blocks) * page * decoder.key_heads * decoder.head_dim * decoder.dtype.itemsize


class Ragged:
    """Sequences in slots, each with up to `capacity` positions in pages of `page`.

    cache: [blocks, 2, rows, key heads, dim], page p has rows p · page and on. table: [slots + 1, pages of a sequence]
    int64. tokens, lengths: [slots + 1] int64, the last token of each sequence, which is not in the cache yet, and
    the positions before it. The last slot and the last page belong to nobody: there work rows that fill up a batch.
    ValueError if the model's positions depend on the length, or the memory does not suffice.
    """

    def __init__(self, decoder: Decoder, slots: int, capacity: int, pages: int | None = None, page: int = PAGE) -> None:
        if slots < 1 or capacity < 1 or page < 1:
            raise ValueError(f"wanted slots, positions and a page size from 1, got {slots}, {capacity} and {page}")
        if reason := why_not(decoder, capacity):
            raise ValueError(f"sequences of different lengths cannot share a batch of this model: {reason}")
        self.decoder, self.slots, self.capacity, self.page = decoder, slots, capacity, page
        per = -(-capacity // page)
        self.pages = slots * per if pages is None else pages
        self.nobody = slots
        self.held = [0] * (slots + 1)  # what `lengths` says, known here without asking the device
        self.owned: list[list[int]] = [[] for _ in range(slots)]
        self.free_pages = list(range(self.pages))[::-1]
        self.free_slots = list(range(slots))[::-1]
        rows = (self.pages + 1) * page
        needs = {f"keys and values of {rows} positions": rows * page_bytes(decoder, 1)}
        remedy = "take fewer sequences or a shorter context"
        memory.check(needs, decoder.device, remedy)
        with torch.inference_mode(), memory.explained(needs, decoder.device, remedy):
            shape = (len(decoder.blocks), 2, rows, decoder.key_heads, decoder.head_dim)
            self.cache = huge.empty(shape, decoder.dtype, decoder.device)
            self.table = torch.full((slots + 1, per), self.pages, device=decoder.device)
            self.tokens = torch.zeros(slots + 1, dtype=torch.int64, device=decoder.device)
            self.lengths = torch.zeros_like(self.tokens)
            cos, sin = decoder.rotations(0, capacity, capacity)
            self.counters = attention.counters(self.cache)
            self.cos, self.sin = cos[:, 0, 0].contiguous(), sin[:, 0, 1].contiguous()  # [capacity, dim / 2]

    def open(self) -> int:
        """A slot for a new sequence; ValueError if all are taken."""
        if not self.free_slots:
            raise ValueError(f"all {self.slots} sequences of the batch are taken; make a larger one")
        return self.free_slots.pop()

    @torch.inference_mode()
    def reserve(self, slot: int, positions: int) -> bool:
        """Whether the sequence has, or got, pages for so many positions; ValueError past the capacity."""
        if positions > self.capacity:
            raise ValueError(
                f"a sequence of this batch holds {self.capacity} positions, and {positions} are wanted; make the batch "
                f"with a larger capacity"
            )
        owned = self.owned[slot]
        missing = -(-positions // self.page) - len(owned)
        if missing > len(self.free_pages):
            return False
        if missing > 0:
            new = [self.free_pages.pop() for _ in range(missing)]
            self.table[slot, len(owned) : len(owned) + missing] = self._upload(new)
            owned += new
        return True

    def trim(self, slot: int, positions: int) -> None:
        """Forgets what a sequence holds past so many positions."""
        self.held[slot] = min(self.held[slot], positions)
        keep = -(-self.held[slot] // self.page)
        self.free_pages += self.owned[slot][keep:][::-1]  # the next one takes them in the same order
        del self.owned[slot][keep:]

    def close(self, slot: int) -> None:
        """Ends a sequence; its slot and its pages are free for others."""
        self.trim(slot, 0)
        self.free_slots.append(slot)

    @torch.inference_mode()
    def begin(self, slot: int, token: Tensor | int) -> None:
        """Sets the last token of a sequence: what its next step reads. A scalar of the device, or a number."""
        if isinstance(token, int):
            self.tokens[slot].fill_(token)
        else:
            self.tokens[slot].copy_(token)

    @torch.inference_mode()
    def prefill(self, parts: Sequence[tuple[int, Sequence[int]]]) -> Tensor:
        """Logits [parts, vocabulary] after the last of the tokens that each (slot, tokens) adds to its sequence.

        All products are of the tokens of all parts together. ValueError if a part is empty, names a slot twice, or if
        pages or positions do not suffice; then nothing has changed but pages that were taken.
        """
        if not parts or any(not tokens for _, tokens in parts) or len({slot for slot, _ in parts}) < len(parts):
            raise ValueError("a prefill needs at least one part, a token in each, and a slot only once")
        spans = [(slot, self.held[slot], self.held[slot] + len(tokens)) for slot, tokens in parts]
        for slot, _, end in spans:
            if not self.reserve(slot, end):
                raise ValueError(
                    f"{end} positions of a sequence need more pages than the {len(self.free_pages)} of {self.pages} "
                    f"that are free; make the batch with more"
                )
        tokens, positions, slots = (self._upload(numbers) for numbers in _flat(parts, spans))
        h = functional.embedding(tokens, self.decoder.embedding)
        h, delta = self._blocks(h, _Prompts(self, spans, positions, slots))
        ends = self._upload([end - 1 for end in accumulate(end - start for _, start, end in spans)])
        logits = self.decoder.logits(h[ends], None if delta is None else delta[ends])
        self.lengths.index_copy_(
            0, self._upload([slot for slot, _, _ in spans]), self._upload([end for _, _, end in spans])
        )
        for slot, _, end in spans:
            self.held[slot] = end
        return logits

    def step(
        self, slots: Tensor, reach: int, choose: Choose | None = None, lengths: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """One token more for the sequences in `slots` [M] int64: new tokens [M] int64, and logits [M, vocabulary].

        Nothing in it depends on data but through tensors that stay where they are, so a CUDA graph can hold it. reach:
        no sequence has more positions afterwards. choose: None for the likeliest. Whoever calls it keeps `held`, and
        reserves, and lets no other step of this batch run at the same time. lengths: the positions of each afterwards,
        where they may decide how the work is done, which a graph could not repeat.
        """
        h, positions = neighbours.begin(self.tokens, self.lengths, slots, self.decoder.embedding)
        keys = attention.Keys(slots, positions, self.table, self.page, reach, self.cos, self.sin, lengths)
        logits = self.decoder.logits(*self._blocks(h, _New(keys, self.counters)))
        chosen = None if choose is None else choose(logits, slots, positions)
        return neighbours.end(logits, chosen, slots, positions, self.tokens, self.lengths), logits

    def _blocks(self, h: Tensor, attend: "_New | _Prompts") -> tuple[Tensor, Tensor | None]:
        """Hidden states [M, hidden] after all blocks, and what is yet to be added to them; h may be changed."""
        d, delta = self.decoder, None
        for block, cache in zip(d.blocks, self.cache.unbind(0), strict=True):
            q, k, v = block.qkv(h, delta)
            delta = block.mlp(h, block.out(attend(block, q, k, v, cache), h))
        return h, delta

    def _rows(self, slots: Tensor, positions: Tensor) -> Tensor:
        return self.table[slots, positions // self.page] * self.page + positions % self.page

    def _rows_of(self, slot: int, end: int) -> slice | Tensor:
        """Where the first `end` positions of a sequence lie: a slice of the cache where its pages follow each other."""
        pages = self.owned[slot][: -(-end // self.page)]
        first = pages[0] * self.page
        if pages == list(range(pages[0], pages[0] + len(pages))):
            return slice(first, first + end)
        positions = self._upload(torch.arange(end))
        return self._rows(torch.full_like(positions, slot), positions)

    def _upload(self, numbers: Sequence[int] | Tensor) -> Tensor:
        return memory.upload(torch.as_tensor(numbers, dtype=torch.int64), self.decoder.device)


class _New:
    """Attention of a step: the new token of each sequence over all its keys."""

    def __init__(self, keys: attention.Keys, counters: Tensor | None) -> None:
        self.keys, self.counters = keys, counters

    def __call__(self, block: Block, q: Tensor, k: Tensor, v: Tensor, cache: Tensor) -> Tensor:
        """[M, heads · dim]; the new keys and values go to the cache."""
        how = block.window, block.head_norms, block.isa
        return attention.attend_new(q, k, v, cache, self.keys, self.counters, *how)


class _Prompts:
    """Attention of a prefill: each sequence for itself, its new queries over all its keys.

    positions, slots: of all new tokens, one sequence after the other.
    """

    def __init__(self, ragged: Ragged, spans: Sequence[tuple[int, int, int]], positions: Tensor, slots: Tensor) -> None:
        self.spans, self._masks = spans, {}
        self.turns = ragged.cos[positions], ragged.sin[positions]  # [M, dim / 2]
        self.place = ragged._rows(slots, positions)
        self.rows = [ragged._rows_of(slot, end) for slot, _, end in spans]

    def __call__(self, block: Block, q: Tensor, k: Tensor, v: Tensor, cache: Tensor) -> Tensor:
        """[M, heads · dim]; the new keys and values go to the cache."""
        q, k = neighbours.norm_heads(q, k, block.head_norms)
        return self._attend(neighbours.rotate_store(q, k, v, *self.turns, self.place, cache), cache, block.window)

    def _attend(self, q: Tensor, cache: Tensor, window: int | None) -> Tensor:
        """[M, heads · dim] of rotated queries [M, heads, dim]."""
        found, begin = [], 0
        for place, ((_, start, end), rows) in enumerate(zip(self.spans, self.rows, strict=True)):
            queries = q[begin : begin + end - start].transpose(0, 1)[None]  # [1, heads, count, dim]
            begin += end - start
            seen = cache[:, rows] if isinstance(rows, slice) else cache.index_select(1, rows)
            keys, values = seen.transpose(1, 2)[:, None]  # [1, key heads, end, dim]
            if cpu_attention.takes_prompts(q, end - start, end):
                out = cpu_attention.attend_prompt(queries, keys, values, start, 0, window)
                found.append(out[0].transpose(0, 1).flatten(1))
                continue
            mask = self._mask(place, start, end, window, q.device)
            shared = q.shape[1] // cache.shape[2]
            if mask is not None and shared > 1:  # no fused kernel takes both a mask and fewer key heads
                keys, values = (part.repeat_interleave(shared, 1) for part in (keys, values))
                shared = 1
            causal = mask is None and end > 1
            out = functional.scaled_dot_product_attention(
                queries, keys, values, attn_mask=mask, is_causal=causal, enable_gqa=shared > 1
            )
            found.append(out[0].transpose(0, 1).flatten(1))
        return found[0] if len(found) == 1 else torch.cat(found)

    def _mask(self, place: int, start: int, end: int, window: int | None, device: torch.device) -> Tensor | None:
        """None where a plain causal one does."""
        if start == 0 and (window is None or end <= window):
            return None
        if (place, window) not in self._masks:
            self._masks[place, window] = cpu_attention.visible(0, start, end, window, device)
        return self._masks[place, window]


def _flat(
    parts: Sequence[tuple[int, Sequence[int]]], spans: Sequence[tuple[int, int, int]]
) -> tuple[list[int], Tensor, Tensor]:
    """Tokens, positions and slots of all parts, one after the other."""
    tokens = [token for _, part in parts for token in part]
    positions = torch.cat([torch.arange(start, end) for _, start, end in spans])
    slots = torch.cat([torch.full((end - start,), slot) for slot, start, end in spans])
    return tokens, positions, slots
