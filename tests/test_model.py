"""Blocks of a live model and of its directory are the same, and only one is in memory."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file, save_file
from torch import nn

import alphaprune
from alphaprune import model as models
from alphaprune import sparsify


def test_live_and_lazy_blocks_agree(directory: Path) -> None:
    live = make_model(seed=1)
    lazy = models.open_source(directory)
    for a, b in zip(models.blocks(live), lazy.blocks(), strict=True):
        assert (a.index, a.name) == (b.index, b.name)
        assert list(a.linears) == list(b.linears) and len(a.linears) == 7
        for name, layer in a.linears.items():
            assert name == f"{a.name}.{name.removeprefix(a.name + '.')}"
            assert torch.equal(layer.weight, b.linears[name].weight)


def test_a_block_is_dropped_when_the_next_comes(directory: Path) -> None:
    seen = []
    for block in models.blocks(directory):
        assert all(not p.is_meta for p in block.module.parameters())
        assert all(p.is_meta for earlier in seen for p in earlier.module.parameters())
        seen.append(block)


def test_description_is_the_same_live_and_lazy_and_changes_with_the_weights(directory: Path, tmp_path: Path) -> None:
    live, lazy = models.describe(make_model(seed=1)), models.describe(directory)
    assert live.fingerprint == lazy.fingerprint and live.shapes == lazy.shapes and live.block_of == lazy.block_of
    assert lazy.dtype == "float32" and lazy.shapes["model.layers.2.mlp.down_proj"] == (96, 200)
    changed = make_model(seed=1)
    changed.model.layers[2].mlp.down_proj.weight.data[-1, -1] += 1
    assert models.describe(changed).fingerprint != live.fingerprint
    changed.save_pretrained(tmp_path / "one")  # a single file this time
    assert models.describe(tmp_path / "one").fingerprint == models.describe(changed).fingerprint


def test_bfloat16_checkpoint_keeps_its_dtype(tmp_path: Path) -> None:
    make_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "m")
    assert models.describe(tmp_path / "m").dtype == "bfloat16"
    block = next(models.blocks(tmp_path / "m"))
    assert all(layer.weight.dtype == torch.bfloat16 for layer in block.linears.values())


def test_what_is_no_model_gets_a_sentence(tmp_path: Path, directory: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json"):
        models.open_source(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        models.open_source(tmp_path / "nothing")
    with pytest.raises(ValueError, match="is a file"):
        models.open_source(directory / "config.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json cannot be used"):
        models.open_source(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match="'gpt2' is not known"):
        models.open_source(tmp_path)
    with pytest.raises(ValueError, match="hub did not give it"):
        models.open_source("no-such-owner/no-such-model")


def test_config_and_shards_that_disagree_are_named(directory: Path, tmp_path: Path) -> None:
    shutil.copytree(directory, tmp_path / "m")
    config = json.loads((directory / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "intermediate_size": 208}))
    with pytest.raises(ValueError, match=r"gate_proj\.weight has shape \(200, 96\) .* belongs to another model"):
        models.open_source(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with pytest.raises(ValueError, match=r"no tensor model\.layers\.3"):
        models.open_source(tmp_path / "m")


def test_a_packed_live_model_is_not_analyzed_in_part() -> None:
    live = make_model()
    sparsify(live, {"model.layers.1.mlp.up_proj": torch.rand(200, 96) > 0.9})
    with pytest.raises(ValueError, match=r"1\.mlp\.up_proj is packed already.*dequantize"):
        models.describe(live)


def test_a_model_without_linears_is_refused() -> None:
    live = make_model()
    for layer in live.model.layers:
        layer.mlp, layer.self_attn = nn.Identity(), nn.Identity()
    with pytest.raises(ValueError, match="no prunable linear layer"):
        models.describe(live)


def test_a_directory_in_another_dtype_is_the_cast_model(directory: Path) -> None:
    lazy = models.DirectorySource(directory, torch.bfloat16)
    live = make_model(seed=1).to(torch.bfloat16)
    assert lazy.description().fingerprint == models.describe(live).fingerprint
    assert lazy.description().dtype == "bfloat16"
    for a, b in zip(models.blocks(live), lazy.blocks(), strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a.module.parameters(), b.module.parameters(), strict=True))


@pytest.mark.parametrize("values", [None, "int8"])
def test_a_packed_directory_comes_block_by_block(directory: Path, tmp_path: Path, values: str | None) -> None:
    packed = alphaprune.load(directory)
    plan = alphaprune.plan(alphaprune.analyze(packed, fit=None), 0.7, allocator="uniform")
    alphaprune.prune(packed, plan, method="magnitude")
    alphaprune.save(sparsify(packed, values=values), tmp_path / "packed")
    live = alphaprune.load(tmp_path / "packed").dequantize()
    lazy = models.open_source(tmp_path / "packed")
    assert lazy.description().fingerprint == models.describe(live).fingerprint  # rows read from tiles alone
    for a, b in zip(models.blocks(live), lazy.blocks(), strict=True):
        assert all(torch.equal(layer.weight, b.linears[name].weight) for name, layer in a.linears.items())
        assert all(p.is_meta for p in lazy.skeleton.parameters() if id(p) not in map(id, b.module.parameters()))


def test_some_blocks_alone_can_be_had(directory: Path) -> None:
    assert [block.index for block in models.open_source(directory).blocks({2, 0})] == [0, 2]


def test_a_shard_that_changes_during_a_run_stops_it(directory: Path, tmp_path: Path) -> None:
    shutil.copytree(directory, tmp_path / "m")
    with pytest.raises(ValueError, match=r"safetensors: was changed while it was read"):
        for _ in models.blocks(tmp_path / "m"):
            os.utime(max((tmp_path / "m").glob("*.safetensors")))


def test_weights_that_others_quantized_are_refused_with_the_remedy(directory: Path, tmp_path: Path) -> None:
    shutil.copytree(directory, tmp_path / "m")
    config = json.loads((directory / "config.json").read_text())
    for method, remedy in (("gptq", "before that"), ("fp8", r"FineGrainedFP8Config\(dequantize=True\)")):
        settings = {"quantization_config": {"quant_method": method}}
        (tmp_path / "m" / "config.json").write_text(json.dumps({**config, **settings}))
        with pytest.raises(ValueError, match=rf"quantized \({method}\).*{remedy}"):
            models.open_source(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    for file in (tmp_path / "m").glob("*.safetensors"):  # and without a word in config.json
        tensors = load_file(file)
        fp8 = {n: t.to(torch.float8_e4m3fn) if n.endswith("proj.weight") else t for n, t in tensors.items()}
        save_file(fp8, file)
    with pytest.raises(ValueError, match=r"0\.\S+_proj: its weights are float8_e4m3fn, quantized by another method"):
        models.open_source(tmp_path / "m")
