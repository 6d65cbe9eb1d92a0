"""Packed directories in transformers: loaded, placed, cast, saved, generated with, compiled."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from packed import DENSE, TOKENS, linears, logits, sparse_layers, write_packed
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

import alphaprune
from alphaprune import shards

PROMPT = TOKENS[:, :6]
LAYER = "model.layers.1.mlp.gate_proj"


@pytest.fixture(scope="module", params=["float", "int8"])
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed directory, with float32 values and with int8. Do not change it."""
    values = None if request.param == "float" else request.param
    return write_packed(tmp_path_factory.mktemp("packed") / request.param, values)


def load(folder: Path, **settings) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, **settings)


def dense_twin(folder: Path) -> nn.Module:
    return load(folder).dequantize()


def assert_equal_state(a: nn.Module, b: nn.Module) -> None:
    assert a.state_dict().keys() == b.state_dict().keys()
    for name, tensor in a.state_dict().items():
        other = b.state_dict()[name]
        assert tensor.dtype == other.dtype and torch.equal(tensor, other), name


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", ["50GB", "60KB"])
def test_save_pretrained_and_load_again(packed: Path, tmp_path: Path, size: str) -> None:
    model = load(packed)
    model.save_pretrained(tmp_path / "again", max_shard_size=size)
    assert (tmp_path / "again" / shards.INDEX).exists() == (size == "60KB")
    again = load(tmp_path / "again")
    dense = set() if "int8" in packed.name else {DENSE}
    assert sparse_layers(again).keys() == linears(dense_twin(packed)).keys() - dense
    assert_equal_state(again, model)
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(logits(alphaprune.load(tmp_path / "again")), logits(model))


def test_models_without_a_head_and_back(packed: Path, tmp_path: Path) -> None:
    model = load(packed)
    body = AutoModel.from_pretrained(packed)
    assert len(sparse_layers(body)) == len(sparse_layers(model))
    with torch.no_grad():
        wanted = model.model(TOKENS).last_hidden_state
        assert torch.equal(body(TOKENS).last_hidden_state, wanted)
    body.save_pretrained(tmp_path / "body")
    assert torch.equal(logits(load(tmp_path / "body")), logits(model))  # its head is tied to the embeddings


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_maps(packed: Path, device_map) -> None:
    placed = load(packed, device_map=device_map)
    assert_equal_state(placed, load(packed))
    assert torch.equal(logits(placed), logits(load(packed)))


@pytest.mark.parametrize("buffers", [False, True])
def test_blocks_on_disk(packed: Path, tmp_path: Path, buffers: bool) -> None:
    if buffers and Version(transformers.__version__) < Version("5.16"):
        pytest.skip("this transformers casts the integers that it reads back from the disk; 5.16 does not")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    model = load(packed, device_map=places, offload_folder=tmp_path / "disk", offload_buffers=buffers)
    assert model.get_submodule("model.layers.2.input_layernorm").weight.is_meta
    assert model.get_submodule(LAYER).weight.is_meta == buffers
    for _ in range(2):  # what came from the disk goes back to it
        assert torch.equal(logits(model), logits(load(packed)))
    assert torch.equal(model.generate(PROMPT, max_new_tokens=5), load(packed).generate(PROMPT, max_new_tokens=5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "bfloat16", "auto"])
def test_dtypes(packed: Path, dtype) -> None:
    model, wanted = load(packed, dtype=dtype), torch.bfloat16 if "bfloat16" in str(dtype) else torch.float32
    layer, kept = model.get_submodule(LAYER), load(packed).get_submodule(LAYER)
    for name, buffer in kept.named_buffers():
        found = getattr(layer, name)
        assert torch.equal(found, buffer if name != "weight" or buffer.dtype == torch.int8 else buffer.to(wanted))
    assert logits(model).dtype == wanted
    dense = load(packed).dequantize().to(wanted)
    scale = logits(dense).float().std()
    assert (logits(model).float() - logits(dense).float()).abs().max() < (
        1e-4 if wanted == torch.float32 else 0.1
    ) * scale


