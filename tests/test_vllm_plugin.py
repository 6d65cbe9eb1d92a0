"""The adapter to vLLM, with the few hooks of vLLM that it uses in its place; tests/vllm_check.py runs vLLM itself."""

import importlib
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from problems import exact_weight
from tolerance import assert_product
from torch import nn

from alphaprune.formats import quantize, sbt

ROOT = Path(__file__).parent.parent
PLUGIN = "alphaprune.vllm_plugin"
K = 256


class Ranks:
    size, rank = 1, 0


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """The module, on stand-ins of vLLM's; its op and names are gone afterwards."""
    registered: dict[str, type] = {}

    def register(name: str):
        return lambda config: registered.setdefault(name, config)

    names = {
        "vllm.distributed": {
            "get_tensor_model_parallel_rank": lambda: Ranks.rank,
            "get_tensor_model_parallel_world_size": lambda: Ranks.size,
        },
        "vllm.model_executor.layers.linear": {
            "LinearBase": type("LinearBase", (nn.Module,), {}),
            "LinearMethodBase": type("LinearMethodBase", (), {}),
        },
        "vllm.model_executor.layers.vocab_parallel_embedding": {
            "ParallelLMHead": type("ParallelLMHead", (nn.Module,), {}),
        },
        "vllm.model_executor.layers.quantization": {"register_quantization_config": register},
        "vllm.model_executor.layers.quantization.base_config": {
            "QuantizationConfig": type("QuantizationConfig", (), {})
        },
    }
    for name in ("vllm", "vllm.model_executor", "vllm.model_executor.layers", *names):
        module = types.ModuleType(name)
        vars(module).update(names.get(name, {}))
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, PLUGIN, raising=False)
    module = importlib.import_module(PLUGIN)
    module.registered = registered
    yield module
    module._library._destroy()
    sys.modules.pop(PLUGIN, None)


def config(plugin: types.ModuleType, **changes):
    return plugin.AlphaPruneVllmConfig.from_config({"quant_method": "alphaprune", "format": "sbt", **changes})


