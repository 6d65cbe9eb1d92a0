"""Packed directories with int8 values: written, loaded, cast, saved again, refused when damaged."""

import json
from pathlib import Path

import pytest
import torch
from conftest import make_model, write_tokenizer
from problems import exact_weight
from safetensors import safe_open
from test_checkpoint import make_plan, write
from transformers import AutoModelForCausalLM, AutoTokenizer

import alphaprune
from alphaprune import SparseLinear, cli, hf, inspection, shards, unfinished
from alphaprune.formats import quantize, sbt
from alphaprune.kernels import base, cpu
from alphaprune.model import make_skeleton, open_source, read_config
from alphaprune.pruning import Recipe, prune_blocks

LAYER = "model.layers.1.mlp.gate_proj"
PACKED = ("weight", "weight_mask", "weight_offsets", "weight_scale")


def stored(folder: Path, layer: str = LAYER) -> dict[str, torch.Tensor]:
    """The packed tensors of a layer as they lie in the file."""
    shards_of = shards.Shards(folder)
    return {suffix: shards_of.tensor(f"{layer}.{suffix}") for suffix in PACKED}


def change(folder: Path, layer: str, **tensors: torch.Tensor | None) -> None:
    """Writes the file of a layer again with some of its tensors changed or, where None, left out."""
    file = folder / json.loads((folder / shards.INDEX).read_text())["weight_map"][f"{layer}.weight"]
    with safe_open(file, "pt") as old:
        content = {name: old.get_tensor(name) for name in old.keys()}  # noqa: SIM118 - it is no dict
    content |= {f"{layer}.{suffix}": tensor for suffix, tensor in tensors.items()}
    shards.write(file, [(name, tensor) for name, tensor in content.items() if tensor is not None])


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(30)[None]).logits


@pytest.mark.parametrize("group", [None, 128])
def test_written_directory_holds_the_rounded_weights(directory: Path, tmp_path: Path, group: int | None) -> None:
    written = write(directory, tmp_path / "out", values="int8", group=group)
    model = alphaprune.load(tmp_path / "out")
    sparse = {n: m for n, m in model.named_modules() if isinstance(m, SparseLinear)}
    assert len(sparse) == written.packed_layers == 21 and all(m.weight.dtype == torch.int8 for m in sparse.values())
    assert (
        written.stored_bytes
        < 0.3 * written.dense_bytes
        == 0.3 * 4 * sum(m.in_features * m.out_features for m in sparse.values())
    )
    live = make_model(1)  # pruned and rounded in memory, block by block, as the file says it was
    masks = {}

    def finish(block, found) -> None:
        for name, mask in found.items():
            layer = block.linears[name]
            integers, scale, error = quantize.quantize(layer.weight, mask, group)
            assert error == written.errors[name] and 0 < error.relative < 0.01
            layer.weight.data, masks[name] = quantize.dequantize(integers, scale), mask
            assert torch.equal(sbt.unpack(sparse[name].packed)[0], integers)
            assert torch.equal(sparse[name].weight_scale, scale)

    tokens = torch.randint(0, 257, (3, 32), generator=torch.Generator().manual_seed(5))
    list(prune_blocks(live, make_plan(live), Recipe("wanda"), tokens, finish=finish))
    assert len(masks) == 21
    torch.testing.assert_close(logits(model), logits(live), rtol=1e-4, atol=1e-4)
    for name, module in model.dequantize().named_modules():
        if name in sparse:
            assert torch.equal(module.weight, live.get_submodule(name).weight)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert settings == {"quant_method": "alphaprune", "format": "sbt", "format_version": 1, "values": "int8"}
    recipe = json.loads((tmp_path / "out" / unfinished.RECIPE).read_text())
    assert recipe["quantization_error"][LAYER] == written.errors[LAYER]._asdict()


