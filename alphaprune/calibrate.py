"""Activation statistics, streamed block by block: hidden states in, statistics of a block and new hidden states out.

The inputs of a block are the outputs of the *pruned* blocks before it; all layers of a block see the block while it
is still dense (Wanda's protocol: Sun et al. 2023, section 3).
"""

import logging
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from alphaprune import memory, ranks
from alphaprune.experts import Experts
from alphaprune.gram import Gram, full_float32
from alphaprune.model import Block, DirectorySource, Source
from alphaprune.states import Room, States

Need = Literal["nothing", "norms", "gram"]  # what a method must know of a layer's inputs; each includes those before

TOKENS_AT_ONCE = 4096  # so many tokens go through a block together
STRANDS = 8  # sums over batches are made of so many, whatever the number of processes, so that their bits never change

log = logging.getLogger("alphaprune")


class _Captured(Exception):
    """Ends a forward pass when the inputs of the first block and the keywords of all are known."""


@dataclass(frozen=True)
class InputStat:
    """What is known of the inputs x of a layer, over all calibration tokens.

    norms: [K] float32, ‖X_j‖₂ as the root of its mean square over samples.   gram: their second moments, if asked for;
    layers that have the same input share one object.   tokens: how many were seen.
    """

    norms: Tensor
    gram: Gram | None
    tokens: int


@dataclass
class Activations:
    """Inputs of the next block: `hidden`, a list of [batch, length, D]; `keywords`, what each block is called with.

    Blocks of one model may differ in them: some see all tokens and others a window, with other rotary embeddings.
    batches, total: batches and samples of all processes, where several share them; `hidden` are those of this one.
    """

    hidden: "States | list[Tensor]"
    keywords: list[dict[str, Any]] = field(default_factory=list)
    batches: int | None = None
    total: int | None = None

    def samples(self) -> int:
        return sum(h.shape[0] for h in self.hidden) if self.total is None else self.total

    def strands(self) -> tuple[list[range], int]:
        """Places in `hidden` that are summed together, strand by strand, and how many strands all processes have."""
        own, count = ranks.strands(len(self.hidden) if self.batches is None else self.batches, STRANDS)
        first = own[0].start if own else 0
        return [range(strand.start - first, strand.stop - first) for strand in own], count


def first_inputs(source: Source, tokens: Tensor, room: Room | None = None) -> Activations:
    """What the first block sees for `tokens` [samples, length] int64: embeddings and the blocks' keyword arguments.

    room: where hidden states may lie, see states.py. Of several processes each has its own part of the samples.
    """
    if tokens.ndim != 2 or tokens.shape[0] == 0:
        raise ValueError(
            f"calibration tokens: wanted [samples, length] with a sample at least, got {tuple(tokens.shape)}"
        )
    blocks = list(source.skeleton.get_submodule(source.prefix).children())
    parts = batches(tokens)
    own = [place for strand in ranks.strands(len(parts), STRANDS)[0] for place in strand]
    found = Activations(States(room), [], len(parts), len(tokens))

    def pass_on(hidden_states: Tensor, **keywords: Any) -> tuple[Tensor]:
        """In the place of every block; what it returns serves models that take it whole, and its first part."""
        if len(found.keywords) == len(blocks):
            found.hidden.append(hidden_states)
            raise _Captured
        found.keywords.append(keywords)
        if len(found.keywords) == len(blocks):
            raise _Captured
        return hidden_states if isinstance(hidden_states, tuple) else (hidden_states,)

    with loaded(source), torch.no_grad(), _evaluating(source.skeleton), _replaced(blocks, pass_on):
        # One sample to learn the keywords (their batch dimension is 1, so they serve every batch size),
        # then the embeddings of all.
        for part in (tokens[:1], *(parts[place] for place in own)):
            with suppress(_Captured):
                source.skeleton(input_ids=part.to(_device(source.skeleton)), use_cache=False)
    return found