def test_a_model_that_was_cast_is_saved_as_it_is(packed: Path, tmp_path: Path) -> None:
    model = load(packed, dtype=torch.bfloat16).to(torch.float32)
    alphaprune.save(model, tmp_path / "cast")
    assert_equal_state(alphaprune.load(tmp_path / "cast"), model)


def test_dequantized_models_are_plain(packed: Path, tmp_path: Path) -> None:
    model = load(packed)
    expanded = load(packed).dequantize()
    assert not sparse_layers(expanded) and not hasattr(expanded.config, "quantization_config")
    for name, layer in sparse_layers(model).items():
        weight = expanded.get_submodule(name).weight
        assert weight.dtype == torch.float32 and torch.equal(weight, layer.to_linear(torch.float32).weight)
    close(logits(expanded), logits(model))
    expanded.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert torch.equal(logits(load(tmp_path / "plain")), logits(expanded))
    cast = load(packed, dtype=torch.bfloat16).to(torch.float32).dequantize()
    assert {p.dtype for p in cast.parameters()} == {torch.float32} and logits(cast).dtype == torch.float32


def test_pipeline(packed: Path) -> None:
    text = pipeline("text-generation", model=str(packed))("the sparse", max_new_tokens=5, do_sample=False)
    prompt = AutoTokenizer.from_pretrained(packed)("the sparse", return_tensors="pt")
    wanted = dense_twin(packed).generate(**prompt, max_new_tokens=5, do_sample=False)
    assert text[0]["generated_text"] == AutoTokenizer.from_pretrained(packed).decode(
        wanted[0], skip_special_tokens=True
    )


WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 50, "num_return_sequences": 2},
    "no cache": {"use_cache": False},
    "dynamic": {"cache_implementation": "dynamic"},
    "static": {"cache_implementation": "static"},
    "sliding_window": {"cache_implementation": "sliding_window"},
    "hybrid": {"cache_implementation": "hybrid"},
    "offloaded": {"cache_implementation": "offloaded"},
    "offloaded_static": {"cache_implementation": "offloaded_static"},
    "quantized": {"cache_implementation": "quantized", "cache_config": {"backend": "quanto", "nbits": 4}},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
}


@pytest.mark.parametrize("way", WAYS)
def test_generate(packed: Path, way: str) -> None:
    if "offloaded" in way and not torch.accelerator.is_available():
        pytest.skip("an offloaded cache moves between an accelerator and the CPU; there is no accelerator here")
    if way == "quantized" and importlib.util.find_spec("optimum") is None:
        pytest.skip("a quantized cache needs optimum-quanto, which is not installed")
    found = []
    for model in (load(packed), dense_twin(packed)):
        torch.manual_seed(3)
        found.append(model.generate(PROMPT, **{"max_new_tokens": 8, "do_sample": False, **WAYS[way]}))
    assert torch.equal(*found) and found[0].shape[1] > PROMPT.shape[1]


def test_assisted_decoding(packed: Path) -> None:
    wanted = dense_twin(packed).generate(PROMPT, max_new_tokens=8, do_sample=False)
    for helper in (load(packed), dense_twin(packed)):
        found = load(packed).generate(PROMPT, assistant_model=helper, max_new_tokens=8, do_sample=False)
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_without_a_break(packed: Path, backend: str) -> None:
    model = load(packed)
    wanted = logits(model)
    torch.compiler.reset()
    found = torch.compile(model, fullgraph=True, backend=backend)
    close(logits(found), wanted)
    with torch.no_grad():
        close(found(TOKENS[:, :11]).logits, model(TOKENS[:, :11]).logits)


def edited(packed: Path, tmp_path: Path, change) -> Path:
    """A copy of the directory with another config.json: what `change` makes of its settings."""
    shutil.copytree(packed, tmp_path / "edited")
    file = tmp_path / "edited" / "config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(change(settings) or settings))
    return tmp_path / "edited"


def ours(**changes):
    """A change of the quantization_config."""
    return lambda settings: settings["quantization_config"].update(changes)


def outer(**changes):
    return lambda settings: settings.update(changes)


