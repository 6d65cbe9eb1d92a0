"""The next token of every sequence of a batch, chosen on its device: nothing is read back, so a CUDA graph can hold it.

Draws are exponential races: argmax(log p − log e) with e ~ Exp(1) draws from p (Gumbel-max). The noise is a hash of
seed, position and token, so a sequence gives the same tokens in every batch.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from alphaprune.memory import upload

NOT_FINITE = (
    "the model's scores for the next token are not finite; its weights or config.json are damaged, or its dtype is too "
    "narrow for it"
)
NUMBERS = ("temperature", "top_p", "min_p", "presence", "frequency", "repetition")


def sound(scores: Tensor) -> Tensor:
    """bool [batch]: whether every score [batch, …] is a number or −inf, which excludes a token."""
    return (scores < math.inf).flatten(1).all(1)  # NaN is not less, either


@dataclass(frozen=True)
class Sampling:
    """What a request wants of its tokens; the neutral values change nothing.

    temperature: 0 takes the likeliest token. top_k: 0 for all. presence, frequency: OpenAI's penalties, on new tokens;
    repetition: transformers' penalty, on the prompt, too. bias: {token: added to its logit}.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0
    bias: dict[int, float] = field(default_factory=dict)

    @property
    def weighted(self) -> bool:
        """Whether logits change by what stood before, or by a bias."""
        return bool(self.presence or self.frequency or self.repetition != 1 or self.bias)

    @property
    def plain(self) -> bool:
        """Whether the likeliest token by the model's own logits is the answer."""
        return self.temperature == 0 and not self.weighted


class Kind(NamedTuple):
    """What a batch needs: drawn: noise; truncated: logits in order; weighted: penalties or a bias."""

    drawn: bool = False
    truncated: bool = False
    weighted: bool = False

    @classmethod
    def of(cls, batch: Iterable[Sampling]) -> "Kind":
        """Of all sequences of a batch together."""
        found = list(batch)
        drawn = [one for one in found if one.temperature > 0]
        truncated = any(one.top_k or one.top_p < 1 or one.min_p > 0 for one in drawn)
        return cls(bool(drawn), truncated, any(one.weighted for one in found))


GREEDY = Kind()