def test_the_blocks_after_see_the_rounded_weights(directory: Path, tmp_path: Path) -> None:
    """Otherwise a run that was interrupted, which has only the integers of earlier blocks, would end differently."""
    write(directory, tmp_path / "rounded", values="int8")
    write(directory, tmp_path / "exact")
    floats = alphaprune.load(tmp_path / "exact")
    first, last = "model.layers.0.mlp.up_proj", "model.layers.2.mlp.up_proj"
    masks = {n: shards.Shards(tmp_path / "rounded").tensor(f"{n}.weight_mask") for n in (first, last)}
    assert torch.equal(masks[first], floats.get_submodule(first).weight_mask)  # chosen before anything was rounded
    assert not torch.equal(masks[last], floats.get_submodule(last).weight_mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_dtype_on_loading_leaves_integers_alone(directory: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    write(directory, tmp_path / "out", values="int8", group=128)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype).eval()
    layer = model.get_submodule(LAYER)
    for suffix, tensor in stored(tmp_path / "out").items():
        assert torch.equal(getattr(layer, suffix), tensor) and getattr(layer, suffix).dtype == tensor.dtype
    wanted = logits(alphaprune.load(tmp_path / "out"))
    assert logits(model).dtype == dtype
    torch.testing.assert_close(logits(model).float(), wanted, rtol=0.1, atol=0.1)
    rounded = model.to(torch.bfloat16).get_submodule(LAYER)
    assert rounded.weight.dtype == torch.int8 and torch.equal(rounded.weight_scale, stored(tmp_path / "out")[PACKED[3]])
    plain = model.dequantize().get_submodule(LAYER).weight
    assert plain.dtype in (dtype, torch.bfloat16) and not hasattr(model.config, "quantization_config")


def test_a_dtype_casts_the_places_of_floats_only(directory: Path, tmp_path: Path) -> None:
    """Not every version of transformers passes the dtype on; where it does, integers keep their own."""
    for values, wanted in (("int8", torch.int8), (None, torch.bfloat16)):
        write(directory, tmp_path / str(values), values=values)
        model = make_skeleton(read_config(directory))
        quantizer = hf.AlphaPruneQuantizer(hf.AlphaPruneConfig())
        files = [str(file) for file in (tmp_path / str(values)).glob("*.safetensors")]
        quantizer._process_model_before_weight_loading(model, files, dtype=torch.bfloat16)
        layer = model.get_submodule(LAYER)
        assert layer.weight.dtype == wanted and (layer.weight_scale is None) == (values is None)
        assert values is None or layer.weight_scale.dtype == torch.float32


def test_saved_again_it_is_the_same(directory: Path, tmp_path: Path) -> None:
    write(directory, tmp_path / "out", values="int8")
    wanted, files = logits(alphaprune.load(tmp_path / "out")), stored(tmp_path / "out")
    alphaprune.load(tmp_path / "out").save_pretrained(tmp_path / "theirs")
    ours = alphaprune.save(alphaprune.load(tmp_path / "out"), tmp_path / "ours")
    assert ours.packed_layers == 21 and ours.stored_bytes < 0.3 * ours.dense_bytes
    for folder in ("theirs", "ours"):
        assert all(torch.equal(t, files[suffix]) for suffix, t in stored(tmp_path / folder).items())
        settings = json.loads((tmp_path / folder / "config.json").read_text())["quantization_config"]
        assert settings["values"] == "int8"
        assert torch.equal(logits(alphaprune.load(tmp_path / folder)), wanted)
    assert (tmp_path / "ours" / "tokenizer.json").exists()
    again = open_source(tmp_path / "ours")  # expanded, so that it can be analyzed and pruned again
    assert alphaprune.analyze(again, fit=None).layers.keys() >= {LAYER}


def test_a_live_model_saves_its_errors(directory: Path, tmp_path: Path) -> None:
    model = alphaprune.sparsify(alphaprune.load(directory, torch.bfloat16), values="int8")
    written = alphaprune.save(model, tmp_path / "out")
    assert written.errors[LAYER] == model.get_submodule(LAYER).quantization_error
    assert json.loads((tmp_path / "out" / unfinished.RECIPE).read_text())["quantization_error"].keys() >= {LAYER}
    assert written.dense_bytes == 2 * sum(m.in_features * m.out_features for m in sparse_layers(model))
    assert torch.equal(logits(alphaprune.load(tmp_path / "out")), logits(model))
    info = inspection.describe_model(tmp_path / "out")
    assert info["sparsity"] == 0 and info["linears_dense_bytes"] == written.dense_bytes
    assert info["linears_bytes"] == written.stored_bytes < 0.75 * written.dense_bytes


def sparse_layers(model) -> list[SparseLinear]:
    return [m for m in model.modules() if isinstance(m, SparseLinear)]


def test_info_shows_integers_and_their_bytes(directory: Path, tmp_path: Path) -> None:
    written = write(directory, tmp_path / "out", values="int8", group=128)
    found = inspection.describe_model(tmp_path / "out")
    row = next(row for row in found["layers"] if row["name"] == LAYER)
    assert row["stored"] == "sbt int8" and row["bytes"] == sum(t.nbytes for t in stored(tmp_path / "out").values())
    assert row["dense_bytes"] == 4 * row["weights"] and found["sparsity"] == pytest.approx(0.7, abs=1e-6)
    assert found["linears_bytes"] == written.stored_bytes and found["linears_dense_bytes"] == written.dense_bytes


def test_info_chooses_for_activations_of_8_bits(directory: Path, tmp_path: Path, run, monkeypatch) -> None:
    """By the times of products of bytes where a kernel may round x, else by those of floats."""
    write(directory, tmp_path / "out", values="int8")
    asked = []
    choose = base.choose
    monkeypatch.setattr(base, "choose", lambda *what: asked.append(what[3]) or choose(*what))
    status, out, _ = run("info", tmp_path / "out")
    assert status == 0 and set(asked) == {torch.float32} and "x in int8" not in out
    asked.clear()
    status, out, _ = run("info", tmp_path / "out", "--activations", "int8")
    rounds = cpu.best() in cpu.BYTES
    assert status == 0 and "x in int8 where kernels can" in out
    assert set(asked) == {torch.int8 if rounds else torch.float32}
    write(directory, tmp_path / "floats")
    status, _, err = run("info", tmp_path / "floats", "--activations", "int8")
    assert status == 2 and "no layer of this model has int8 values" in err
    status, _, err = run("info", "--activations", "int8")
    assert status == 2 and "name its directory, too" in err


DAMAGED = {
    "lost scale": ({"weight_scale": None}, "packed tensor weight_scale is missing"),
    "short scale": (
        {"weight_scale": torch.ones(199)},
        r"weight_scale should be float32 \[200\] or \[200, 1\].*\[199\]",
    ),
    "other scale": ({"weight_scale": torch.ones(200).half()}, r"should be float32.*the file has float16"),
    "other values": ({"weight": torch.zeros(6400, dtype=torch.int16)}, "floating point or int8, the file has int16"),
    "short values": ({"weight": torch.zeros(64, dtype=torch.int8)}, "cut short"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_files_that_disagree_are_refused_by_layer(directory: Path, tmp_path: Path, kind: str) -> None:
    tensors, message = DAMAGED[kind]
    write(directory, tmp_path / "out", values="int8")
    change(tmp_path / "out", LAYER, **tensors)
    with pytest.raises(ValueError, match=f"{LAYER}: .*{message}"):
        logits(alphaprune.load(tmp_path / "out"))


@pytest.fixture
def prune(tmp_path: Path, directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """`alphaprune prune` of the small model; (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        common = ("prune", str(directory), "-o", "out", "--sparsity", "0.6", "--method", "magnitude")
        status = cli.main([*common, *arguments])
        return status, *capsys.readouterr()

    return call


def test_the_command_says_what_was_lost(prune) -> None:
    status, out, _ = prune("--values", "int8", "--group", "128", "--json")
    found = json.loads(out)
    recipe = json.loads(Path("out", unfinished.RECIPE).read_text())
    assert status == 0 and found["quantization_error"] == recipe["quantization_error"]
    assert len(found["quantization_error"]) == found["packed_layers"] == 21
    assert (recipe["values"], recipe["group"]) == ("int8", 128) and "errors" not in found
    assert stored(Path("out"), "model.layers.0.mlp.down_proj")["weight_scale"].shape == (96, 2)
    Path("out").rename("first")
    status, out, _ = prune("--values", "int8")
    assert status == 0 and "int8 values: relative error 0." in out and "at most 0." in out and "(model.layers." in out
    Path("out").rename("second")
    status, out, _ = prune("--json")
    assert status == 0 and "quantization_error" not in out


def test_a_run_with_other_values_is_another_run(prune, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_, **__) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(unfinished.Writer, "finish", stop)
        assert prune("--values", "int8")[0] == 130
    for arguments, message in (
        ((), "another values lies here (int8, now None)"),
        (("--values", "int8", "--group", "128"), "another group lies here (None, now 128)"),
    ):
        status, _, err = prune(*arguments)
        assert status == 2 and message in err
    assert prune("--values", "int8")[0] == 0
    status, _, err = prune("--group", "128")
    assert status == 2 and "--group 128 belongs to --values int8" in err
    status, _, err = prune("--values", "int8", "--format", "dense")
    assert status == 2 and "leave out --format dense" in err


def test_generation_and_evaluation_run_on_integers(directory: Path, tmp_path: Path, text_file: Path, capsys) -> None:
    write(directory, tmp_path / "out", values="int8")
    write_tokenizer(tmp_path / "out")
    prompt = AutoTokenizer.from_pretrained(tmp_path / "out")("the ", return_tensors="pt").input_ids
    model = alphaprune.load(tmp_path / "out")
    tokens = model.generate(prompt, max_new_tokens=8, do_sample=False)
    assert torch.equal(tokens, model.dequantize().generate(prompt, max_new_tokens=8, do_sample=False))
    assert cli.main(["eval", str(tmp_path / "out"), "--text", str(text_file), "--length", "64", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["perplexity"] > 1


def test_expanded_weights_are_integers_times_scale(directory: Path, tmp_path: Path) -> None:
    write(directory, tmp_path / "out", values="int8", group=128)
    layer = alphaprune.load(tmp_path / "out").get_submodule("model.layers.2.mlp.down_proj")
    integers, _ = sbt.unpack(layer.packed)
    assert torch.equal(layer.to_linear().weight, exact_weight(integers, layer.weight_scale).float())
