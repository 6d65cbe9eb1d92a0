"""A LoRA layer of PEFT whose update has the zeros of the layer that it adapts.

W' = W + s·M∘(B A), M the keep-mask, s = alpha / rank. The product is masked before it is added, in training as in
merging, so that nothing fills in and the merged layer is the trained one. W' is rounded to the dtype that it will be
stored in already while it trains; gradients pass the rounding as if it were not there.
"""

from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

ADAPTER = "recovery"


def update(
    weight: Tensor, dropped: Tensor, a: Tensor, b: Tensor, scale: float, stored: torch.dtype | None = None
) -> Tensor:
    """W + s·M∘(B A), summed in the wider dtype of the two, rounded to `stored` and given in the dtype of W.

    weight W: [N, K].   dropped: [N, K] bool, True where M is 0.   a: [r, K].   b: [N, r].
    """
    found = weight + (b @ a).mul_(scale).masked_fill_(dropped, 0)  # [N, K]
    return found.to(stored or weight.dtype).to(weight.dtype)


class _Product(torch.autograd.Function):
    """x [..., K] → x W'ᵀ [..., N]; W' is made again for the backward pass instead of being kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        dropped: Tensor,
        a: Tensor,
        b: Tensor,
        scale: float,
        stored: torch.dtype | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, dropped, a, b)
        ctx.scale, ctx.stored = scale, stored
        return x @ update(weight, dropped, a, b, scale, stored).to(x.dtype).t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        x, weight, dropped, a, b = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ update(weight, dropped, a, b, ctx.scale, ctx.stored).to(grad.dtype)
        of_weight = (grad.flatten(0, -2).t() @ x.flatten(0, -2)).to(a.dtype)  # [N, K]
        of_weight.mul_(ctx.scale).masked_fill_(dropped, 0)
        return grad_x, None, None, b.t() @ of_weight, of_weight @ a.t(), None, None


class MaskedLora(Linear):
    """y = x W'ᵀ + b with W' = W + s·M∘(B A); A and B train, W and its bias b stay."""

    dropped: Tensor
    stored: torch.dtype | None = None

    @property
    def lora_variants(self) -> dict:
        return {(): None}

    def restrict(self, mask: Tensor, stored: torch.dtype) -> None:
        """mask: [N, K] bool, True where the update counts.   stored: the dtype that the sum will be stored in."""
        self.register_buffer("dropped", ~mask.to(self.base_layer.weight.device), persistent=False)
        self.stored = stored

    def _update(self) -> tuple:
        a, b = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight  # [r, K], [N, r]
        return self.base_layer.weight, self.dropped, a, b, self.scaling[ADAPTER], self.stored

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        y = _Product.apply(x, *self._update())
        return y if self.base_layer.bias is None else y + self.base_layer.bias

    def merge(self, *_: Any, **__: Any) -> None:
        """Gives the layer W' for W; the adapter is to be taken off then."""
        with torch.no_grad():
            self.base_layer.weight.copy_(update(*self._update()))


def attach(
    model: nn.Module, masks: dict[str, Tensor], rank: int, alpha: float, seed: int, stored: dict[str, torch.dtype]
) -> dict[str, MaskedLora]:
    """Puts an adapter on every layer of `masks` ([N, K] bool, True = keep), in place; B is 0, A is drawn by `seed`.

    stored: of each layer the dtype that its weight will be stored in. Nothing but the adapters trains.
    """
    # Inside another module PEFT does not see a model of transformers, whose experts it would look for fused.
    inside = nn.Module()
    inside.model = model
    names = [f"model.{name}" for name in masks]
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, lora_dropout=0.0)
    config._register_custom_module({nn.Linear: MaskedLora})
    model.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, inside, ADAPTER)
    found = {name: model.get_submodule(name) for name in masks}
    for name, layer in found.items():
        layer.restrict(masks[name], stored[name])
    return found


def detach(model: nn.Module, layers: dict[str, MaskedLora]) -> None:
    """Takes the adapters off, in place; what was not merged is gone."""
    for name, layer in layers.items():
        model.set_submodule(name, layer.base_layer)
