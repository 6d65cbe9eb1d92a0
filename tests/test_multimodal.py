"""Models that read pictures: the text model inside is pruned as any other, what is beside it is copied bit by bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_tokenizer
from family_models import (
    PROMPT,
    TOKENS,
    WHOLES,
    assert_twins,
    block_by_block,
    config_of,
    logits,
    make,
    plan_of,
    prune_folder,
)

import alphaprune
from alphaprune import SparseLinear, calibrate, compressions, families, hf, shards
from alphaprune import model as models
from alphaprune.convert import convert
from alphaprune.model import open_source
from alphaprune.pruning import Recipe

QUICK = ("gemma3", "llava", "qwen2_vl")
SLOW = [kind for kind in WHOLES if kind not in QUICK]
PICTURE = {"gemma3": 4, "llava": 16}  # so many tokens a picture of 16×16 pixels takes
IMAGE = 257 - 1  # a token of the vocabulary, in its place in these tests


@pytest.fixture(autouse=True)
def quiet(one_thread: None) -> None:
    """One thread; matrices are small."""


def folder_of(kind: str, folder: Path, **changes: Any) -> Path:
    """A checkpoint with the names that published ones have, its towers in another dtype than the text model."""
    make(kind, **changes).save_pretrained(folder)
    found = shards.Shards(folder)
    tensors = {}
    for name in found.names():
        tensor = found.tensor(name)
        if "vision_tower." in name:
            name = name.replace("vision_tower.", "vision_tower.vision_model.") if kind != "mistral3" else name
            tensor = tensor.to(torch.float16)
        tensors[name] = tensor.clone()
    shards.write(folder / shards.SINGLE, tensors.items())
    return folder


def beside(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint that are not of the text model or its head."""
    found, family = shards.Shards(folder), families.of(models.read_config(folder))
    return {n: found.tensor(n) for n in found.names() if not family.is_text(family.module_name(n))}


@pytest.mark.parametrize("kind", QUICK)
def test_a_multimodal_model_goes_through_everything(kind: str, tmp_path: Path) -> None:
    """Analysis, an alpha plan, Wanda, packing, expansion, loading, generation."""
    folder = folder_of(kind, tmp_path / "model")
    plan = plan_of(folder, fit="robust")
    written = prune_folder(folder, tmp_path / "packed", Recipe("wanda"), plan)
    convert(tmp_path / "packed", tmp_path / "dense", packed=False)
    old = beside(folder)
    assert len(old) > 10 and not any("layers.0.self_attn.q_proj" in n and "language" in n for n in old)
    for out in ("packed", "dense"):
        new = beside(tmp_path / out)
        assert new.keys() == old.keys()
        for name, tensor in old.items():
            assert new[name].dtype == tensor.dtype and torch.equal(new[name], tensor), name
    packed, dense = alphaprune.load(tmp_path / "packed"), alphaprune.load(tmp_path / "dense")
    assert type(packed) is type(dense) is type(make(kind))
    assert sum(isinstance(m, SparseLinear) for m in packed.modules()) == written.packed_layers == len(plan.layers)
    if kind in PICTURE:
        assert_same_with_a_picture(packed, dense, PICTURE[kind])
    assert_twins(packed, dense)


def assert_same_with_a_picture(packed: torch.nn.Module, dense: torch.nn.Module, count: int) -> None:
    tokens = torch.cat([PROMPT[:, :3], torch.full((1, count), IMAGE), PROMPT[:, 3:]], 1)
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    found = []
    for model in (packed, dense):
        model.config.image_token_id = model.model.config.image_token_id = IMAGE
        with torch.no_grad():
            found.append(model(input_ids=tokens, pixel_values=pixels).logits)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        other = packed(input_ids=tokens, pixel_values=-pixels).logits
    assert (other - found[0]).abs().max() > 1e-3  # it sees the picture


@pytest.mark.slow
@pytest.mark.parametrize("kind", SLOW)
def test_the_others_go_through_everything(kind: str, tmp_path: Path) -> None:
    test_a_multimodal_model_goes_through_everything(kind, tmp_path)


@pytest.mark.parametrize("kind", QUICK)
def test_blocks_are_given_what_the_whole_model_gives_them(kind: str) -> None:
    model = make(kind)
    source, hidden, _ = block_by_block(model)
    head = calibrate.head_inputs(source, TOKENS[:2], hidden[:2])
    torch.testing.assert_close(model.lm_head(head), logits(model), rtol=1e-4, atol=1e-4)


