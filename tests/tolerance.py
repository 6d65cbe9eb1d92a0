"""How far a product may be from the exact one: a bound that is derived, never tuned, and shared by all tests."""

import torch
from torch import Tensor
from torch.nn import functional

MANTISSA = {torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}
SMALLEST = {torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}


def ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The spacing of `dtype` at each float64 value, float64."""
    exponent = torch.frexp(value)[1].double() - 1
    return torch.exp2(exponent - MANTISSA[dtype]).clamp_min(SMALLEST[dtype])


def exact(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + bias in float64."""
    return functional.linear(x.double(), weight.double(), None if bias is None else bias.double())


def bound(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The error allowed per output, float64: the larger of

    2 × the largest error of dense torch in the same dtype, and
    γ·Σ|w||x| + 1 ulp of the output with γ = K·2⁻²⁴, the bound of a float32 sum in any order (Higham 2002, 3.1).
    """
    truth = exact(x, weight, bias)
    common = x.dtype if x.dtype == weight.dtype else torch.float32
    same = None if bias is None else bias.to(common)
    dense = functional.linear(x.to(common), weight.to(common), same).to(x.dtype)
    worst = (dense.double() - truth).abs().nan_to_num(0, 0, 0).max() if dense.numel() else torch.zeros(())
    terms = exact(x.abs(), weight.abs(), None if bias is None else bias.abs())
    operations = x.shape[-1] + (bias is not None)
    return torch.maximum(2 * worst, operations * 2.0**-24 * terms + ulp(truth, x.dtype))


def assert_product(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Fails unless y is x Wᵀ + bias: dtype, shape, NaN and infinities in the same places, error within the bound."""
    truth = exact(x, weight, bias)
    assert y.dtype == x.dtype and y.shape == truth.shape, (y.dtype, y.shape)
    finite = truth.isfinite()
    assert torch.equal(y.isnan(), truth.isnan()), "NaN in other places than the dense product has them"
    infinite = ~finite & ~truth.isnan()
    assert torch.equal(y[infinite].double(), truth[infinite]), "infinities differ from the dense product"
    if finite.any():
        excess = ((y.double() - truth).abs() / bound(x, weight, bias))[finite].max().item()
        assert excess <= 1, f"error is {excess:.3g} times the bound"
