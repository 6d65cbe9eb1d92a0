"""Any tree of modules as blocks: its nn.Linear and nn.Conv2d layers, and what reaches them from batches of inputs.

The weight of a convolution [out, in/groups, kh, kw] is the matrix [out, in/groups·kh·kw] that its unfolded input is
multiplied with (torch.nn.Unfold's order of columns), for spectra, scores and masks alike. Published code for image
classifiers pools the spectra of the kh·kw slices instead, which for 1×1 kernels is the same up to a factor.
Depthwise convolutions, of one input channel per group, are left out unless asked for: they hold few weights, and their
matrices have no more columns than the kernel has places. Where there are groups, every row has the norms of its own.
"""

import fnmatch
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alphaprune import devices
from alphaprune import model as models
from alphaprune.calibrate import InputStat, Need
from alphaprune.gram import Gram, full_float32
from alphaprune.model import Block, Source
from alphaprune.shards import dtype_name

AT_ONCE = 32  # inputs that go through a model together, of a tensor that holds them all
# Classes of timm whose blocks stand elsewhere than at the top, as the paper prunes them: stem and head are left out.
BLOCKS = {
    "VisionTransformer": "blocks",
    "VisionTransformerDistilled": "blocks",
    "ConvNeXt": "stages.*.blocks",
}
Layer = nn.Linear | nn.Conv2d