def test_a_live_model_is_pruned_saved_and_loaded(tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    make("llava").save_pretrained(tmp_path / "model")
    plan, live = plan_of(tmp_path / "model"), make("llava")
    masks = alphaprune.prune(live, plan, method="sparsegpt", tokens=TOKENS)
    assert set(masks) == set(plan.layers) and all(name.startswith("model.language_model.layers.") for name in masks)
    packed = alphaprune.sparsify(live, masks)
    alphaprune.save(packed, tmp_path / "saved")
    again = alphaprune.load(tmp_path / "saved")
    assert torch.equal(logits(again), logits(packed))
    alphaprune.save(again.dequantize(), tmp_path / "dense")
    given = {"quantization_config": hf.AlphaPruneConfig(), "dtype": "auto"}  # packed while it is loaded
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "dense", **given)
    assert sum(isinstance(m, SparseLinear) for m in loaded.modules()) == len(masks)
    assert torch.equal(logits(loaded), logits(packed))
    names = shards.Shards(tmp_path / "saved").names()
    assert {"language_model.model.layers.0.self_attn.q_proj.weight_mask", "language_model.lm_head.weight"} <= {*names}


def test_other_ways_to_make_it_smaller(tmp_path: Path) -> None:
    folder = folder_of("llava", tmp_path / "model")
    source = open_source(folder)
    chosen = compressions.plan(source, alphaprune.analyze(source), "structured", 0.2, which="both")
    recipe = compressions.Recipe()
    compressions.write(source, tmp_path / "small", chosen, recipe, {}, {})
    small = alphaprune.load(tmp_path / "small")
    live = alphaprune.compress(alphaprune.load(folder), chosen)
    torch.testing.assert_close(logits(small), logits(live), rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in make("llava").parameters())
    plan = plan_of(folder, 0.5, "2:4")
    written = prune_folder(folder, tmp_path / "permuted", Recipe("wanda", channel_permute=True), plan)
    assert written.packed_layers == 14


@pytest.mark.slow
def test_commands_on_a_model_with_pictures(run, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    write_tokenizer(folder_of("gemma3", tmp_path / "model"))
    (tmp_path / "model" / "preprocessor_config.json").write_text("{}")
    Path("text").write_text("a heavy tail, and so on. " * 40)
    text = ("--calibration", "text", "--samples", 4, "--length", 32)
    status, out, err = run("prune", "model", "-o", "packed", *text, "--sparsity", 0.6)
    assert status == 0 and "14 of 14 layers packed" in out, err
    assert Path("packed", "preprocessor_config.json").is_file()
    status, out, _ = run("info", "packed", "--json")
    found = json.loads(out)
    assert status == 0 and found["model_type"] == "gemma3" and abs(found["sparsity"] - 0.6) < 1e-3
    status, out, err = run("generate", "packed", "--prompt", "so", "--max-new", 4)
    assert status == 0 and "decoder transformers: model type gemma3 is none of llama" in err
    status, out, err = run("eval", "packed", "--text", "text", "--json")
    assert status == 0 and json.loads(out)["length"] == 64, err  # the context of the text model
    status, out, err = run("recover", "packed", "-o", "better", "--calibration", "text", "--length", 32, "--steps", 2,
                           "--batch", 2, "--rank", 4)  # fmt: skip
    assert status == 0 and "the same zeros" in out, err
    old = beside(Path("model"))
    assert all(torch.equal(tensor.float(), old[name].float()) for name, tensor in beside(Path("packed")).items())
    for loader in (AutoModelForCausalLM, AutoModelForImageTextToText):
        assert torch.equal(logits(loader.from_pretrained("packed")), logits(alphaprune.load("packed")))


def test_every_line_of_the_table_is_tried() -> None:
    assert {kind.partition(":")[0] for kind in WHOLES} == set(families.MULTIMODAL)


def test_a_text_model_that_is_not_known_is_named() -> None:
    from transformers import AutoConfig

    config = config_of("llava")
    config.text_config = AutoConfig.for_model("gpt2", n_embd=32, n_layer=2, n_head=4)
    with pytest.raises(ValueError, match=r"'llava' with a text model 'gpt2' is not known here; known: llama, .*gemma3"):
        models.find_family(config, "here")