class Sampler:
    """The settings of the sequences in `slots` slots, on their device; a slot nobody has set is greedy."""

    def __init__(self, slots: int, vocabulary: int, device: torch.device) -> None:
        self.vocabulary, self.device = vocabulary, device
        neutral = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0, 1.0])  # NUMBERS of a greedy sequence
        self.numbers = neutral.repeat(slots, 1).to(device)
        self.integers = torch.tensor([[vocabulary, 0]]).repeat(slots, 1).to(device)  # top_k and seed, int64
        self._tokens = torch.arange(vocabulary, dtype=torch.int32, device=device)
        self._seen = self._counts = self._bias = None  # [slots, vocabulary], once somebody needs them

    def put(self, slot: int, sampling: Sampling, prompt: list[int], new: list[int]) -> None:
        """Sets a slot, for a sequence that has `new` tokens after its prompt."""
        numbers = torch.tensor([getattr(sampling, name) for name in NUMBERS])
        top_k = sampling.top_k if 0 < sampling.top_k < self.vocabulary else self.vocabulary
        self.numbers[slot] = upload(numbers, self.device)
        self.integers[slot] = upload(torch.tensor([top_k, sampling.seed]), self.device)
        if not sampling.weighted:
            return
        if self._bias is None:
            shape = len(self.numbers), self.vocabulary
            self._seen = torch.zeros(shape, dtype=torch.bool, device=self.device)
            self._counts, self._bias = (torch.zeros(shape, device=self.device) for _ in range(2))
        counts = torch.bincount(torch.tensor(new, dtype=torch.int64), minlength=self.vocabulary)
        seen, bias = counts > 0, torch.zeros(self.vocabulary)
        seen[prompt] = True
        bias[list(sampling.bias)] = torch.tensor(list(sampling.bias.values()))
        for table, value in ((self._seen, seen), (self._counts, counts.float()), (self._bias, bias)):
            table[slot] = upload(value, self.device)

    def choose(self, logits: Tensor, rows: Tensor, position: Tensor, kind: Kind) -> Tensor:
        """The next tokens int64 [batch]: logits [batch, vocabulary] of the sequences in slots `rows` [batch].

        position: int64 [batch], of the logits' own token in its sequence; the draw depends on it and the seed alone.
        """
        if kind == GREEDY:
            return logits.argmax(-1)
        numbers = self.numbers[rows]
        scores = logits.float()
        if kind.weighted:
            scores = self._weigh(scores, rows, numbers)
        new = scores.argmax(-1)
        if kind.drawn:
            temperature = numbers[:, 0]
            greedy = temperature == 0
            scores = scores / temperature.masked_fill(greedy, 1)[:, None]
            new = torch.where(greedy, new, self._draw(scores, rows, position, numbers, kind))
        if kind.weighted:
            place = rows * self.vocabulary + new
            self._counts.view(-1).index_add_(0, place, torch.ones_like(place, dtype=torch.float32))
            self._seen.view(-1).index_fill_(0, place, True)
        return new

    def _weigh(self, scores: Tensor, rows: Tensor, numbers: Tensor) -> Tensor:
        presence, frequency, repetition = numbers[:, 3:, None].unbind(1)
        counts = self._counts[rows]
        less = torch.where(scores > 0, scores / repetition, scores * repetition)
        scores = torch.where(self._seen[rows], less, scores)
        return scores - presence * (counts > 0) - frequency * counts + self._bias[rows]

    def _draw(self, scores: Tensor, rows: Tensor, position: Tensor, numbers: Tensor, kind: Kind) -> Tensor:
        integers = self.integers[rows]
        noise = exponential(integers[:, 1], position, self._tokens).log()
        if not kind.truncated:
            return (scores.log_softmax(-1) - noise).argmax(-1)
        ordered, order = scores.sort(-1, descending=True)
        ordered = truncate(ordered, integers[:, 0], numbers[:, 1], numbers[:, 2])
        best = (ordered.log_softmax(-1) - noise.gather(1, order)).argmax(-1, keepdim=True)
        return order.gather(1, best)[:, 0]


def truncate(ordered: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Scores [batch, vocabulary], falling, with −inf where a row's top_k, min_p or top_p [batch] exclude a token.

    As transformers' warpers do it one after the other; the likeliest token always stays.
    """
    ordered = ordered.masked_fill(ordered < ordered.gather(1, top_k[:, None] - 1), -torch.inf)
    likely = ordered.softmax(-1)
    ordered = ordered.masked_fill(likely < min_p[:, None] * likely[:, :1], -torch.inf)
    likely = ordered.softmax(-1)
    beyond = (likely.cumsum(-1) - likely >= top_p[:, None]) & (top_p < 1)[:, None]
    first = torch.arange(ordered.shape[1], device=ordered.device) == 0
    return ordered.masked_fill(beyond & ~first, -torch.inf)


def exponential(seed: Tensor, position: Tensor, tokens: Tensor) -> Tensor:
    """Exp(1) noise float32 [batch, vocabulary] from int64 [batch] each, and the tokens int32 [vocabulary]."""
    low, high = seed.to(torch.int32), (seed >> 32).to(torch.int32)  # conversions wrap
    key = _mix(_mix(_mix(low) + high) + position.to(torch.int32) * -1640531527)[:, None]
    bits = _mix(_mix(tokens * -1640531535 + key) ^ key)
    uniform = ((bits & 0x7FFFFFFF).float() + 0.5) * 2**-31  # small ones keep their precision
    return -torch.log1p(-uniform)


def _mix(x: Tensor) -> Tensor:
    """The last step of MurmurHash3 (Appleby, public domain) on int32; shifts are made logical by masks."""
    x = (x ^ (x >> 16 & 0xFFFF)) * -2048144789
    x = (x ^ (x >> 13 & 0x7FFFF)) * -1028477387
    return x ^ (x >> 16 & 0xFFFF)
