"""How fast whole models decode: random weights in published shapes, every block in distinct memory."""

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from alphaprune import formats, generate, pages, stepping, timing
from alphaprune import model as models
from alphaprune.decoder import Decoder
from alphaprune.head import round_head
from alphaprune.layer import SparseLinear
from alphaprune.memory import free as free_memory
from alphaprune.pattern import Pattern
from alphaprune.timing import UNSTRUCTURED

Bar = Callable[[int, str, str], AbstractContextManager[Callable[[str], None]]]
DEVIATION = 0.02  # of random weights: activations stay small
# From the config.json files of the models.
_LLAMA2 = {
    **{"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32},
    **{"num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
}
_LLAMA3 = {
    **{"vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 8192},
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
_LLAMA3_1B = {
    **{"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64},
    "tie_word_embeddings": True,
}
_MISTRAL = {
    **{"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 32768},
    "sliding_window": 4096,
}
_TINYLLAMA = {
    **{"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_key_value_heads": 4},
    "max_position_embeddings": 2048,
}
_SMALL = {
    **{"vocab_size": 4096, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8},
    **{"num_attention_heads": 16, "num_key_value_heads": 16, "max_position_embeddings": 2048},
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2-7b": ("llama", _LLAMA2),
    "llama3-8b": ("llama", {**_LLAMA2, **_LLAMA3}),
    "llama3.2-1b": ("llama", {**_LLAMA2, **_LLAMA3, **_LLAMA3_1B}),
    "mistral-7b": ("mistral", {**_LLAMA2, **_MISTRAL}),
    "tinyllama-1.1b": ("llama", {**_LLAMA2, **_TINYLLAMA}),
    "small": ("llama", _SMALL),  # for trying things out: 100 M weights
    "tiny": ("llama", {**_SMALL, "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}),
}


def config_of(name: str) -> Any:
    """The transformers config of a model by its name; ValueError if there is none of that name."""
    from transformers import AutoConfig

    if name not in MODELS:
        raise ValueError(f"no shapes of a model {name!r}; there are: {', '.join(MODELS)}")
    family, settings = MODELS[name]
    return AutoConfig.for_model(family, **settings)


def shapes(name: str) -> list[tuple[int, int]]:
    """Shapes [N, K] of the linear layers of one block, each once."""
    return list(dict.fromkeys(_layers(config_of(name))))


def _layers(config: Any) -> list[tuple[int, int]]:
    """Shapes [N, K] of all linear layers of one block: q, k, v, o, gate, up, down."""
    hidden, inside = config.hidden_size, config.intermediate_size
    keys = hidden // config.num_attention_heads * config.num_key_value_heads
    attention = [(hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden)]
    return [*attention, (inside, hidden), (inside, hidden), (hidden, inside)]


def random_model(
    name: str,
    sparsity: float | None = None,
    dtype: torch.dtype = torch.bfloat16,
    values: torch.dtype | None = None,
    pattern: Pattern = UNSTRUCTURED,
    device: str = "cpu",
    activations: torch.dtype | None = None,
    rounded_head: bool = False,
) -> nn.Module:
    """A model in the shapes of `name`: blocks dense in `dtype`, or with a `sparsity` packed with `values`.

    Layers of one shape are copies of one another in distinct memory, so that a step reads all of them.
    pattern: of the packed weights; activations: as `Packed` has it. rounded_head: gives the output layer int8 values.
    ValueError naming the bytes if they do not fit into the memory of the device.
    """
    config = config_of(name)
    needed, free = nbytes(config, sparsity, dtype, values), memory(device)
    if free is not None and needed > free:
        raise ValueError(
            f"{name} needs {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free on {device}; close programs, "
            f"or take a smaller model or a higher sparsity"
        )
    model = models.make_skeleton(config)
    made: dict[tuple[int, ...], tuple[Tensor, formats.Packed | None]] = {}
    for full, layer in models.prunable(model, models.family_of(config, name)).items():
        shape = tuple(layer.weight.shape)
        if shape not in made:
            made[shape] = _weight(shape, sparsity, dtype, values, pattern, torch.device(device))
        weight, packed = made[shape]
        if packed is None:
            layer.weight = nn.Parameter(weight.to(device, copy=True), requires_grad=False)
        else:
            sparse = SparseLinear(packed.map(lambda tensor: tensor.to(device, copy=True)))
            sparse.name, sparse.activations = full, activations
            model.set_submodule(full, sparse)
    generator = torch.Generator(device).manual_seed(1)
    for module in model.modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:  # norms, embeddings, head
                shape = parameter.shape
                value = torch.ones(shape, dtype=dtype, device=device)
                if len(shape) > 1:
                    value.normal_(0, DEVIATION, generator=generator)
                setattr(module, key, nn.Parameter(value, requires_grad=False))
    if rounded_head:
        round_head(model)
    return pages.huge_pages(model.to(device))


def _weight(
    shape: tuple[int, int],
    sparsity: float | None,
    dtype: torch.dtype,
    values: torch.dtype | None,
    pattern: Pattern,
    device: torch.device,
) -> tuple[Tensor, formats.Packed | None]:
    """A random weight, and packed where a sparsity is given; made on the device, which takes seconds less."""
    if sparsity is None:
        generator = torch.Generator(device).manual_seed(0)
        return torch.empty(shape, dtype=dtype, device=device).normal_(0, DEVIATION, generator=generator), None
    _, packed = timing.random_packed(shape, sparsity, dtype, values or dtype, pattern, device)
    (packed.weight if packed.scale is None else packed.scale).mul_(DEVIATION)
    return packed.weight, packed


def nbytes(config: Any, sparsity: float | None, dtype: torch.dtype, values: torch.dtype | None) -> int:
    """Bytes that a random model takes, about: its weights, and as much as making one of them takes on top."""
    block = _layers(config)
    outside = 2 * config.vocab_size * config.hidden_size  # embeddings and head
    most = 12 * max(n * k for n, k in block)  # float32, scores, mask and more of the largest
    if sparsity is None:
        size = sum(n * k for n, k in block) * dtype.itemsize
    else:
        kept = [(shape, round(shape[0] * shape[1] * (1 - sparsity))) for shape in block]
        size = sum(formats.get("sbt").nbytes(shape, count, values or dtype) for shape, count in kept)
    return outside * dtype.itemsize + config.num_hidden_layers * size + most


def memory(device: str = "cpu") -> int | None:
    """Bytes of memory that can be taken without swapping; None where the system does not say."""
    return free_memory(device)


def time_generation(model: nn.Module, ours: bool, prompt: int = 16, new: int = 32) -> dict[str, float]:
    """tokens_per_second over `new` greedy steps after a warm-up of three, and step_seconds, their median."""
    generate.step_seconds(model, prompt, 3, ours)
    steps = generate.step_seconds(model, prompt, new, ours)
    return {"tokens_per_second": len(steps) / sum(steps), "step_seconds": statistics.median(steps)}


def time_models(
    name: str,
    sparsities: Sequence[float],
    dtype: torch.dtype,
    values: torch.dtype | None,
    bar: Bar,
    activations: torch.dtype | None = None,
) -> list[dict[str, Any]]:
    """Rows of decoding with the weights of `name`: packed at each sparsity, then dense, one model in memory at a time.

    weights, values, activations, sparsity, decoder, and what `time_generation` and `time_kernels` give; or `skipped`,
    the reason. activations: as `Packed` has it, None in the rows of dense models.
    """
    rows = []
    with bar(len(sparsities) + 1, "decode", "model") as tick:
        for sparsity in (*sparsities, None):
            stored = values if values and sparsity is not None else dtype
            row = {"sparsity": sparsity, "values": str(stored).removeprefix("torch.")}
            allowed = None if sparsity is None else activations
            row["activations"] = allowed and str(allowed).removeprefix("torch.")
            try:
                model = random_model(name, sparsity, dtype, values, activations=allowed)
            except ValueError as error:
                rows.append(row | {"decoder": "", "skipped": str(error)})
                continue
            if sparsity is None:
                rows.append(row | {"decoder": "transformers"} | time_generation(model, ours=False))
            found = time_generation(model, ours=True) | time_kernels(model)
            rows.append(row | {"decoder": generate.OURS} | found)
            del model  # before the next one is made
            tick("dense" if sparsity is None else f"{sparsity:.0%}")
    return rows


@torch.inference_mode()
def time_kernels(model: nn.Module, prompt: int = 16, rounds: int = 16) -> dict[str, float]:
    """The whole step of our decoder beside its products with weights alone, by turns; medians of `rounds`.

    kernel_seconds: every product called with a random x, one after the other. step_over_kernels: median of the ratios
    within a turn.
    """
    decoder = Decoder(model)
    if decoder.device.type == "cuda":  # in graphs, as it generates
        found = stepping.time_steps(model, 1, prompt, rounds)
        return {name: found[name] for name in ("kernel_seconds", "step_over_kernels")}
    state = decoder.state(1, prompt + rounds + 1)
    tokens = torch.randint(0, model.config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(0))
    new = decoder.prefill(state, tokens.to(decoder.device)).argmax(-1)
    products = [
        (call, torch.randn(1, k, generator=torch.Generator().manual_seed(k)).to(decoder.device, decoder.dtype))
        for call, k in decoder.products()
    ]

    def multiply() -> None:
        for call, x in products:
            call(x)

    pairs = []
    for turn in range(rounds + 1):
        parts: list[Callable[[], Any]] = [lambda: decoder.step(state, new), multiply]
        taken = [_seconds(part) for part in (parts if turn % 2 else parts[::-1])]
        pairs.append(taken if turn % 2 else taken[::-1])
    pairs = pairs[1:]  # the first turn binds kernels
    return {
        "kernel_seconds": statistics.median(kernels for _, kernels in pairs),
        "step_over_kernels": statistics.median(step / kernels for step, kernels in pairs),
    }


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
