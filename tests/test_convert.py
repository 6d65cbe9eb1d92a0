"""Checkpoints of others become packed and packed ones dense: every bit, whole or not at all, a block at a time."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import legacy
import pytest
import torch
from conftest import make_model, write_tokenizer
from torch import Tensor

import alphaprune
from alphaprune import bitmask, convert, formats, shards, stored
from alphaprune.formats import quantize


def integers(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view({1: torch.int8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(integers(a[n]), integers(b[n])) for n in a)


def content(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir()) if f.name != "alphaprune.json"}


def expanded(folder: Path) -> dict[str, Tensor]:
    """All tensors of a packed directory as transformers loads it and expands it."""
    model = alphaprune.load(folder, tokens=None).dequantize()
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    return {n: t for n, t in model.state_dict().items() if n not in tied}


def zeros_into(model, sparsity: float = 0.7, special: bool = False, negative: bool = False) -> None:
    """Zeros everywhere in the linear layers; NaN, infinity and -0 into each of them if `special`."""
    generator = torch.Generator().manual_seed(7)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            weight = module.weight.data
            gone = torch.rand(weight.shape, generator=generator) < sparsity
            weight.copy_(weight.masked_fill(gone, 0) if not negative else weight * ~gone)
            if special:
                places = torch.randperm(weight.numel(), generator=generator)[:4]
                weight.view(-1)[places] = torch.tensor([float("nan"), -float("inf"), -0.0, 1e-7], dtype=weight.dtype)
            if module.bias is not None:
                module.bias.data.normal_(generator=generator)


def dense_folder(folder: Path, special: bool = False, sparsity: float = 0.7, negative: bool = False, **changes) -> Path:
    model = make_model(3, **changes)
    zeros_into(model, sparsity, special, negative)
    model.save_pretrained(folder, max_shard_size="200KB")
    write_tokenizer(folder)
    return folder


def pair_masks(folder: Path) -> dict[str, Tensor]:
    generator, masks = torch.Generator().manual_seed(1), {}
    for name, weight in legacy.tensors_of(folder).items():
        if name.endswith("_proj.weight"):
            noise = torch.rand(weight.numel() // 4, 4, generator=generator)
            chosen = torch.zeros(noise.shape, dtype=torch.bool).scatter(1, noise.topk(2, 1).indices, True)
            masks[name.removesuffix(".weight")] = chosen.view(weight.shape)
    return masks


@pytest.mark.parametrize("suffix", ["", ".weight"])
@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_sparse_bitmask_becomes_packed_and_dense(tmp_path: Path, suffix: str, everything: bool, tied: bool) -> None:
    changes = {"tie_word_embeddings": tied, "attention_bias": not tied}
    dense = dense_folder(tmp_path / "dense", dtype=torch.bfloat16, **changes)
    old = legacy.write(dense, tmp_path / "old", suffix=suffix, everything=everything)
    done = convert.convert(old, tmp_path / "new")
    assert done.layouts == {"sparse-bitmask": 21} and done.written.packed_layers == 21
    assert done.written.stored_bytes < 0.45 * done.written.dense_bytes
    wanted = legacy.tensors_of(dense)
    assert ("lm_head.weight" in wanted) is not tied
    assert same_bits(expanded(tmp_path / "new"), wanted)
    convert.convert(old, tmp_path / "plain", packed=False)
    assert same_bits(legacy.tensors_of(tmp_path / "plain"), wanted)
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert not config.keys() & set(stored.SETTINGS)
    for folder in ("new", "plain"):
        for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            assert (tmp_path / folder / file).read_bytes() == (dense / file).read_bytes()
    x = torch.arange(40)[None]
    with torch.no_grad():
        plain = alphaprune.load(tmp_path / "plain")
        assert torch.equal(plain(x).logits, alphaprune.load(dense)(x).logits)


def test_a_mask_in_the_file_stays_as_it_is(tmp_path: Path) -> None:
    """2 of 4, kept zeros and -0 among them."""
    dense = dense_folder(tmp_path / "dense", sparsity=0.8)
    masks = pair_masks(dense)
    tensors = legacy.tensors_of(dense)
    for layer, mask in masks.items():
        tensors[f"{layer}.weight"].masked_fill_(~mask, 0)
        tensors[f"{layer}.weight"][0, :4] = torch.where(mask[0, :4], -0.0, 0.0)
    legacy.save(dense, tensors)
    for stale in set(dense.glob("*.safetensors")) - set(shards.checkpoint_files(dense)):
        stale.unlink()
    old = legacy.write(dense, tmp_path / "old", masks)
    done = convert.convert(old, tmp_path / "new")
    assert done.layouts == {"sparse-24-bitmask": 21} and done.negative_zeros == 0
    for name, module in alphaprune.load(tmp_path / "new", tokens=None).named_modules():
        if isinstance(module, alphaprune.SparseLinear):
            assert torch.equal(formats.get("sbt").unpack(module.packed)[1], masks[name])
    assert same_bits(expanded(tmp_path / "new"), tensors)
    convert.convert(tmp_path / "new", tmp_path / "plain", packed=False)
    assert same_bits(legacy.tensors_of(tmp_path / "plain"), tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dense_with_zeros_and_back_is_the_same_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    dense = dense_folder(tmp_path / "dense", special=True, dtype=dtype)
    done = convert.convert(dense, tmp_path / "new")
    assert done.layouts == {"dense": 21} and done.written.packed_layers == 21 and done.negative_zeros == 21
    assert same_bits(expanded(tmp_path / "new"), legacy.tensors_of(dense))
    back = convert.convert(tmp_path / "new", tmp_path / "back", packed=False)
    assert back.layouts == {"sbt": 21} and back.written.packed_layers == 0
    assert same_bits(legacy.tensors_of(tmp_path / "back"), legacy.tensors_of(dense))


def test_negative_zeros_can_go(tmp_path: Path) -> None:
    dense = dense_folder(tmp_path / "dense", sparsity=0.6, negative=True)
    kept = convert.convert(dense, tmp_path / "kept")
    dropped = convert.convert(dense, tmp_path / "dropped", negative_zeros=False)
    before = legacy.tensors_of(dense)
    assert kept.negative_zeros == sum(int(((t == 0) & t.signbit()).sum()) for t in before.values()) > 10_000
    assert dropped.negative_zeros == 0 and dropped.written.stored_bytes < 0.75 * kept.written.stored_bytes
    assert same_bits(expanded(tmp_path / "kept"), before)
    after = expanded(tmp_path / "dropped")
    assert all(torch.equal(after[n], t) for n, t in before.items())  # -0 equals +0


def test_a_layer_that_would_not_get_smaller_stays_dense(tmp_path: Path) -> None:
    model = make_model(3)
    zeros_into(model)
    model.model.layers[1].mlp.up_proj.weight.data.normal_()
    model.save_pretrained(tmp_path / "dense")
    done = convert.convert(tmp_path / "dense", tmp_path / "new")
    assert done.written.packed_layers == 20
    names = shards.Shards(tmp_path / "new").names()
    assert "model.layers.1.mlp.up_proj.weight_mask" not in names and "model.layers.1.mlp.gate_proj.weight_mask" in names
    again = convert.convert(tmp_path / "new", tmp_path / "back", packed=False)
    assert again.layouts == {"sbt": 20, "dense": 1}
    assert same_bits(legacy.tensors_of(tmp_path / "back"), legacy.tensors_of(tmp_path / "dense"))


@pytest.mark.parametrize("group", [None, 128])
@pytest.mark.parametrize("of", ["dense", "bitmask", "packed"])
def test_int8_is_what_quantize_makes(tmp_path: Path, of: str, group: int | None) -> None:
    dense = dense_folder(tmp_path / "dense", dtype=torch.bfloat16)
    old = dense
    if of == "bitmask":
        old = legacy.write(dense, tmp_path / "old")
    elif of == "packed":
        convert.convert(dense, old := tmp_path / "old")
    done = convert.convert(old, tmp_path / "new", values="int8", group=group)
    recipe = json.loads((tmp_path / "new" / "alphaprune.json").read_text())
    plain = tmp_path / "plain"
    convert.convert(tmp_path / "new", plain, packed=False)
    found = legacy.tensors_of(plain)
    for name, weight in legacy.tensors_of(dense).items():
        if name.endswith("_proj.weight"):
            integers_, scale, error = quantize.quantize(weight, weight != 0, group)
            assert torch.equal(found[name], quantize.dequantize(integers_, scale, torch.bfloat16))
            layer = name.removesuffix(".weight")
            assert done.written.errors[layer] == pytest.approx(error)
            assert recipe["quantization_error"][layer]["relative"] == pytest.approx(error.relative)
    with pytest.raises(ValueError, match="int8 already"):
        convert.convert(tmp_path / "new", tmp_path / "more", values="int8")


@pytest.mark.parametrize("family", ["Mistral", "Qwen2", "Qwen3"])
def test_other_families(tmp_path: Path, family: str) -> None:
    import transformers

    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    settings = {k: getattr(make_model().config, k) for k in (*keys, "num_key_value_heads")}
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**settings, sliding_window=None)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    zeros_into(model)
    model.save_pretrained(tmp_path / "dense")
    old = legacy.write(tmp_path / "dense", tmp_path / "old", everything=True)
    convert.convert(old, tmp_path / "new")
    assert same_bits(expanded(tmp_path / "new"), legacy.tensors_of(tmp_path / "dense"))


@pytest.mark.parametrize("options", [{}, {"values": "int8"}, {"packed": False}], ids=str)
def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path, options: dict) -> None:
    old = legacy.write(dense_folder(tmp_path / "dense"), tmp_path / "old")
    convert.convert(old, tmp_path / "whole", **options)
    seen: list[str] = []

    def stop(block: str) -> None:
        seen.append(block)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert.convert(old, tmp_path / "new", progress=stop, **options)
    part = tmp_path / "new.part"
    done = {f: f.stat().st_mtime_ns for f in part.glob("*.safetensors")}
    assert not (tmp_path / "new").exists() and len(done) == 1
    with pytest.raises(ValueError, match="another negative_zeros lies here"):
        convert.convert(old, tmp_path / "new", negative_zeros=False, **options)
    convert.convert(old, tmp_path / "new", **options)
    assert content(tmp_path / "new") == content(tmp_path / "whole")
    assert all((tmp_path / "new" / f.name).stat().st_mtime_ns == when for f, when in done.items())


def test_another_checkpoint_does_not_continue_it(tmp_path: Path) -> None:
    """One value differs, in the middle of a tensor that is done."""
    old = dense_folder(tmp_path / "dense")

    def stop(block: str) -> None:
        if block.endswith("1"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert.convert(old, tmp_path / "new", progress=stop)
    tensors = legacy.tensors_of(old)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name].view(-1)[tensors[name].numel() // 2] += 1
    index = json.loads((old / shards.INDEX).read_text())["weight_map"]
    inside = {n: tensors[n] for n, file in index.items() if file == index[name]}
    shards.write(old / index[name], inside.items())
    with pytest.raises(ValueError, match="another checkpoint lies here"):
        convert.convert(old, tmp_path / "new")


def test_never_the_whole_model_in_memory(tmp_path: Path) -> None:
    """The peak of a process grows by some blocks of eight, whichever way it converts."""
    changes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "head_dim": 64}
    model = make_model(3, num_attention_heads=8, num_key_value_heads=8, **changes)
    zeros_into(model, 0.8)
    model.save_pretrained(tmp_path / "dense", max_shard_size="20MB")
    legacy.write(tmp_path / "dense", tmp_path / "old")
    size = sum(p.nbytes for p in model.model.layers.parameters())
    code = """
