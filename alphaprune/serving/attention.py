"""Attention over a batch of requests that lie in one row, as transformers' paged cache gives them: each for itself.

transformers' own way on a CPU is one product of all tokens with all keys of the batch under a mask: work and memory
grow with the square of the number of requests.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as attend

NAME = "alphaprune_paged"
PADDING = 2  # requests of one token go together while padding to the longest costs no more than this factor


class Paged:
    """The attention function; what follows from the lengths of a batch is worked out in its first layer."""

    def __init__(self) -> None:
        self._batch: _Batch | None = None

    def __call__(
        self,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **lengths: Any,
    ) -> tuple[Tensor, None]:
        """The outputs [1, tokens, heads, size] of queries [1, heads, tokens, size] on their own request's keys.

        key, value: [1, groups, all keys, size]. cu_seq_lens_q, cu_seq_lens_k: [requests + 1] int32, where the tokens
        and the keys of each request begin; its last token belongs to its last key. attention_mask is not read.
        """
        batch, starts, key_starts = self._batch, lengths["cu_seq_lens_q"], lengths["cu_seq_lens_k"]
        if batch is None or batch.starts is not starts or batch.key_starts is not key_starts:
            self._batch = batch = _Batch(starts, key_starts, query.dtype)
        tokens, keys, values = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
        if not batch.alone:
            return batch.attend_together(tokens, keys, values, scaling)[None], None
        out = tokens.new_empty(tokens.shape)  # [tokens, heads, size]
        if batch.index is not None:
            out[batch.rows] = batch.attend_together(tokens[batch.rows], keys, values, scaling)
        for first, last, first_key, last_key in batch.alone:
            own = slice(first_key, last_key)
            out[first:last] = _attend(tokens[first:last], keys[own], values[own], scaling)
        return out[None], None


class _Batch:
    """The requests of a batch: those with one token together, padded, the others one by one.

    rows: tokens of the former. index [requests · longest]: their keys. mask [requests, 1, 1, longest]: 0 or −inf.
    """

    def __init__(self, starts: Tensor, key_starts: Tensor, dtype: torch.dtype) -> None:
        self.starts, self.key_starts = starts, key_starts
        places, keys = torch.stack((starts, key_starts)).tolist()  # the one wait for a device in a step
        spans = list(zip(places, places[1:], keys, keys[1:], strict=False))
        single = [span for span in spans if span[1] - span[0] == 1]
        longest = max((span[3] - span[2] for span in single), default=0)
        total = sum(span[3] - span[2] for span in single)
        together = len(single) > 1 and len(single) * longest <= PADDING * total
        self.alone = [span for span in spans if not (together and span[1] - span[0] == 1)]
        self.index = None
        if together:
            first, last = (torch.tensor([span[i] for span in single], device=starts.device) for i in (2, 3))
            places = first[:, None] + torch.arange(longest, device=starts.device)
            outside = places >= last[:, None]
            self.rows = torch.tensor([span[0] for span in single], device=starts.device)
            self.index = torch.where(outside, first[:, None], places).flatten()
            self.mask = torch.zeros(outside.shape, dtype=dtype, device=starts.device)
            self.mask = self.mask.masked_fill(outside, -torch.inf)[:, None, None]

    def attend_together(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float | None) -> Tensor:
        """[requests, heads, size] of one token each."""
        requests, heads, size = query.shape
        groups = keys.shape[1]
        padded = [
            x.index_select(0, self.index).view(requests, -1, groups, size).transpose(1, 2) for x in (keys, values)
        ]
        query = query.view(requests, groups, heads // groups, size)
        return attend(query, *padded, attn_mask=self.mask, scale=scaling).reshape(requests, heads, size)


def _attend(query: Tensor, keys: Tensor, values: Tensor, scaling: float | None) -> Tensor:
    """[tokens, heads, size] of one request, the last of whose tokens belongs to its last key."""
    (tokens, heads, size), groups = query.shape, keys.shape[1]
    keys, values = keys.transpose(0, 1)[None], values.transpose(0, 1)[None]
    if tokens == 1:  # heads of a group are as good as tokens: nothing to repeat, nothing to mask
        query = query.view(1, groups, heads // groups, size)
        return attend(query, keys, values, scale=scaling).view(1, heads, size)
    keys, values = (x.repeat_interleave(heads // groups, 1) for x in (keys, values))
    mask = None
    if tokens < keys.shape[2]:
        mask = torch.ones(tokens, keys.shape[2], dtype=torch.bool, device=query.device).tril(keys.shape[2] - tokens)
    query = query.transpose(0, 1)[None]
    return attend(query, keys, values, attn_mask=mask, is_causal=mask is None, scale=scaling)[0].transpose(0, 1)