class Matrix(nn.Module):
    """A convolution as its matrix, in the place of an nn.Linear: `weight` [out, in/groups·kh·kw], which is a copy."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.weight = nn.Parameter(layer.weight.detach().flatten(1).clone(), requires_grad=False)
        self.bias = layer.bias


class Tree(Source):
    """A live module and its blocks, for `analyze`, `prune` and `sparsify`; pruning changes it in place.

    blocks: the path of the module whose children are the blocks, `*` for any name in it, such as "blocks" or
    "stages.*.blocks"; only layers inside blocks are prunable. By default those of BLOCKS for the classes there, and
    otherwise every child of the module is a block, or its children where it is a list of modules with layers in them.
    skip: patterns of layer names to leave as they are.   depthwise: depthwise convolutions are prunable, too.
    The layers of nn.MultiheadAttention are left as they are, since it reads their weights past them.
    """

    def __init__(
        self, module: nn.Module, blocks: str | None = None, skip: Iterable[str] = (), depthwise: bool = False
    ) -> None:
        self.skeleton, self.config, self.name = module, None, type(module).__name__
        self.skip, self.depthwise = tuple(skip), depthwise
        if blocks is None and type(module).__module__.startswith("timm."):
            blocks = BLOCKS.get(type(module).__name__)
        found = _children_at(module, blocks) if blocks is not None else _top(module)
        self.parts = {name: (part, self._inside(name, part)) for name, part in found}
        self.parts = {name: part for name, part in self.parts.items() if part[1]}
        if not self.parts:
            where = f"at {blocks!r}" if blocks is not None else "in it"
            raise ValueError(
                f"{self.name}: no nn.Linear or nn.Conv2d {where} that could be pruned; say where its blocks are with "
                f"alphaprune.Tree(module, blocks=…)"
            )
        owners: dict[int, str] = {}  # of weights, which would be pruned once for every layer that has them
        for _, name, layer in self._layers():
            if (first := owners.setdefault(id(layer.weight), name)) != name:
                raise ValueError(
                    f"{name}: has the weight of {first}; leave it out: alphaprune.Tree(module, skip=[{name!r}])"
                )

    def blocks(self, wanted: Container[int] | None = None) -> Iterator[Block]:
        """As Source has it; a convolution takes what its matrix was changed to when the next block is asked for."""
        for index, (name, (module, layers)) in enumerate(self.parts.items()):
            if wanted is not None and index not in wanted:
                continue
            linears = {n: Matrix(m) if isinstance(m, nn.Conv2d) else m for n, m in layers.items()}
            yield Block(index, name, module, linears)  # type: ignore[arg-type]  # a Matrix stands in for a linear layer
            for layer_name, matrix in linears.items():
                if isinstance(matrix, Matrix):
                    weight = layers[layer_name].weight
                    weight.data = matrix.weight.data.reshape(weight.shape).to(weight.dtype)

    def block_count(self) -> int:
        return len(self.parts)

    def block_name(self, index: int) -> str:
        return list(self.parts)[index]

    def outside_tensors(self, packed: bool = False) -> Iterator[tuple[str, Tensor]]:
        inside = {f"{name}." for name in self.parts}
        for name, tensor in self.skeleton.state_dict().items():
            if not any(name.startswith(prefix) for prefix in inside):
                yield name, tensor

    def _decoder(self) -> nn.Module:
        return self.skeleton

    def _layers(self) -> Iterator[tuple[int, str, Layer]]:
        for index, (_, layers) in enumerate(self.parts.values()):
            yield from ((index, name, layer) for name, layer in layers.items())

    def _inside(self, prefix: str, part: nn.Module) -> dict[str, Layer]:
        """The prunable layers inside a block, by full name, in order."""
        found: dict[str, Layer] = {}
        opaque: tuple[str, ...] = ()
        for inner, layer in part.named_modules():
            name = f"{prefix}.{inner}" if inner else prefix
            if isinstance(layer, nn.MultiheadAttention):
                opaque += (f"{name}.",)
            prunable = isinstance(layer, nn.Linear) or (
                isinstance(layer, nn.Conv2d) and (self.depthwise or not is_depthwise(layer))
            )
            if prunable and not name.startswith(opaque) and not any(fnmatch.fnmatch(name, s) for s in self.skip):
                found[name] = layer
        return found

    def _row_sample(self, name: str, rows: list[int]) -> Tensor:
        return self.skeleton.get_parameter(name).detach().flatten(1)[rows]

    def _dtype(self, name: str) -> str:
        return dtype_name(self.skeleton.get_parameter(name).dtype)


def open_source(source: "Source | nn.Module | str | Path") -> Source:
    """As model.open_source; a module that is no model of transformers is a `Tree`."""
    if isinstance(source, nn.Module) and not hasattr(getattr(source, "config", None), "model_type"):
        return Tree(source)
    return models.open_source(source)


def check(
    source: Source, tokens: Tensor | None = None, device: str | None = None, channel_permute: bool = False
) -> None:
    """ValueError for what is asked of a tree and known for language models only, or for a device that is not here."""
    if not isinstance(source, Tree):
        if device is not None:
            devices.named(device)
        return
    if tokens is not None:
        raise ValueError(f"{source.name}: a tree of modules is calibrated with inputs=…, not with tokens")
    if device is not None:
        raise ValueError(f"{source.name}: a tree of modules is pruned where it is: move it with .to({device!r})")
    if channel_permute:
        raise ValueError(f"{source.name}: --channel-permute knows language models only; leave it out")


def is_depthwise(layer: nn.Conv2d) -> bool:
    """Whether every group has one input channel, and there is more than one."""
    return layer.groups > 1 and layer.groups == layer.in_channels


def statistics(
    tree: Source, inputs: Any, need: Need, prefix: str = "pruned"
) -> Callable[[Block], dict[str, InputStat]] | None:
    """What a driver over blocks asks for the inputs of a block's layers; None where nothing is needed.

    inputs: a tensor [samples, …], or batches of them: tensors, tuples whose first entry counts (images, labels), or
    dicts of keyword arguments. The batches go through the whole module once per block, behind the blocks that are
    pruned already (prefix "pruned"), or once in all (prefix "dense").
    """
    if not isinstance(tree, Tree):
        raise ValueError(f"{tree.name}: inputs are for trees of modules; give a language model tokens")
    if need == "nothing":
        return None
    everything = {name: layer for _, layers in tree.parts.values() for name, layer in layers.items()}
    grouped = [n for n, m in everything.items() if isinstance(m, nn.Conv2d) and m.groups > 1]
    if need == "gram" and grouped:
        raise ValueError(
            f"{grouped[0]}: a convolution in groups has no one matrix of second moments; choose magnitude, wanda or "
            f"ria without a refit, or leave it out: alphaprune.Tree(module, skip=[{grouped[0]!r}])"
        )
    batches = _batches(inputs)
    if prefix == "dense":
        known = observe(tree.skeleton, everything, batches, need)
        return lambda block: {name: known[name] for name in block.linears}
    return lambda block: observe(tree.skeleton, tree.parts[block.name][1], batches, need)


def observe(module: nn.Module, layers: Mapping[str, Layer], batches: Iterable[Any], need: Need) -> dict[str, InputStat]:
    """For every layer what `need` asks of its inputs while batches go through the module.

    ‖X_j‖₂² = Σ over rows of x_j², averaged over samples, in float64; of convolutions the rows are unfolded patches.
    ValueError naming the layer that no input reached, or whose inputs hold NaN or infinity.
    """
    sums = {name: _Sums(layer, need == "gram") for name, layer in layers.items()}
    hooks = [layer.register_forward_pre_hook(sums[name].see) for name, layer in layers.items()]
    first, samples, training = next(module.parameters()), 0, module.training
    module.eval()
    try:
        with torch.no_grad(), full_float32():
            for batch in batches:
                samples += _feed(module, batch, first)
    finally:
        module.train(training)
        for hook in hooks:
            hook.remove()
    if samples == 0:
        raise ValueError("inputs: there is no batch in them; an iterator that was used up before, perhaps")
    return {name: found.result(name, samples) for name, found in sums.items()}


class _Sums:
    """Sums over the rows that a layer multiplies."""

    def __init__(self, layer: Layer, with_gram: bool) -> None:
        self.layer = layer
        groups, columns = getattr(layer, "groups", 1), layer.weight[0].numel()
        device = layer.weight.device
        self.squares = torch.zeros(groups, columns, dtype=torch.float64, device=device)
        self.gram = torch.zeros(columns, columns, device=device) if with_gram else None
        self.rows = 0

    def see(self, _: nn.Module, arguments: tuple[Any, ...]) -> None:
        # One sample at a time of what is unfolded: patches overlap, and take kh·kw times the memory of the image.
        x = arguments[0].detach()
        if not isinstance(self.layer, nn.Conv2d):
            self._add(x.flatten(0, -2).float()[:, None])
            return
        for image in x if x.ndim == 4 else x[None]:
            self._add(unfold(image.float(), self.layer))

    def _add(self, rows: Tensor) -> None:
        """rows: [n, groups, K]."""
        self.rows += len(rows)
        self.squares += rows.square().sum(0, dtype=torch.float64)
        if self.gram is not None:
            self.gram.addmm_(rows[:, 0].t(), rows[:, 0])

    def result(self, name: str, samples: int) -> InputStat:
        if self.rows == 0:
            raise ValueError(
                f"{name}: no input reached this layer; leave it out: alphaprune.Tree(module, skip=[{name!r}])"
            )
        norms = (self.squares / samples).sqrt().float()  # [groups, K]
        if not bool(torch.isfinite(norms).all()):
            raise ValueError(f"{name}: its inputs hold NaN or infinity for these batches")
        groups, rows = len(norms), len(self.layer.weight)
        norms = norms[0] if groups == 1 else norms.repeat_interleave(rows // groups, 0)  # [N, K]
        gram = None if self.gram is None else Gram(self.gram.div_(samples), self.rows)
        return InputStat(norms, gram, self.rows)


def unfold(image: Tensor, layer: nn.Conv2d) -> Tensor:
    """The rows that a convolution's matrix is multiplied with: image [C, H, W] → [places, groups, C/groups·kh·kw]."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = nn.functional.pad(image[None], layer._reversed_padding_repeated_twice, mode=mode)
    columns = nn.functional.unfold(padded, layer.kernel_size, layer.dilation, 0, layer.stride)[0]  # [C·kh·kw, places]
    return columns.t().unflatten(1, (layer.groups, -1))


