"""Dense directories that hold zeros: packed while transformers loads them."""

import json
import logging
from pathlib import Path

import pytest
import torch
from conftest import make_model
from packed import DENSE, TOKENS, linears, logits, sparse_layers, write_zeros, zeros_model
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM

import alphaprune
from alphaprune import AlphaPruneConfig, hf
from alphaprune.formats import sbt


@pytest.fixture(scope="module")
def zeros(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense directory whose linear layers are pruned, one excepted. Do not change it."""
    return write_zeros(tmp_path_factory.mktemp("zeros") / "dense")


def pack(folder: Path, dtype="auto", device_map=None, **settings):
    config = AlphaPruneConfig(**settings)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map=device_map, quantization_config=config)


@pytest.mark.parametrize("device_map", [None, "cpu", "auto"])
def test_packs_what_gets_smaller_in_the_blocks(zeros: Path, device_map) -> None:
    model, dense = pack(zeros, device_map=device_map), alphaprune.load(zeros)
    sparse, wanted = sparse_layers(model), linears(dense)
    assert sparse.keys() == wanted.keys() - {DENSE} and torch.equal(
        model.get_submodule(DENSE).weight, wanted[DENSE].weight
    )
    for name, layer in sparse.items():
        assert layer.name == name and torch.equal(sbt.unpack(layer.packed)[0], wanted[name].weight)
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-4)
    assert torch.equal(model.generate(TOKENS[:, :5], max_new_tokens=5), dense.generate(TOKENS[:, :5], max_new_tokens=5))


def test_in_another_dtype(zeros: Path) -> None:
    model = pack(zeros, dtype=torch.bfloat16)
    dense = AutoModelForCausalLM.from_pretrained(zeros, dtype=torch.bfloat16)
    for name, layer in sparse_layers(model).items():
        assert torch.equal(sbt.unpack(layer.packed)[0], dense.get_submodule(name).weight)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("group", [None, 128])
def test_int8_is_what_sparsify_makes(zeros: Path, group: int | None) -> None:
    model = pack(zeros, values="int8", group=group)
    wanted = sparse_layers(alphaprune.sparsify(alphaprune.load(zeros), values="int8", group=group))
    assert sparse_layers(model).keys() == wanted.keys()  # without zeros, too
    for name, layer in sparse_layers(model).items():
        for suffix, tensor in layer.packed.tensors.items():
            assert torch.equal(tensor, wanted[name].packed.tensors[suffix]), (name, suffix)
        assert layer.quantization_error == wanted[name].quantization_error


def test_layers_to_leave(zeros: Path) -> None:
    model = pack(zeros, modules_to_not_convert=["model.layers.0", r"model\.layers\.[12]\.mlp\.up_proj", "v_proj"])
    left = set(linears(model)) - {DENSE}
    assert {name for name in left if name.startswith("model.layers.0.")} == set(linears(alphaprune.load(zeros))) & {
        name for name in linears(alphaprune.load(zeros)) if name.startswith("model.layers.0.")
    }
    rest = {name for name in left if not name.startswith("model.layers.0.")}
    assert rest == {f"model.layers.{i}.{n}" for i in (1, 2) for n in ("mlp.up_proj", "self_attn.v_proj")}


@pytest.mark.parametrize("values", [None, "int8"])
def test_saved_it_is_a_packed_directory(zeros: Path, tmp_path: Path, values: str | None) -> None:
    model = pack(zeros, values=values, modules_to_not_convert=["down_proj"])
    model.save_pretrained(tmp_path / "theirs", max_shard_size="60KB")
    alphaprune.save(model, tmp_path / "ours")
    for folder in ("theirs", "ours"):
        again = alphaprune.load(tmp_path / folder)
        assert sparse_layers(again).keys() == sparse_layers(model).keys()
        assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
        assert torch.equal(logits(again), logits(model))
        settings = json.loads((tmp_path / folder / "config.json").read_text())["quantization_config"]
        assert settings.items() >= {"quant_method": "alphaprune", "format": "sbt", "format_version": 1}.items()
        assert settings.get("values") == values


def test_biases_and_models_without_a_head(tmp_path: Path) -> None:
    changes = {"attention_bias": True, "mlp_bias": True}
    live = zeros_model(**changes)
    for name, parameter in live.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    live.save_pretrained(tmp_path / "dense")
    model = pack(tmp_path / "dense")
    assert len(sparse_layers(model)) == len(linears(live)) - 1
    torch.testing.assert_close(logits(model), logits(live), rtol=1e-4, atol=1e-4)
    body = AutoModel.from_pretrained(tmp_path / "dense", quantization_config=AlphaPruneConfig())
    assert len(sparse_layers(body)) == len(sparse_layers(model))
    assert torch.equal(body(TOKENS).last_hidden_state, model.model(TOKENS).last_hidden_state)


def test_a_model_without_zeros_stays_as_it_is(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "alphaprune"):
        model = pack(directory)
    assert not sparse_layers(model) and "no layer has enough zeros to be smaller packed" in caplog.text
    assert torch.equal(logits(model), logits(make_model(1)))


def test_refusals(zeros: Path, tmp_path: Path) -> None:
    live = zeros_model()
    live.get_submodule("model.layers.1.mlp.up_proj").weight.data[3, 5] = float("nan")
    live.save_pretrained(tmp_path / "nan")
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.mlp\.up_proj: NaN and infinity have no place"):
        pack(tmp_path / "nan", values="int8")
    places = {"": "cpu", "model.layers.1": "disk"}
    with pytest.raises(ValueError, match="cannot be packed while it is offloaded to disk: pack it without"):
        pack(zeros, device_map=places)
    with pytest.raises(ValueError, match=r"no setting is called vaules; there are: format, .*values, group"):
        AlphaPruneConfig(vaules="int8")
    with pytest.raises(ValueError, match="group 64"):
        AlphaPruneConfig(values="int8", group=64)
    config = LlamaForCausalLM.config_class.from_pretrained(zeros)
    config.intermediate_size = 256
    with pytest.raises(ValueError, match=r"mlp.gate_proj.weight: has shape \[200, 96\].*describes \[256, 96\]"):
        LlamaForCausalLM.from_pretrained(zeros, config=config, quantization_config=AlphaPruneConfig())


def test_families_that_are_not_known(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=64, vocab_size=16)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="model type 'gpt2' is not known here; known: llama"):
        pack(tmp_path / "gpt2")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_dense_weight_is_in_memory_at_a_time(zeros: Path, monkeypatch: pytest.MonkeyPatch, dtype) -> None:
    seen, pack_weight = [], hf.pack_weight

    def watched(weight: torch.Tensor, *arguments):
        assert all(storage.expired() for storage in seen), f"weight {len(seen)} came while others were alive"
        seen.append(StorageWeakRef(weight.untyped_storage()))
        return pack_weight(weight, *arguments)

    monkeypatch.setattr(hf, "pack_weight", watched)
    model = pack(zeros, dtype=dtype)
    assert len(seen) == len(sparse_layers(model)) == len(linears(zeros_model())) - 1
    assert all(storage.expired() for storage in seen)
