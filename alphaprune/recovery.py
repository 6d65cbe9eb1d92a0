"""LoRA recovery: a pruned model and text → the same zeros, better kept weights.

Every prunable layer gets an adapter that is masked (see masked_lora.py) and trained on the text by AdamW with the
usual loss; the sum is merged and rounded, and the layer is as sparse as before. Which windows a step sees depends on
the seed and the step alone, so a run that was killed goes on from its last saved state as if nothing had been.
"""

import importlib.util
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from alphaprune import __version__, checkpoint, devices, evaluate, hf, memory, shards, unfinished
from alphaprune import model as models
from alphaprune.data import Text
from alphaprune.files import explained
from alphaprune.layer import SparseLinear, names_of, put
from alphaprune.pruning import PrunedBlock
from alphaprune.recovery_masks import check_masks, masks_of, packed_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STATE = "training.part"  # in the folder of an unfinished run; the suffix has it removed when the run is whole
WARM_UP, LAST = 0.05, 0.02  # share of the steps in which the rate rises; share of it that the last steps have
CLIP = 1.0  # norm of the gradient
BETAS = (0.9, 0.95)
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """How adapters are trained.

    rank, alpha: the update is alpha / rank · M∘(B A); alpha is by default twice the rank.   learning_rate: its peak,
    after a linear warm-up and before a cosine to nearly 0.   batch: windows per step; at_once: of them so many go
    through the model together, by default all.   seed: of A's first values and of the order of the windows.
    """

    rank: int = 32
    alpha: float | None = None
    learning_rate: float = 2e-3
    steps: int = 300
    batch: int = 8
    at_once: int | None = None
    seed: int = 0

    def check(self) -> None:
        """ValueError for a number that is out of range."""
        for name in ("rank", "steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: wanted a whole number from 1")
        if self.at_once is not None and self.at_once < 1:
            raise ValueError(f"at_once {self.at_once}: wanted a whole number from 1")
        for name in ("learning_rate", "alpha"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} {value}: wanted a number above 0")

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        warm = max(1, round(WARM_UP * self.steps))
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        fallen = (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm))) / 2
        return self.learning_rate * (LAST + (1 - LAST) * fallen)

    def picks(self, step: int, windows: int) -> Tensor:
        """[batch] which windows a step sees: all of them once per epoch, in a new order each time."""
        epoch, place = divmod(step * self.batch, windows - windows % self.batch)
        order = torch.randperm(windows, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + epoch))
        return order[place : place + self.batch]


def recover(
    model: nn.Module,
    masks: dict[str, Tensor] | None = None,
    tokens: Tensor | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    state: Path | None = None,
    save_seconds: float = 60.0,
    teacher: nn.Module | None = None,
    **options: Any,
) -> list[float]:
    """Trains the kept weights of a pruned model in place, zeros exactly as they were; the loss of every step, nats.

    masks: {layer: [N, K] bool, True = keep}; by default those of packed layers, and what is not 0 in dense ones.
    tokens: [windows, length] int64 text, a batch of windows at least.   dtype: to compute in; that of the weights by
    default, to which every sum is rounded in any case.   options: those of `Settings`.
    teacher: the dense model, whose probabilities are learned in place of the text's own tokens: the loss is then
    KL(teacher ‖ model) per token.
    state: a file that the training is saved to every `save_seconds` and goes on from.   progress: called every step.
    Packed layers come back packed. Where an error is raised the model stays as it was.
    ValueError naming the layer for masks that do not fit, a rank that is too large, int8 values; without PEFT.
    """
    settings = Settings(**options)
    settings.check()
    check_peft()
    tokens = check_tokens(tokens, settings.batch)
    packed = packed_of(model)
    masks = masks_of(model) if masks is None else masks
    check_masks(model, masks, settings.rank)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    sparse = {name: layer for name, layer in packed.items() if name in masks}
    names = names_of(model)
    places = {name: names[layer] for name, layer in sparse.items()}
    for name, layer in sparse.items():
        put(model, places[name], layer.to_linear())
    done = False
    try:
        with computing_in(model, dtype) as stored:
            losses = _train(model, masks, tokens, settings, stored, progress, state, save_seconds, teacher)
        done = True
    finally:
        for name, layer in sparse.items():
            trained, made = model.get_submodule(name), layer
            if done and isinstance(trained, nn.Linear):
                made = SparseLinear.from_linear(trained, masks[name])
                made.name = layer.name
            put(model, places[name], made)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before.get(name, False))
    return losses