BAD = {
    "unknown format": (ours(format="csr"), "packed format 'csr' is not known .* reads sbt"),
    "newer": (ours(format_version=7, blocks=3), "format_version 7, alphaprune [0-9.]+ reads 1: install a newer"),
    "version as text": (ours(format_version="1"), "format_version '1': wanted a whole number"),
    "version 0": (ours(format_version=0), "format_version 0: wanted a whole number"),
    "no such setting": (ours(valeus="int8"), "no setting is called valeus; there are: format, .*values"),
    "other values": (ours(values="int4"), "values 'int4': wanted int8"),
    "group of floats": (ours(values=None, group=64), "group 64"),
    "names as text": (ours(modules_to_not_convert="lm_head"), "wanted a list of layer names"),
    "settings as text": (outer(quantization_config="alphaprune"), "should be an object, it is 'alphaprune'"),
    "settings as list": (outer(quantization_config=[1]), r"should be an object, it is \[1\]"),
    "another method": (outer(quantization_config={"quant_method": "alphaprun"}), "model.layers.0"),
    "other vocabulary": (outer(vocab_size=300), r"embed_tokens.weight: has shape \[257, 96\].*describes \[300, 96\]"),
    "size as text": (outer(hidden_size="wide"), "config.json cannot be used|cannot be loaded"),
    "no family": (outer(model_type="llamma"), "config.json cannot be used"),
    "a list": (lambda _: [1, 2], "config.json cannot be used"),
}


@pytest.mark.parametrize("kind", BAD)
def test_edited_configs_are_refused_in_one_sentence(packed: Path, tmp_path: Path, kind: str) -> None:
    change, message = BAD[kind]
    folder = edited(packed, tmp_path, change)
    with pytest.raises(ValueError, match=message) as found:
        alphaprune.load(folder)
    assert len(str(found.value).splitlines()) == 1


@pytest.mark.parametrize(
    "kind", ["unknown format", "newer", "no such setting", "settings as text", "size as text", "a list"]
)
def test_commands_refuse_them_in_one_line(packed: Path, tmp_path: Path, run, kind: str) -> None:
    change, message = BAD[kind]
    folder = edited(packed, tmp_path, change)
    for command in (("info", folder), ("generate", folder, "--prompt", "x"), ("eval", folder, "--text", __file__)):
        status, out, err = run(*command)
        assert status == 2 and not out and len(err.splitlines()) == 1 and re.search(message, err), (command[0], err)


def test_a_plain_load_refuses_them_too(packed: Path, tmp_path: Path) -> None:
    for number, kind in enumerate(("unknown format", "newer", "no such setting", "other vocabulary")):
        change, message = BAD[kind]
        with pytest.raises(ValueError, match=message):
            load(edited(packed, tmp_path / str(number), change))


def test_folders_that_hold_no_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no such folder"):
        alphaprune.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="there is no config"):
        alphaprune.load(tmp_path)


def test_dense_directories_that_disagree(directory: Path, tmp_path: Path) -> None:
    folder = edited(directory, tmp_path, outer(vocab_size=300))
    with pytest.raises(ValueError, match=r"embed_tokens.weight has shape \[257, 96\].*describes \[300, 96\]"):
        alphaprune.load(folder)
    folder = edited(directory, tmp_path / "more", outer(num_hidden_layers=4))
    with pytest.raises(ValueError, match=r"no tensor model\.layers\.3\..* in its safetensors files"):
        alphaprune.load(folder)
    folder = edited(directory, tmp_path / "fewer", outer(num_hidden_layers=2))
    with pytest.raises(ValueError, match=r"tensor model\.layers\.2\..* but config\.json has no place for it"):
        alphaprune.load(folder)


def test_what_transformers_says_in_other_ways_is_one_sentence_too(directory: Path, tmp_path: Path) -> None:
    for number, (change, message) in enumerate(
        (
            (outer(num_key_value_heads=0), "config.json cannot be used: num_key_value_heads is 0"),
            (outer(quantization_config={"quant_method": "gptq", "bits": 4}), "cannot be loaded: .*GPTQ"),
        )
    ):
        with pytest.raises(ValueError, match=message):
            alphaprune.load(edited(directory, tmp_path / str(number), change))
