"""How far a product may be from the exact one: a bound that is derived, never tuned, and shared by all tests."""

import torch
from torch import Tensor
from torch.nn import functional

GROUP = 128  # columns that share a scale
MANTISSA = {torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}
SMALLEST = {torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}


def ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The spacing of `dtype` at each float64 value, float64."""
    exponent = torch.frexp(value)[1].double() - 1
    return torch.exp2(exponent - MANTISSA[dtype]).clamp_min(SMALLEST[dtype])


def exact(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + bias in float64."""
    return functional.linear(x.double(), weight.double(), None if bias is None else bias.double())


def bound(x: Tensor, weight: Tensor, bias: Tensor | None = None, rounded: bool = False) -> Tensor:
    """The error allowed per output, float64: the larger of

    2 × the largest error of dense torch in the same dtype, and
    γ·Σ|w||x| + 1 ulp of the output with γ = K·2⁻²⁴, the bound of a float32 sum in any order (Higham 2002, 3.1).

    A float64 weight is integers times their scale: two more roundings, of the scaling and of the conversion before it.
    rounded: the kernel may use 16-bit integers for x, see below; two more, of the step and of its product with a scale.
    """
    truth = exact(x, weight, bias)
    common = x.dtype if x.dtype == weight.dtype else torch.float32
    same = None if bias is None else bias.to(common)
    dense = functional.linear(x.to(common), weight.to(common), same).to(x.dtype)
    worst = (dense.double() - truth).abs().nan_to_num(0, 0, 0).max() if dense.numel() else torch.zeros(())
    terms = exact(x.abs(), weight.abs(), None if bias is None else bias.abs())
    operations = x.shape[-1] + (bias is not None) + 2 * (weight.dtype == torch.float64) + 2 * rounded
    allowed = operations * 2.0**-24 * terms + ulp(truth, x.dtype)
    return torch.maximum(2 * worst, allowed + rounding(x, weight) if rounded else allowed)


def rounding(x: Tensor, weight: Tensor) -> Tensor:
    """What 16-bit integers for x, per token and group g of 128 columns, cost at most: Σ_g Σ_{k∈g} |w_k|·error_g.

    The step is max|x_k| / 32767 over the group; half of it is max|x_k|·2⁻¹⁶·(1 + 2⁻¹⁵). A quotient near 2¹⁵ that was
    rounded twice in float32 may be 2⁻⁸ off, which adds that share of a step. x: [..., K], weight: [N, K].
    """
    largest = [part.abs().amax(-1) for part in x.double().split(GROUP, -1)]
    weights = [part.abs().sum(-1) for part in weight.double().split(GROUP, -1)]
    return torch.stack(largest, -1) @ torch.stack(weights, 0) * 2.0**-16 * (1 + 2.0**-7 + 2.0**-14)


def assert_product(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, rounded: bool = False) -> None:
    """Fails unless y is x Wᵀ + bias: dtype, shape, NaN and infinities in the same places, error within the bound."""
    truth = exact(x, weight, bias)
    assert y.dtype == x.dtype and y.shape == truth.shape, (y.dtype, y.shape)
    finite = truth.isfinite()
    assert torch.equal(y.isnan(), truth.isnan()), "NaN in other places than the dense product has them"
    infinite = ~finite & ~truth.isnan()
    assert torch.equal(y[infinite].double(), truth[infinite]), "infinities differ from the dense product"
    if finite.any():
        excess = ((y.double() - truth).abs() / bound(x, weight, bias, rounded))[finite].max().item()
        assert excess <= 1, f"error is {excess:.3g} times the bound"


def assert_outputs(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    """As `assert_product` for y [M, N], with a residual [M, N] or without."""
    if residual is None:
        assert_product(y, x, weight, bias)
        return
    for token in range(len(x)):  # of one token they are one vector that is added
        assert_product(y[token], x[token], weight, residual[token].float() + (0 if bias is None else bias.float()))