def check_peft() -> None:
    """ValueError where PEFT is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise ValueError("recovery trains adapters of PEFT, which is not installed: pip install 'alphaprune[peft]'")


def check_tokens(tokens: Tensor | None, batch: int) -> Tensor:
    """The windows of text; ValueError unless there is one batch of them at least."""
    if tokens is None or tokens.ndim != 2 or tokens.shape[1] < 2:
        found = "nothing" if tokens is None else tuple(tokens.shape)
        raise ValueError(f"tokens: wanted windows of text, [windows, length ≥ 2] int64, got {found}")
    if len(tokens) < batch:
        raise ValueError(
            f"the text has {len(tokens)} windows of {tokens.shape[1]} tokens to train on, fewer than a batch of "
            f"{batch}; give more text, or a smaller batch or length"
        )
    return tokens


@contextmanager
def computing_in(model: nn.Module, dtype: torch.dtype | None) -> Iterator[dict[str, torch.dtype]]:
    """Has all parameters in a dtype, and afterwards in their own, which it yields by layer name.

    Buffers, such as rotary tables, stay as they are.
    """
    before = {name: p.dtype for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype or parameter.dtype)
    try:
        yield {name.removesuffix(".weight"): found for name, found in before.items()}
    finally:
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(before[name])


def _train(
    model: nn.Module,
    masks: dict[str, Tensor],
    tokens: Tensor,
    settings: Settings,
    stored: dict[str, torch.dtype],
    progress: Progress | None,
    state: Path | None,
    save_seconds: float,
    teacher: nn.Module | None,
) -> list[float]:
    """Trains adapters and merges them; without them the model is as it was if anything is raised."""
    from alphaprune import masked_lora

    alpha = 2 * settings.rank if settings.alpha is None else settings.alpha
    layers = masked_lora.attach(model, masks, settings.rank, alpha, settings.seed, stored)
    training = model.training
    model.eval()  # no dropout: what is trained is the function that is stored
    try:
        run = _Run(model, settings, teacher)
        if state is not None and state.exists():
            run.load(state)
        if progress:
            for _ in run.losses:
                progress("resumed")
        saved = monotonic()
        while len(run.losses) < settings.steps:
            loss = run.step(tokens[settings.picks(len(run.losses), len(tokens))])
            if progress:
                progress(f"loss {loss:.3f}")
            if state is not None and (monotonic() - saved >= save_seconds or len(run.losses) == settings.steps):
                run.save(state)
                saved = monotonic()
        for layer in layers.values():
            layer.merge()
    finally:
        model.train(training)
        masked_lora.detach(model, layers)
    return run.losses


class _Run:
    """Adapters, what AdamW knows of them, and the losses so far."""

    def __init__(self, model: nn.Module, settings: Settings, teacher: nn.Module | None) -> None:
        self.model, self.settings, self.teacher = model, settings, teacher
        self.losses: list[float] = []
        self.adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.adapters.values(), lr=1.0, betas=BETAS, weight_decay=0.0)

    def step(self, windows: Tensor) -> float:
        """One step on windows [batch, length]; the mean loss before it, nats per predicted token."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate(len(self.losses))
        self.optimizer.zero_grad(set_to_none=True)
        windows, total = windows.to(next(iter(self.adapters.values())).device), 0.0
        for part in windows.split(self.settings.at_once or len(windows)):
            loss = self._loss(part)
            (loss * (len(part) / len(windows))).backward()
            total += float(loss.detach()) * len(part) / len(windows)
        if not math.isfinite(total):
            raise ValueError(
                f"the loss of step {len(self.losses) + 1} is {total}; try a smaller learning rate, or dtype float32"
            )
        nn.utils.clip_grad_norm_(self.adapters.values(), CLIP)
        self.optimizer.step()
        self.losses.append(total)
        return total

    def _loss(self, windows: Tensor) -> Tensor:
        """Mean over the predicted tokens of windows [windows, length]."""
        logits = self._logits(self.model, windows)  # [tokens, vocabulary]
        if self.teacher is None:
            return nn.functional.cross_entropy(logits, windows[:, 1:].flatten())
        with torch.no_grad():
            wanted = self._logits(self.teacher, windows).log_softmax(-1)
        return nn.functional.kl_div(logits.log_softmax(-1), wanted, log_target=True, reduction="batchmean")

    @staticmethod
    def _logits(model: nn.Module, windows: Tensor) -> Tensor:
        return model(input_ids=windows, use_cache=False).logits[:, :-1].flatten(0, 1).float()

    def save(self, file: Path) -> None:
        """The state appears in the file whole or not at all, and survives a power loss."""
        known = self.optimizer.state_dict()["state"]
        tensors = {"losses": torch.tensor(self.losses, dtype=torch.float64)}
        for place, (name, parameter) in enumerate(self.adapters.items()):
            tensors[f"value {name}"] = parameter
            tensors |= {f"{entry} {name}": tensor for entry, tensor in known[place].items()}
        with explained(file):
            shards.write(file, tensors.items())

    def load(self, file: Path) -> None:
        known = {}
        with shards.open_file(file) as stored, torch.no_grad():
            self.losses = stored.get_tensor("losses").tolist()
            for place, (name, parameter) in enumerate(self.adapters.items()):
                parameter.copy_(stored.get_tensor(f"value {name}"))
                entries = ("step", "exp_avg", "exp_avg_sq")
                known[place] = {entry: stored.get_tensor(f"{entry} {name}").clone() for entry in entries}
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": known})