import sys, torch, transformers
from alphaprune import convert

def peak():
    return 1024 * int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])

from transformers import LlamaForCausalLM
before = peak()
folder = sys.argv[1]
convert.convert(f"{folder}/old", f"{folder}/new")
convert.convert(f"{folder}/new", f"{folder}/plain", packed=False)
convert.convert(f"{folder}/plain", f"{folder}/again")
print(peak() - before)
"""
    # glibc would keep freed matrices of this size for later; those of large models it gives back
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", code, str(tmp_path)]
    grown = int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout)
    assert grown < 0.5 * size, (grown, size)
    assert content(tmp_path / "again") == content(tmp_path / "new")


def test_a_layer_is_read_once_to_check_it_and_once_to_convert_it(tmp_path: Path, monkeypatch) -> None:
    """Those of the first block once more, to see that they get smaller."""
    old = legacy.write(dense_folder(tmp_path / "dense"), tmp_path / "old")
    original, counts = bitmask.read, Counter()

    def read(shards_, layer: str, stem: str) -> bitmask.Bitmask:
        counts[layer] += 1
        return original(shards_, layer, stem)

    monkeypatch.setattr(bitmask, "read", read)
    convert.convert(old, tmp_path / "new")
    assert len(counts) == 21 and all(count == (3 if ".0." in name else 2) for name, count in counts.items())


def test_a_dtype_that_cannot_be_written_is_named_before_anything_is(tmp_path: Path) -> None:
    folder = dense_folder(tmp_path / "dense")
    tensors = legacy.tensors_of(folder)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)
    legacy.save(folder, tensors)
    with pytest.raises(ValueError, match=r"model\.norm: its weights are float8_e4m3fn, quantized by another method"):
        convert.convert(folder, tmp_path / "new")
    assert not list(tmp_path.glob("new*"))


def test_whoever_loads_an_orphan_learns_of_convert(tmp_path: Path) -> None:
    old = legacy.write(dense_folder(tmp_path / "dense"), tmp_path / "old")
    with pytest.raises(ValueError, match=r"model\.layers\.0\..* nothing loads any more; `alphaprune convert"):
        alphaprune.load(old)


def test_an_orphan_that_would_not_shrink_can_be_expanded(tmp_path: Path) -> None:
    dense = dense_folder(tmp_path / "dense", sparsity=0.01)
    with pytest.raises(ValueError, match="no layer of it would get smaller; give --format dense"):
        convert.convert(legacy.write(dense, tmp_path / "old"), tmp_path / "new")


def test_what_is_quantized_by_others_is_refused_by_name(tmp_path: Path) -> None:
    folder = dense_folder(tmp_path / "dense")
    config = json.loads((folder / "config.json").read_text())
    groups = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4}}}
    for settings, kind in (
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors, pack-quantized"),
        ({"format": "marlin-24", "sparsity_config": {"format": "dense"}}, "compressed-tensors, marlin-24"),
        ({"quant_method": "compressed-tensors", "format": "dense", "config_groups": groups}, "compressed-tensors"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
        with pytest.raises(ValueError, match=rf"quantized \({kind}.*before that"):
            convert.convert(folder, tmp_path / "new")
    for lost in ({"transform_config": {"config_groups": groups}}, {"kv_cache_scheme": {"num_bits": 8}}):
        settings = {"quant_method": "compressed-tensors", "format": "dense", **lost}
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
        with pytest.raises(ValueError, match=f"quantization_config has a {next(iter(lost))}"):
            convert.convert(folder, tmp_path / "new")
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": "int4"}))
    with pytest.raises(ValueError, match="should be an object"):
        convert.convert(folder, tmp_path / "new")
    assert not list(tmp_path.glob("new*"))


def test_dense_has_no_values_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="int8 values are a way to pack weights"):
        convert.convert(tmp_path / "old", tmp_path / "new", packed=False, values="int8")


def test_settings_of_early_releases(tmp_path: Path) -> None:
    dense = dense_folder(tmp_path / "dense")
    old = legacy.write(dense, tmp_path / "old", suffix=".weight")
    config = json.loads((old / "config.json").read_text())
    config["sparsity_config"] = {"format": "sparse_bitmask"}
    config["compression_config"] = config.pop("quantization_config")
    (old / "config.json").write_text(json.dumps(config))
    convert.convert(old, tmp_path / "new")
    assert same_bits(expanded(tmp_path / "new"), legacy.tensors_of(dense))
    assert not {"sparsity_config", "compression_config"} & json.loads((tmp_path / "new/config.json").read_text()).keys()
