"""What stands between the products of a step: one Triton kernel each on a GPU, elsewhere one call of ours, or torch.

Their cost is launches and passes over memory, not arithmetic: on a GPU a step of a 7B model has some 30 products per
millisecond, and four more launches beside each of them would take as long as the products.
"""

import functools

import torch
from torch import Tensor
from torch.nn import functional

from alphaprune.formats import native
from alphaprune.kernels import cpu, portable

NATIVE = (torch.bfloat16, torch.float16, torch.float32)  # dtypes that csrc/cpu/norm.h knows


@functools.cache
def why_not() -> str | None:
    """None, or why the Triton kernels do not run here, looked at once."""
    return portable.available()


def fused(x: Tensor) -> bool:
    """Whether Triton's kernels take a tensor."""
    return x.is_cuda and why_not() is None and not torch.compiler.is_compiling()


def add_norm(
    h: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    epsilon: float,
    order: Tensor | None = None,
    isa: str | None = None,
) -> Tensor:
    """x [M, K] = RMSNorm(h) · weight after h [M, K] += delta [M, K], in place; with `order` [K] its columns in order.

    Zhang and Sennrich, NeurIPS 2019, with transformers' rounding: in half precision once more before the weight.
    order: int64; column i of x is column order[i] of the norm. isa: of csrc/cpu; the best one if none is named, which
    takes longer to find than a norm of one row.
    """
    if fused(h):
        from alphaprune.kernels import triton_neighbours  # imports Triton

        return triton_neighbours.add_norm(h, delta, weight, epsilon, order)
    module = native.load()
    if order is None and module is not None and _native_norm(h, delta, weight):
        x = torch.empty_like(h)
        addresses = h.data_ptr(), 0 if delta is None else delta.data_ptr(), weight.data_ptr(), x.data_ptr()
        module.rms_norm(*addresses, *h.shape, native.DTYPES[h.dtype], epsilon, isa or cpu.best())
        return x
    if delta is not None:
        h.add_(delta)
    if weight.dtype == torch.float32:
        x = functional.rms_norm(h, tuple(weight.shape), weight, epsilon)
    else:
        x = functional.rms_norm(h, tuple(weight.shape), None, epsilon).mul_(weight)
    return x if order is None else x.index_select(-1, order)


def _native_norm(h: Tensor, delta: Tensor | None, weight: Tensor) -> bool:
    """Whether the norm is one call of ours, on a CPU, where torch's is a dozen."""
    if h.dim() != 2 or not _native([h, weight] if delta is None else [h, weight, delta]):
        return False
    return len(weight) == h.shape[1] and (delta is None or delta.shape == h.shape)


def _native(alike: list[Tensor]) -> bool:
    """Whether a native call takes these, which go together."""
    first = alike[0]
    if first.device.type != "cpu" or first.dtype not in NATIVE or torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled() and any(one.requires_grad for one in alike):
        return False
    return all(one.dtype == first.dtype and one.is_contiguous() for one in alike)


def swiglu(gate: Tensor, up: Tensor, isa: str | None = None) -> Tensor:
    """silu(gate) · up, [M, K]; silu rounded to the dtype before the product, as in transformers. May reuse `gate`.

    isa: as add_norm has it.
    """
    if fused(gate):
        from alphaprune.kernels import triton_neighbours

        return triton_neighbours.swiglu(gate, up)
    module = native.load()
    if module is not None and gate.shape == up.shape and _native([gate, up]):
        out, addresses = gate.data_ptr(), (gate.data_ptr(), up.data_ptr())
        module.swiglu(*addresses, out, gate.numel(), native.DTYPES[gate.dtype], isa or cpu.best())
        return gate
    return functional.silu(gate, inplace=True).mul_(up)


def rotate_store(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, place: Tensor, cache: Tensor) -> Tensor:
    """Rotated queries [M, heads, dim]; rotated keys, and values, go to the rows `place` [M] of the cache.

    q: [M, heads · dim]; k, v: [M, key heads · dim]. cos, sin: [M, dim / 2] in their dtype (Su et al., 2021: halves of a
    head are the pairs). cache: [2, rows, key heads, dim], keys and values; place: int64.
    """
    key_heads, dim = cache.shape[2:]
    if fused(q):
        from alphaprune.kernels import triton_neighbours

        return triton_neighbours.rotate_store(q, k, v, cos, sin, place, cache)
    turned = _rotate(q.view(len(q), -1, dim), cos, sin)
    new = torch.stack((_rotate(k.view(len(k), key_heads, dim), cos, sin), v.view(len(v), key_heads, dim)))
    cache.index_copy_(1, place, new)
    return turned


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[M, heads, dim]: halves (a, b) → (a cos − b sin, b cos + a sin), each product rounded as in transformers."""
    first, second = x.unflatten(-1, (2, -1)).unbind(-2)  # [M, heads, dim / 2]
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def norm_heads(q: Tensor, k: Tensor, norms: tuple[tuple[Tensor, float], tuple[Tensor, float]] | None) -> list[Tensor]:
    """q and k [M, heads · dim] after the RMSNorm, (weight [dim], epsilon), of each head of both; None: as they are."""
    if norms is None:
        return [q, k]
    return [
        add_norm(part.view(len(part), -1, len(weight)), None, weight, epsilon).flatten(1)
        for part, (weight, epsilon) in zip((q, k), norms, strict=True)
    ]


def begin(tokens: Tensor, lengths: Tensor, slots: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
    """Embedded last tokens [M, hidden] of the sequences in `slots` [M], and their positions int64 [M].

    tokens, lengths: int64 [all slots], the last token of each, and the positions before it. embedding: [vocabulary,
    hidden].
    """
    if fused(embedding):
        from alphaprune.kernels import triton_neighbours

        return triton_neighbours.begin(tokens, lengths, slots, embedding)
    return functional.embedding(tokens[slots], embedding), lengths[slots]


def end(
    logits: Tensor, chosen: Tensor | None, slots: Tensor, positions: Tensor, tokens: Tensor, lengths: Tensor
) -> Tensor:
    """New tokens int64 [M], `chosen` or else the likeliest by logits [M, vocabulary], for the tables of the slots.

    As torch.argmax: the first of equal ones, and NaN before all. tokens, lengths: as begin has them; each length is
    one more than the position, but the last slot's, which is nobody's, is 0.
    """
    if fused(logits):
        from alphaprune.kernels import triton_neighbours

        return triton_neighbours.end(logits, chosen, slots, positions, tokens, lengths)
    new = logits.argmax(-1) if chosen is None else chosen
    tokens.index_copy_(0, slots, new)
    lengths.index_copy_(0, slots, positions + 1)
    lengths[-1:].zero_()
    return new