def batches(tokens: Tensor) -> tuple[Tensor, ...]:
    """Tokens [samples, length] in the parts that go through a block together, which hidden states are kept in."""
    return tokens.split(max(1, TOKENS_AT_ONCE // tokens.shape[1]))


def head_inputs(source: Source, tokens: Tensor, hidden: Tensor) -> Tensor:
    """What the head is given where `hidden` [batch, length, D] leaves the last block, for `tokens` [batch, length].

    The embeddings, norm and head of the model must be there, see `loaded`.
    """
    blocks = list(source.skeleton.get_submodule(source.prefix).children())
    for returned in (hidden, (hidden,)):  # models take what a block returns whole, or its first part
        given = partial(_given, returned)
        with torch.no_grad(), _evaluating(source.skeleton), _replaced(blocks, given):
            tokens = tokens.to(_device(source.skeleton))
            found = source.skeleton.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        if found.shape[:2] == hidden.shape[:2] and found.ndim == hidden.ndim:
            return found
    raise ValueError(f"{source.name}: what leaves its last block cannot be given to its head; evaluate it as a whole")


def _given(returned: Any, *_: Any, **__: Any) -> Any:
    return returned


@contextmanager
def loaded(source: Source) -> Iterator[None]:
    """Has embeddings, norm and head of a source in memory."""
    lazy = isinstance(source, DirectorySource)
    if lazy:
        source.load_outside()
    try:
        yield
    finally:
        if lazy:
            source.unload_outside()


@contextmanager
def _replaced(blocks: Iterable[nn.Module], forward: Any) -> Iterator[None]:
    """Blocks that compute something else for a time."""
    before = [(block, vars(block).get("forward")) for block in blocks]
    for block, _ in before:
        block.forward = forward
    try:
        yield
    finally:
        for block, own in before:
            del block.forward
            if own is not None:  # such as a library's that moves inputs between devices
                block.forward = own


def run(block: Block, activations: Activations) -> None:
    """Replaces the hidden states by what the block makes of them; they stay on the device that they are on."""
    with torch.no_grad(), _evaluating(block.module):
        for place, hidden in enumerate(activations.hidden):
            activations.hidden[place] = _forward(block, hidden, activations.keywords[block.index]).to(hidden.device)


def statistics(block: Block, activations: Activations, need: Need = "norms") -> dict[str, InputStat]:
    """For every prunable layer of the block what `need` asks of its inputs; nothing at all for "nothing".

    ‖X_j‖₂² = Σ over tokens of x_j², averaged over samples, in float64. The Gram matrix is summed in float32 on the
    block's device. Sums are made of strands of batches that are added in order: several processes share the strands,
    and find the same bits as one does. Layers that are given the same tensor are summed once.
    Experts are known by the tokens that are routed to them; one that gets none, by all tokens of its block as though
    they were, and a warning names it.
    Raises ValueError naming the layer if its inputs hold NaN or infinity.
    """
    if need == "nothing":
        return {}
    observers = {name: _Observer(layer, need == "gram") for name, layer in block.linears.items()}
    groups = _Groups(observers)
    with torch.no_grad(), _evaluating(block.module), full_float32():
        _watch(block, activations, groups, block.linears)
        if idle := _idle(block, groups):
            unseen = [name for name in block.linears if name not in groups.leader]
            observers |= {name: _Observer(block.linears[name], need == "gram") for name in unseen}
            _watch(block, activations, groups, unseen, idle)
    _, strands = activations.strands()
    found = {
        name: observer.result(activations.samples(), strands) for name, observer in observers.items() if observer.tokens
    }
    for name in block.linears:
        leader = groups.leader.get(name, name)
        if leader not in found:
            raise ValueError(f"{name}: no calibration token reached this layer; give more calibration text")
        if not bool(torch.isfinite(found[leader].norms).all()):
            raise ValueError(
                f"{name}: its inputs hold NaN or infinity for this calibration text; load the model in a dtype with "
                f"more range, or repair the layers before it"
            )
    return {name: found[groups.leader.get(name, name)] for name in block.linears}


def _watch(
    block: Block,
    activations: Activations,
    groups: "_Groups",
    names: Iterable[str],
    asked: "Iterable[tuple[Experts, list[int]]]" = (),
) -> None:
    """Runs all samples through the block and observes the named layers; `asked` experts get every token besides."""
    own, _ = activations.strands()
    with ExitStack() as hooks:
        for name in names:
            hooks.callback(block.linears[name].register_forward_pre_hook(groups.hook(name)).remove)
        for module, indices in asked:

            def ask(module: Experts, arguments: tuple, indices: list[int] = indices) -> None:
                for index in indices:
                    module.expert(index, arguments[0])

            hooks.callback(module.register_forward_pre_hook(ask).remove)
        for strand in own:
            for place in strand:
                groups.clear()
                _forward(block, activations.hidden[place], activations.keywords[block.index])
            for name in names:
                groups.observers[name].close(last=strand is own[-1])
    groups.meet(names)


def _idle(block: Block, groups: "_Groups") -> list[tuple[Experts, list[int]]]:
    """The modules of experts with the numbers of those that no token was routed to; a warning names them."""
    found = []
    for inner, module in block.module.named_modules():
        if isinstance(module, Experts):
            path = f"{block.name}.{inner}"
            unseen = [i for i in range(module.count) if f"{path}.{i}.{module.names.gate}" not in groups.leader]
            if unseen:
                found.append((module, unseen))
                log.warning(
                    "%s: no calibration token was routed to %d of %d experts (%s); they are calibrated on all tokens "
                    "of their block; more calibration text would reach them",
                    *(path, len(unseen), module.count, ", ".join(map(str, unseen))),
                )
    return found


@contextmanager
def on(block: Block, device: str | None) -> Iterator[None]:
    """Has a block on a device, and afterwards where it was; ValueError if what is done there takes too much memory."""
    if device is None:
        yield
        return
    before = next(block.module.parameters()).device
    needs = {f"the weights of {block.name}": memory.nbytes(block.module)}
    with memory.explained(needs, device, "give less or shorter calibration text, or another --device"):
        block.module.to(device)
        try:
            yield
        finally:
            block.module.to(before)


class _Observer:
    """Sums over the inputs of one layer."""

    def __init__(self, layer: nn.Linear, with_gram: bool) -> None:
        k, device = layer.weight.shape[1], layer.weight.device
        self.squares = torch.zeros(k, dtype=torch.float64, device=device)
        self.gram = torch.zeros(k, k, dtype=torch.float32, device=device) if with_gram else None
        self.closed: tuple[list[Tensor], list[Tensor]] = [], []  # sums of strands: of squares, and Gram matrices
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        x = x.detach().flatten(0, -2).float()  # [tokens, K]
        self.tokens += x.shape[0]
        self.squares += x.square().sum(0, dtype=torch.float64)
        if self.gram is not None:
            self.gram.addmm_(x.T, x)

    def close(self, last: bool) -> None:
        """Ends a strand, the last one of this process perhaps."""
        for current, sums in zip((self.squares, self.gram), self.closed, strict=True):
            if current is None:
                continue
            if ranks.world().size == 1 and sums:  # two at a time are enough
                sums[0].add_(current)
            else:
                sums.append(current if last else current.clone())
            if not last:
                current.zero_()

    def result(self, samples: int, strands: int) -> InputStat:
        norms = (ranks.fold(self.closed[0], self.squares, strands) / samples).sqrt().float()
        gram = None
        if self.gram is not None:
            gram = Gram(ranks.fold(self.closed[1], self.gram, strands).div_(samples), self.tokens)
            self.closed[1].clear()
        return InputStat(norms, gram, self.tokens)


class _Groups:
    """Finds out in the first pass which layers are given the same tensor; the first of them observes for all."""

    def __init__(self, observers: dict[str, _Observer]) -> None:
        self.observers, self.leader = observers, {}
        self.inputs: dict[str, Tensor] = {}  # of this pass: held, so that no other tensor gets their address

    def clear(self) -> None:
        self.inputs = {}

    def meet(self, names: Iterable[str]) -> None:
        """Takes together what several processes have seen of the named layers."""
        everything = ranks.gather((self.leader, {name: o.tokens for name, o in self.observers.items()}))
        for leader, _ in reversed(everything):
            self.leader |= leader
        for name in names:
            self.observers[name].tokens = sum(tokens[name] for _, tokens in everything)

    def hook(self, name: str):
        def observe(module: nn.Module, arguments: tuple) -> None:
            x = arguments[0]
            if name not in self.leader:
                same = (other for other, seen in self.inputs.items() if seen is x and self.leader[other] == other)
                self.leader[name] = next(same, name)
            if self.leader[name] == name:
                self.inputs[name] = x
                self.observers[name].add(x)

        return observe


def _forward(block: Block, hidden: Tensor, keywords: dict[str, Any]) -> Tensor:
    """What the block makes of hidden states [batch, length, D], on the block's own device."""
    device = next(block.module.parameters()).device
    out = block.module(_moved(hidden, device), **_moved(keywords, device))
    return out[0] if isinstance(out, tuple) else out


def _moved(value: Any, device: torch.device) -> Any:
    """Tensors of nested tuples, lists and dicts on `device`; everything else as it is."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(inner, device) for key, inner in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_moved(inner, device) for inner in value)
    return value


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Dropout off for the time of a pass, and the mode as it was after it."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


def _device(model: nn.Module) -> torch.device:
    return model.get_input_embeddings().weight.device