def weights(rows: list[int], seed: int) -> list[torch.Tensor]:
    """Dense weights [N_i, K] with zeros."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, K, generator=generator) * (torch.rand(n, K, generator=generator) < 0.4) for n in rows]


def built(
    plugin: types.ModuleType,
    parts: dict,
    ranks: int,
    rank: int,
    by_columns: bool = False,
    copies: int = 1,
    forget: str | None = None,
):
    """(layer, method) of one rank, loaded from parts: name → (whole weight, its tensors in the file).

    forget: an attribute that this vLLM's layers do not have.
    """
    layer = sys.modules["vllm.model_executor.layers.linear"].LinearBase()
    layer.tp_size, layer.tp_rank, layer.num_kv_head_replicas = ranks, rank, copies
    method = config(plugin).get_quant_method(layer, "model.layers.0.x")
    whole = {part: found[0].shape[0] for part, found in parts.items()}
    share = {part: ranks // copies if part in ("k", "v") else ranks for part in parts}
    own = [n if by_columns else n // share[part] for part, n in whole.items()]
    columns = K // ranks if by_columns else K
    total = sum(own) if by_columns else sum(own) * ranks
    method.create_weights(layer, columns, own, K, total, torch.float32, weight_loader=None)
    for part, (_, tensors) in parts.items():
        for suffix, tensor in tensors.items():
            parameter = layer.get_parameter(suffix)
            if part is None:
                parameter.weight_loader(parameter, tensor)
            else:
                parameter.weight_loader(parameter, tensor, part)
    if forget:
        delattr(layer, forget)
    method.process_weights_after_loading(layer)
    return layer, method


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("vocabulary", [256, 250, 197])
def test_the_output_layer_is_shared_by_tokens(plugin: types.ModuleType, vocabulary: int, ranks: int) -> None:
    """Of 197 tokens in 256 places the last of four ranks has five."""
    (weight,) = weights([vocabulary], 3)
    whole, tensors = rounded(weight)
    x, bias = torch.randn(3, K), torch.randn(vocabulary)
    places = -(-vocabulary // 64) * 64
    found, added = [], []
    for rank in range(ranks):
        layer = sys.modules["vllm.model_executor.layers.vocab_parallel_embedding"].ParallelLMHead()
        layer.org_vocab_size, layer.num_added_embeddings = vocabulary, 0
        share = [min(vocabulary, place) for place in (places // ranks * rank, places // ranks * (rank + 1))]
        layer.shard_indices = types.SimpleNamespace(org_vocab_start_index=share[0], org_vocab_end_index=share[1])
        assert config(plugin).get_quant_method(layer, "lm_head") is None
        method = config(plugin, head="int8").get_quant_method(layer, "lm_head")
        method.create_weights(layer, K, [places // ranks], K, places, torch.float32, weight_loader=None)
        assert layer.weight.dtype == torch.int8
        for suffix, tensor in tensors.items():
            layer.get_parameter(suffix).weight_loader(layer.get_parameter(suffix), tensor)
        method.process_weights_after_loading(layer)
        found.append(method.apply(layer, x))
        own = torch.nn.functional.pad(bias, (0, places - vocabulary)).chunk(ranks)[rank]
        added.append(method.apply(layer, x, own))
        assert found[-1].shape == (3, places // ranks)
    for scores, b in ((found, None), (added, bias)):
        together = torch.cat(scores, -1)
        assert_product(together[:, :vocabulary].contiguous(), x, whole, b)
        assert not together[:, vocabulary:].any()
    layer.num_added_embeddings = 1
    method.parts, method.found = None, {None: tensors}
    with pytest.raises(ValueError, match="lm_head: has int8 values, and no place for tokens that an adapter adds"):
        method.process_weights_after_loading(layer)


def packed(weight: torch.Tensor) -> tuple[torch.Tensor, dict]:
    return weight, sbt.pack(weight).tensors


def rounded(weight: torch.Tensor) -> tuple[torch.Tensor, dict]:
    integers, scale, _ = quantize.quantize(weight, weight != 0)
    return exact_weight(integers, scale), sbt.pack(integers, weight != 0, scale).tensors


def dense(weight: torch.Tensor) -> tuple[torch.Tensor, dict]:
    return weight, {"weight": weight}


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("store", [packed, rounded, dense], ids=lambda f: f.__name__)
def test_fused_parts_are_shared_by_rows(plugin: types.ModuleType, ranks: int, store) -> None:
    """q, k, v of 4, 2 and 2 heads of 32, k dense; of four ranks, two have the same key head."""
    q, k, v = weights([128, 64, 64], ranks)
    parts = {"v": store(v), "q": store(q), "k": dense(k)}  # in the order of a file
    copies = max(1, ranks // 2)
    x = torch.randn(3, K)
    for rank in range(ranks):
        order = dict(sorted(parts.items(), key=lambda item: "qkv".index(item[0])))
        layer, method = built(plugin, order, ranks, rank, copies=copies)
        own = []
        for part, (weight, _) in order.items():
            count, number = (ranks, rank) if part == "q" else (ranks // copies, rank // copies)
            own.append(weight.chunk(count)[number])
        y = method.apply(layer, x)
        sizes = [len(weight) for weight in own]
        for found, weight in zip(y.split(sizes, -1), own, strict=True):
            assert_product(found, x, weight)
        full = torch.randn(sum(sizes))
        for found, weight, b in zip(method.apply(layer, x, full).split(sizes, -1), own, full.split(sizes), strict=True):
            assert_product(found, x, weight, b)


@pytest.mark.parametrize("store", [packed, rounded, dense], ids=lambda f: f.__name__)
def test_columns_are_shared(plugin: types.ModuleType, store) -> None:
    whole, tensors = store(weights([48], 5)[0])
    x = torch.randn(2, K)
    for rank in range(2):
        layer, method = built(plugin, {None: (whole, tensors)}, 2, rank, by_columns=True)
        own = x.chunk(2, -1)[rank].contiguous()
        assert_product(method.apply(layer, own), own, whole.chunk(2, -1)[rank])


def test_gate_and_up_compile_as_one_op(plugin: types.ModuleType) -> None:
    gate, up = weights([32, 32], 7)
    layer, method = built(plugin, {0: packed(gate), 1: packed(up)}, 2, 1)
    x = torch.randn(5, K)
    compiled = torch.compile(lambda x: method.apply(layer, x), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), method.apply(layer, x))
    torch.library.opcheck(torch.ops.alphaprune.vllm_linear.default, (x, method.parts.name, 32, None))


def test_two_models_of_one_process_do_not_meet(plugin: types.ModuleType) -> None:
    first, second = weights([16, 16], 9)
    one, other = (built(plugin, {None: packed(weight)}, 1, 0) for weight in (first, second))
    x = torch.randn(1, K)
    assert one[1].parts.name != other[1].parts.name
    for (layer, method), weight in ((one, first), (other, second)):
        assert_product(method.apply(layer, x), x, weight)


def test_what_is_known_and_what_is_refused(plugin: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin.register()
    plugin.register()
    assert plugin.registered == {"alphaprune": plugin.AlphaPruneVllmConfig}
    made = config(plugin)
    assert made.get_quant_method(nn.Embedding(2, 2), "embed") is None
    with pytest.raises(ValueError, match=r"format_version 99, alphaprune .* reads"):
        config(plugin, format_version=99)
    with pytest.raises(ValueError, match="blocks have sizes of their own, which vLLM does not know"):
        config(plugin, channels=[3, 4])
    with pytest.raises(ValueError, match=r"model.layers.0.mlp: packed experts of mixtures do not run in vLLM"):
        made.get_quant_method(type("FusedMoE", (nn.Module,), {})(), "model.layers.0.mlp")
    text = types.SimpleNamespace(num_attention_heads=8, num_key_value_heads=2, intermediate_size=1376)
    made.maybe_update_config("name", hf_config=text, revision=None)
    for ranks, sentence in (
        (3, "8 attention heads cannot be shared by 3 ranks; use 2, 4 or 8 ranks"),
        (64, "8 attention heads cannot be shared by 64 ranks"),
    ):
        monkeypatch.setattr(Ranks, "size", ranks)
        with pytest.raises(ValueError, match=sentence):
            made.get_quant_method(nn.Embedding(2, 2), "embed")
    monkeypatch.setattr(Ranks, "size", 4)  # two ranks for each key-value head
    made.get_quant_method(nn.Embedding(2, 2), "embed")
    text.intermediate_size = 1378
    made.maybe_update_config("name", hf_config=text)
    with pytest.raises(ValueError, match="1378 channels of the MLP cannot be shared by 4 ranks; use 2, 13, 26"):
        made.get_quant_method(nn.Embedding(2, 2), "embed")


def test_damaged_directories_are_refused_by_layer(plugin: types.ModuleType) -> None:
    weight, tensors = packed(weights([32], 3)[0])
    for changes, sentence in (
        ({"weight_offsets": None}, "model.layers.0.x: packed tensor weight_offsets is missing"),
        ({"weight_mask": tensors["weight_mask"][:1]}, r"model.layers.0.x: the file has another shape .* \(32, 256\)"),
    ):
        broken = {suffix: t for suffix, t in (tensors | changes).items() if t is not None}
        with pytest.raises(ValueError, match=sentence):
            built(plugin, {None: (weight, broken)}, 1, 0)


def test_layers_without_weights_are_refused(plugin: types.ModuleType) -> None:
    with pytest.raises(ValueError, match=r"model.layers.0.x: vLLM gave it no weights"):
        built(plugin, {None: (torch.zeros(32, K), {})}, 1, 0)


def test_an_eager_call_does_not_go_through_the_dispatcher(plugin: types.ModuleType, monkeypatch) -> None:
    layer, method = built(plugin, {None: packed(weights([32], 3)[0])}, 1, 0)
    x = torch.randn(2, K)
    wanted = torch.ops.alphaprune.vllm_linear(x, method.parts.name, 32, None)
    with monkeypatch.context() as patch:
        patch.setattr(torch.ops, "alphaprune", None)
        found = method.apply(layer, x)
    assert torch.equal(found, wanted)


def test_dense_parts_are_one_product(plugin: types.ModuleType) -> None:
    _, method = built(plugin, {0: dense(torch.ones(16, K)), 1: dense(torch.ones(16, K))}, 1, 0)
    assert [weight.shape for weight in method.parts.weights] == [(32, K)] and method.parts.rows == 32


@pytest.mark.parametrize("store", [packed, rounded], ids=lambda f: f.__name__)
def test_packed_parts_are_stacked_where_they_fit(plugin: types.ModuleType, store) -> None:
    x, bias = torch.randn(3, K), torch.randn(49)
    for rows, count in (([32, 17], 1), ([17, 32], 2)):  # rows of tiles, and a part that would end inside one
        found = [store(weight) for weight in weights(rows, 11)]
        layer, method = built(plugin, dict(enumerate(found)), 1, 0)
        assert [len(method.parts.weights), method.parts.rows] == [count, 49]
        for given in (None, bias):
            assert_product(method.apply(layer, x, given), x, torch.cat([whole for whole, _ in found]), given)


def test_a_vllm_whose_layers_have_other_attributes_is_named(plugin: types.ModuleType) -> None:
    with pytest.raises(ImportError, match=r"works with vLLM 0\.\d+; a hook .*no attribute 'tp_size'"):
        built(plugin, {None: packed(weights([32], 3)[0])}, 2, 0, forget="tp_size")


def test_a_vllm_whose_hooks_moved_is_named(plugin: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(sys.modules["vllm.model_executor.layers.linear"], "LinearMethodBase")
    monkeypatch.delitem(sys.modules, PLUGIN)
    with pytest.raises(ImportError, match=r"works with vLLM 0\.\d+; a hook .*LinearMethodBase.*: install one of"):
        importlib.import_module(PLUGIN)


def test_vllm_finds_the_plugin() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert f'[project.entry-points."vllm.general_plugins"]\nalphaprune = "{PLUGIN}:register"\n' in text