@dataclass(frozen=True)
class Recovered:
    """What was written, and how good the model was before and after; training: the loss of every step, nats."""

    written: checkpoint.Written
    before: evaluate.Evaluation
    after: evaluate.Evaluation
    training: list[float]


def write(
    folder: "str | Path",
    out: "str | Path",
    tokens: Tensor,
    held_out: tuple[Text, int, int | None],
    identity: dict[str, Any],
    settings: Settings,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    storage: checkpoint.Storage = checkpoint.PACKED,
    save_seconds: float = 60.0,
    progress: Progress | None = None,
    teacher: nn.Module | None = None,
) -> Recovered:
    """Recovers the pruned model of a folder (packed, or dense with zeros) into the folder OUT, whole or not at all.

    tokens, settings, dtype, teacher: as `recover` has them.   held_out: text, length and number of windows to judge by.
    identity: what else makes this run this run; an interrupted one goes on where it was, another is refused.
    storage: its values are also the consent to train int8 values as floats.
    """
    settings.check()
    check_peft()
    devices.named(device)
    unfinished.check_free(Path(out))
    storage.check()
    check_tokens(tokens, settings.batch)
    model, masks, fingerprint = _open(folder, device, storage.values)
    check_masks(model, masks, settings.rank)
    source = models.open_source(model)
    for block in source.blocks():
        models.check_finite(block, "no loss means anything")
    source.name = str(folder)
    identity = {**identity, "model": fingerprint, **asdict(settings), "dtype": shards.dtype_name(dtype or model.dtype)}
    identity |= {"teacher": None if teacher is None else models.describe(teacher).fingerprint}
    identity |= storage.identity()
    before = _judge(model, held_out, dtype)
    recipe = {"alphaprune": __version__, "recovered_from": source.name, **identity}
    found: dict[str, Any] = {}

    def run(restore: Any, finish: Any) -> Iterator[PrunedBlock]:
        state = unfinished.place(out) / STATE
        given = (tokens, dtype, progress, state, save_seconds, teacher)
        found["losses"] = recover(model, masks, *given, **asdict(settings))
        for block in source.blocks():
            kept = {name: masks[name] for name in block.linears}
            restored = restore(block) is not None
            if not restored:
                finish(block, kept)
            yield PrunedBlock(block, kept, restored)
        found["after"] = _judge(model, held_out, dtype)  # of the weights as they were written, int8 included
        recipe["loss"] = {"before": math.log(before.perplexity), "after": math.log(found["after"].perplexity)}

    with unfinished.nothing_left(out):
        written = checkpoint.write_pruned(source, out, identity, recipe, run, storage, again=True)
    if "after" not in found:  # the run before this one was cut off when everything was there
        found = {"after": _judge(hf.load(out, device=device, tokens=None), held_out, dtype), "losses": []}
    return Recovered(written, before, found["after"], found["losses"])


def _open(folder: "str | Path", device: str, values: str | None) -> tuple["PreTrainedModel", dict[str, Tensor], str]:
    """The dense model of a folder, the masks of its prunable layers, and its fingerprint."""
    models.open_source(folder)  # refuses what transformers would read as something else, such as single layers in fp8
    model = hf.load(folder, tokens=None)
    packed, names = packed_of(model), names_of(model)
    rounded = [name for name, layer in packed.items() if layer.weight_scale is not None]
    if rounded and values is None:
        raise ValueError(
            f"{folder}: {rounded[0]} has int8 values, which do not train; recover the model before it is rounded, or "
            f"give --values int8 to train them as {shards.dtype_name(model.dtype)} and round the result again"
        )
    masks, dtype = masks_of(model), model.dtype
    # These alone: model.dequantize() would multiply factors, too, and expand the output layer.
    for layer in packed.values():
        put(model, names[layer], layer.to_linear(dtype))
    fingerprint = models.describe(model).fingerprint
    memory.moved(model, device, str(folder))
    return model, {name: mask.to(device) for name, mask in masks.items()}, fingerprint


def _judge(model: nn.Module, held_out: tuple[Text, int, int | None], dtype: torch.dtype | None) -> evaluate.Evaluation:
    with computing_in(model, dtype):
        return evaluate.evaluate(model, *held_out)
