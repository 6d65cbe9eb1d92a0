"""Experts as separate linear layers: in a module, whatever transformers has there, and in files, however they lie.

transformers keeps the matrices of all experts of a block in two 3-D parameters. Here every matrix is a layer of its
own, with its own spectrum, mask and packed weight, and a token costs the experts that it is routed to.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from alphaprune import families
from alphaprune.families import Family
from alphaprune.shards import Shards

FUSED = "gate_up_proj", "down_proj"  # parameters of transformers' modules of experts


class Experts(nn.Module):
    """The experts of one block; called as transformers' modules of experts are, with the same result.

    Children "0", "1", … hold the linear layers of each, under the names of `families.Experts`.
    """

    def __init__(self, names: families.Experts, gate_up: Tensor, down: Tensor, act: nn.Module) -> None:
        """gate_up: [experts, 2·I, H], down: [experts, H, I], as transformers has them; they are copied."""
        super().__init__()
        self.names, self.count, self.act_fn = names, len(down), act
        inside = down.shape[2]
        for index in range(self.count):
            parts = {names.gate: gate_up[index, :inside], names.up: gate_up[index, inside:], names.down: down[index]}
            self.add_module(str(index), nn.ModuleDict({name: _linear(part) for name, part in parts.items()}))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [tokens, H], chosen experts and their shares [tokens, chosen] → [tokens, H]."""
        found = torch.zeros_like(hidden_states)
        for index in top_k_index.unique().tolist():
            if index < self.count:  # one past the last: a token that is not for the experts of this process
                token, place = torch.where(top_k_index == index)
                out = self.expert(index, hidden_states[token]) * top_k_weights[token, place, None]
                found.index_add_(0, token, out.to(found.dtype))
        return found

    def expert(self, index: int, x: Tensor) -> Tensor:
        """What one expert makes of tokens [tokens, H]."""
        layers = self._modules[str(index)]
        return layers[self.names.down](self.act_fn(layers[self.names.gate](x)) * layers[self.names.up](x))


def _linear(weight: Tensor) -> nn.Linear:
    """A linear layer with a copy of the weight [N, K]."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    return layer


def separate(model: nn.Module, family: Family) -> bool:
    """Gives a model separate experts, in place, one block after another; whether there was anything to do."""
    if family.experts is None:
        return False
    found = [(n, m) for n, m in model.named_modules() if n.endswith(f".{family.experts.path}") and _is_fused(m)]
    for name, module in found:
        model.set_submodule(name, Experts(family.experts, *(getattr(module, part) for part in FUSED), module.act_fn))
        for part in FUSED:  # before the next block is copied, though somebody may hold this one's module
            delattr(module, part)
    return bool(found)


def _is_fused(module: nn.Module) -> bool:
    parameters = [module._parameters.get(part) for part in FUSED]
    return all(parameter is not None and parameter.ndim == 3 for parameter in parameters)


class NamedShards:
    """The tensors of a folder under the names that the module has for them: what `Shards` is for most families."""

    def __init__(self, raw: Shards, family: Family) -> None:
        self.raw = raw
        self._places: dict[str, tuple[str, tuple[int, slice] | None]] = {}  # name → tensor in the files, and its part
        for stored in raw.names():
            for name, part in self._split(stored, family):
                self._places[name] = stored, part

    def _split(self, stored: str, family: Family) -> list[tuple[str, tuple[int, slice] | None]]:
        """The tensors of the module that lie in one of the files."""
        name, names = family.module_name(stored), family.experts
        fused = {} if names is None else {f".{names.path}.{part}": part for part in FUSED}
        ending = next((e for e in fused if name.endswith(e)), None)
        if ending is None or len(self.raw.shape(stored)) != 3:
            return [(name, None)]
        count, rows, _ = self.raw.shape(stored)
        cuts = {names.down: slice(0, rows)}
        if fused[ending] == FUSED[0]:
            cuts = {names.gate: slice(0, rows // 2), names.up: slice(rows // 2, rows)}
        stem = name.removesuffix(fused[ending])
        return [(f"{stem}{i}.{layer}.weight", (i, cut)) for i in range(count) for layer, cut in cuts.items()]

    def names(self) -> list[str]:
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        stored, part = self._place(name)
        shape = self.raw.shape(stored)
        return shape if part is None else (part[1].stop - part[1].start, shape[2])

    def dtype(self, name: str) -> str:
        return self.raw.dtype(self._place(name)[0])

    def tensor(self, name: str) -> Tensor:
        """The values, mapped from the file or, of one expert of many, read from it."""
        stored, part = self._place(name)
        return self.raw.tensor(stored) if part is None else self.raw.part(stored, part[0], part[1])

    def loaded(self, name: str) -> Tensor:
        """The values, read into memory."""
        stored, part = self._place(name)
        return self.raw.loaded(stored) if part is None else self.raw.part(stored, part[0], part[1])

    def rows(self, name: str, rows: list[int]) -> Tensor:
        """Some rows of a matrix; the rest is not read."""
        stored, part = self._place(name)
        if part is None:
            return self.raw.rows(stored, rows)
        first = part[1].start
        return torch.cat([self.raw.part(stored, part[0], slice(first + row, first + row + 1)) for row in rows])

    def check_unchanged(self) -> None:
        self.raw.check_unchanged()

    def stamps(self) -> dict[str, list[int]]:
        return self.raw.stamps()

    def _place(self, name: str) -> tuple[str, tuple[int, slice] | None]:
        return self._places.get(name) or (name, None)  # `raw` says that it is missing


def named_shards(folder: Path, family: Family) -> "Shards | NamedShards":
    """The tensors of a folder under the names that the modules of its family have."""
    raw = Shards(folder)
    return NamedShards(raw, family) if family.stored or family.experts else raw