def _batches(inputs: Any) -> Iterable[Any]:
    """Batches that can be gone through several times."""
    if isinstance(inputs, Tensor):
        if inputs.ndim < 2 or len(inputs) == 0:
            raise ValueError(f"inputs: wanted [samples, …] with a sample at least, got {tuple(inputs.shape)}")
        return inputs.split(AT_ONCE)
    if isinstance(inputs, Iterator):
        return list(inputs)
    if not isinstance(inputs, Iterable) or isinstance(inputs, str | bytes | Mapping):
        raise ValueError(f"inputs: wanted a tensor or batches of tensors, got {type(inputs).__name__}")
    return inputs


def _feed(module: nn.Module, batch: Any, like: Tensor) -> int:
    """Sends a batch through a module; how many samples that were."""

    def placed(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(like.device, like.dtype) if value.is_floating_point() else value.to(like.device)

    if isinstance(batch, Mapping):
        found = {name: placed(value) for name, value in batch.items()}
        module(**found)
        return next(len(value) for value in found.values() if isinstance(value, Tensor))
    found = batch[0] if isinstance(batch, tuple | list) else batch
    if not isinstance(found, Tensor):
        raise ValueError(
            f"inputs: a batch is {type(batch).__name__}; wanted a tensor, (tensor, …) or a dict of tensors"
        )
    module(placed(found))
    return len(found)


def _top(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        inner = dict(child.named_children())
        is_list = isinstance(child, nn.Sequential | nn.ModuleList)
        if is_list and any(part is not m and isinstance(m, Layer) for part in inner.values() for m in part.modules()):
            yield from ((f"{name}.{key}", part) for key, part in inner.items())
        else:
            yield name, child


def _children_at(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    pattern = re.compile(r"\.".join(r"[^.]+" if part == "*" else re.escape(part) for part in path.split(".")))
    for name, found in module.named_modules():
        if pattern.fullmatch(name):
            yield from ((f"{name}.{key}", child) for key, child in found.named_children())
