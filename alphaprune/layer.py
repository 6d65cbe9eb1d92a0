"""SparseLinear, the drop-in for nn.Linear, and `sparsify`, which puts it into a model."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from alphaprune import formats, pages
from alphaprune.formats import Packed, quantize
from alphaprune.kernels import base
from alphaprune.kernels import spmm as op
from alphaprune.trees import Matrix, open_source

ACTIVATIONS = ("int8",)
Model = TypeVar("Model", bound=nn.Module)
NOISE = 1.05  # a table's medians wander by so much: a layer that is within it stays packed, which is smaller


class SparseLinear(nn.Module):
    """y = x Wᵀ + b with W stored as its kept values and a bitmap (format SBT); called as nn.Linear is.

    Buffers (not parameters: adapters train on top of them, they do not train):
    weight [n] values in the dtype of the dense weight, padded; weight_mask [R, C, 32] int32; weight_offsets
    [R·C + 1] int32 with R = ceil(N/16), C = ceil(K/64).   bias: [N] parameter or None.
    With int8 values: weight [n] int8, and weight_scale float32 [N] or [N, ceil(K/128)], otherwise None. `.to(dtype)`
    casts float values and the bias; integers and their scale keep dtype and bits.
    activations: torch.int8 lets kernels round x to 8 bits beside int8 values, see `round_activations`; or None.
    Differentiable in x and bias; gradients are those of x as it is.
    """

    weight: Tensor
    weight_mask: Tensor
    weight_offsets: Tensor
    weight_scale: Tensor | None
    bias: nn.Parameter | None
    activations: torch.dtype | None = None  # here, too, for layers that were pickled before there was such a choice

    def __init__(self, packed: Packed, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self.register_buffer("weight", packed.weight)
        self.register_buffer("weight_mask", packed.mask)
        self.register_buffer("weight_offsets", packed.offsets)
        self.register_buffer("weight_scale", packed.scale)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=bias.requires_grad)
        self.activations = packed.activations
        self.name = ""  # of the layer in its model, for error messages
        self.quantization_error: quantize.Error | None = None  # of int8 values, where they were made here
        self._prepared: op.Prepared | None = None

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, mask: Tensor | None = None, values: str | None = None, group: int | None = None
    ) -> "SparseLinear":
        """The sparse twin of `linear`; values keep their dtype and bits unless `values` says otherwise.

        mask: [N, K] bool, True = keep; without it, the weights that are not zero are kept.
        values: "int8" rounds them to 8 bits with a scale per row or, with group=128, per row and 128 columns; how much
        that loses is in `quantization_error`. ValueError if int8 is asked of NaN or infinite weights.
        """
        packed, error = pack_weight(linear.weight.detach(), mask, values, group)
        bias = None if linear.bias is None else linear.bias.detach().clone()
        if bias is not None:
            bias.requires_grad_(linear.bias.requires_grad)
        made = cls(packed, bias)
        made.quantization_error = error
        made.train(linear.training)
        return made

    @classmethod
    def empty(
        cls,
        shape: tuple[int, int],
        values: int,
        bias: bool,
        dtype: torch.dtype,
        bias_dtype: torch.dtype,
        scale: tuple[int, ...] | None = None,
    ) -> "SparseLinear":
        """A layer on the meta device, for a loader to fill.

        values: the padded length of the values tensor. scale: the shape of the scale, of int8 values.
        """
        n, k = shape
        rows, columns = -(-n // 16), -(-k // 64)
        packed = Packed(
            torch.empty(values, dtype=dtype, device="meta"),
            torch.empty(rows, columns, 32, dtype=torch.int32, device="meta"),
            torch.empty(rows * columns + 1, dtype=torch.int32, device="meta"),
            shape,
            None if scale is None else torch.empty(scale, dtype=torch.float32, device="meta"),
        )
        return cls(packed, torch.empty(n, dtype=bias_dtype, device="meta") if bias else None)

    @property
    def packed(self) -> Packed:
        shape = self.out_features, self.in_features
        return Packed(self.weight, self.weight_mask, self.weight_offsets, shape, self.weight_scale, self.activations)

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """The dense twin: the kept weights, int8 values times their scale, and zeros.

        dtype: of weight and bias; by default weights keep their bits and int8 values take the dtype of the bias, or
        float32.
        """
        if dtype is None and self.weight_scale is not None and self.bias is not None:
            dtype = self.bias.dtype
        weight, _ = formats.get("sbt").dense(self.packed, dtype)
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            bias = self.bias.detach().to(dtype or self.bias.dtype, copy=True)
            linear.bias = nn.Parameter(bias, requires_grad=self.bias.requires_grad)
        linear.train(self.training)
        return linear

    def prepared(self) -> "op.Prepared":
        """The packed weight, validated once for as long as its tensors stay the same objects and `activations` so."""
        found, buffers = self._prepared, self._buffers
        if (
            found is None
            or found.packed.weight is not buffers["weight"]
            or found.packed.mask is not buffers["weight_mask"]
            or found.packed.offsets is not buffers["weight_offsets"]
            or found.packed.scale is not buffers["weight_scale"]
            or found.packed.activations is not self.activations
        ):
            found = op.prepare(self.packed, self.name or "SparseLinear")
            self._prepared = found
        return found

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] → [..., N] in x's dtype."""
        if torch.compiler.is_compiling():
            return op.spmm(x, self.packed, self.bias)
        return self.prepared()(x, self.bias)

    def extra_repr(self) -> str:
        error = self.quantization_error
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"format=sbt, bytes={self.packed.nbytes}"
            + ("" if self.weight_scale is None else ", values=int8")
            + (", activations=int8" if self.packed.bytes_allowed else "")
            + ("" if error is None else f", quantization_error={error.relative:.2g}")
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SparseLinear":
        # Module.to casts every floating buffer; a scale in bfloat16 would have lost what the integers were made with.
        scale = self.weight_scale
        super()._apply(fn, recurse)
        moved = self.weight_scale
        if scale is not None and moved is not None and moved.dtype != scale.dtype:
            self.weight_scale = scale.to(moved.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        # Another pruning of the same layer has another number of values, and may have integers where this one has
        # floats: take its size and kind, then its content.
        self._prepared = self.quantization_error = None
        values, scale = state_dict.get(prefix + "weight"), state_dict.get(prefix + "weight_scale")
        own = self.weight
        if values is not None and values.ndim == 1:
            other_kind = torch.int8 in (values.dtype, own.dtype) and values.dtype != own.dtype
            if other_kind or values.shape != own.shape:
                self.weight = own.new_empty(values.shape, dtype=values.dtype if other_kind else own.dtype)
            if values.dtype != torch.int8:
                self.weight_scale = None
            elif self.weight_scale is None or (scale is not None and scale.shape != self.weight_scale.shape):
                shape = (self.out_features,) if scale is None else scale.shape
                self.weight_scale = own.new_empty(shape, dtype=torch.float32)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def __getstate__(self) -> dict[str, Any]:
        # Addresses mean nothing in a copy or another process.
        return {**self.__dict__, "_prepared": None}


def pack_weight(
    weight: Tensor, mask: Tensor | None, values: str | None = None, group: int | None = None
) -> tuple[Packed, quantize.Error | None]:
    """The weight [N, K] in SBT and, for values="int8", what rounding it lost; the arguments of `from_linear`."""
    quantize.check(values, group)
    if values is None:
        return formats.get("sbt").pack(weight, mask), None
    kept = weight != 0 if mask is None else mask
    integers, scale, error = quantize.quantize(weight, kept, group)
    return formats.get("sbt").pack(integers, kept, scale), error


def worth_packing(weight: Tensor, mask: Tensor | None, values: str | None = None, group: int | None = None) -> bool:
    """Whether SBT is smaller than dense: the one rule for what is stored packed, the same on every machine.

    values, group: as the packed weight would have them.
    """
    shape, kept = tuple(weight.shape), int(mask.sum()) if mask is not None else int((weight != 0).sum())
    nbytes = formats.get("sbt").nbytes
    if values is None:
        return nbytes(shape, kept, weight.dtype) < weight.nbytes
    return nbytes(shape, kept, torch.int8, quantize.groups(shape[1], group)) < weight.nbytes


def loses(
    shape: tuple[int, int],
    density: float,
    dtype: torch.dtype,
    device: torch.device,
    tokens: int | None,
    fits: Callable[[base.Kernel], str | None] | None = None,
) -> bool:
    """Whether the time table of the device says that dense is faster for so many tokens; False without one.

    Integers never lose: expanded they would be other numbers. tokens: None asks nothing. fits: as `base.choose` has it.
    """
    if tokens is None or dtype == torch.int8:
        return False
    seconds = base.gain(shape, tokens, dtype, dtype, str(device), density, fits)
    return seconds is not None and seconds[0] > NOISE * seconds[1]


def expand_losers(model: Model, tokens: int | None) -> Model:
    """Replaces SparseLinear by nn.Linear, in place, where `loses` says so; returns the model. `save` packs them again.

    ValueError unless tokens is None or a whole number from 1.
    """
    check_tokens(tokens)
    for layer, names in names_of(model).items():
        if not isinstance(layer, SparseLinear):
            continue
        p = layer.packed
        if loses(p.shape, p.density, p.dtype, p.device, tokens, partial(_fits, layer)):
            base.log.info("%s: dense is faster for %d tokens by the time table; expanded", names[0], tokens)
            linear = layer.to_linear()
            linear.packed_on_disk = True  # type: ignore[assignment]  # a module takes any attribute
            put(model, names, linear)
    return model


def _fits(layer: SparseLinear, kernel: base.Kernel) -> str | None:
    return layer.prepared().fits(kernel)


def names_of(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every name that each module has in a model; most have one."""
    found: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found.setdefault(module, []).append(name)
    return found


def replace_each(model: nn.Module, kind: type[nn.Module], make: Callable[[Any], nn.Module]) -> None:
    """Puts what is made of each module of a kind in its place, under every name that it has."""
    for layer, names in names_of(model).items():
        if isinstance(layer, kind):
            put(model, names, make(layer))


def put(model: nn.Module, names: list[str], new: nn.Module) -> None:
    """Gives all these places in a model to one module."""
    for name in names:
        model.set_submodule(name, new)


def check_activations(to: str | None, integers: bool = True) -> None:
    """ValueError unless `to` is None, or int8 in a model with `integers` as values."""
    if to is not None and to not in ACTIVATIONS:
        raise ValueError(f"activations {to!r}: wanted {', '.join(ACTIVATIONS)}, or None to leave them as they are")
    if to is not None and not integers:
        raise ValueError(
            f"activations {to!r}: no layer of this model has int8 values, and only beside them x is rounded; "
            f"`alphaprune convert MODEL NEW --values int8`, or sparsify with values='int8', makes them"
        )


def round_activations(model: Model, to: str | None = "int8") -> Model:
    """Lets kernels round x to 8 bits in the layers with int8 values, in place; returns the model. None takes it back.

    Each token's x is rounded in units of 1/127 of the largest magnitude among 128 columns, while it is multiplied:
    faster for a few tokens and more, and less exact. It is a permission: CPUs with AMX, VNNI or SDOT use it; other
    kernels, those of GPUs among them, compute as before. Nothing of it is saved.
    ValueError if the model has no layer with int8 values, or `to` is anything else.
    """
    layers = [module for module in model.modules() if isinstance(module, SparseLinear)]
    check_activations(to, any(layer.weight_scale is not None for layer in layers))
    for layer in layers:
        layer.activations = None if to is None or layer.weight_scale is None else getattr(torch, to)
    return model


def check_tokens(tokens: int | None) -> None:
    """ValueError unless tokens is None or a whole number from 1."""
    if tokens is not None and tokens < 1:
        raise ValueError(f"tokens {tokens}: wanted a whole number from 1, or None to keep every layer packed")


def sparsify(
    model: Model,
    masks: dict[str, Tensor] | None = None,
    values: str | None = None,
    group: int | None = None,
    tokens: int | None = 1,
    activations: str | None = None,
) -> Model:
    """Replaces nn.Linear layers by SparseLinear, in place, where that is smaller; returns the model.

    masks: {layer: [N, K] bool, True = keep} as `prune` returns them; without masks, the zeros that are there count.
    values: "int8" rounds weights to 8 bits, with group=128 by a scale per 128 columns. Layers without zeros get smaller
    by it, too. What each layer lost stands in its `quantization_error`.
    tokens: rows of x to be fast at. Where this machine has a time table, layers that are faster dense stay so, with
    their zeros; None packs all that get smaller.
    activations: "int8", with values="int8": as `round_activations` has it.
    Convolutions stay dense, with their zeros: nothing here runs them sparse.
    A module that the model has under several names is replaced under all of them, by one.
    Raises ValueError if a mask names no linear layer or has another shape, two masks are of one module, or int8 is
    asked of NaN or infinity, or of activations alone.
    """
    quantize.check(values, group)
    check_tokens(tokens)
    check_activations(activations)
    if activations is not None and values is None:
        raise ValueError(f"activations {activations!r}: are rounded beside int8 values only; give values='int8', too")
    layers: dict[str, nn.Module | None] = {}
    if masks is None:
        for block in open_source(model).blocks():
            layers |= {name: layer for name, layer in block.linears.items() if not isinstance(layer, Matrix)}
    else:
        modules = dict(model.named_modules(remove_duplicate=False))
        layers |= {name: modules.get(name) for name in masks}
    names = names_of(model)
    owners: dict[nn.Module | None, str] = {}
    for name, layer in layers.items():
        mask = None if masks is None else masks[name]
        if isinstance(layer, nn.Conv2d) and mask is not None and mask.shape == layer.weight.flatten(1).shape:
            layer.weight.data = layer.weight.data.masked_fill(~mask.view_as(layer.weight), 0)
            continue
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"{name}: the mask names a layer that is no nn.Linear of this model")
        if (first := owners.setdefault(layer, name)) != name:
            raise ValueError(f"{name}: is the module that is called {first}, too; give a mask for one of the names")
        if mask is not None and mask.shape != layer.weight.shape:
            raise ValueError(f"{name}: mask has shape {tuple(mask.shape)}, the weight {tuple(layer.weight.shape)}")
        if worth_packing(layer.weight, mask, values, group):
            try:
                sparse = SparseLinear.from_linear(layer, mask, values, group)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            sparse.name = name
            put(model, names[layer], sparse)
        elif mask is not None:
            layer.weight.data = layer.weight.data.masked_fill(~mask, 0)
    if activations is not None:
        round_activations(model, activations)
    return pages.huge_pages(expand_losers(model, tokens), SparseLinear)
