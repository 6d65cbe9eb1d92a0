"""Every family of the table goes through analysis, pruning, packing, loading and generation, as its dense twin does."""

from pathlib import Path

import pytest
import torch
from family_models import (
    KINDS,
    METHODS,
    TOKENS,
    assert_twins,
    block_by_block,
    logits,
    make,
    plan_of,
    prune_folder,
    skip_older,
)
from transformers import AutoConfig, AutoModelForCausalLM

import alphaprune
from alphaprune import SparseLinear, calibrate, shapes
from alphaprune import model as models
from alphaprune.convert import convert
from alphaprune.families import FAMILIES, GATED, linears_of
from alphaprune.model import LiveSource, open_source
from alphaprune.pruning import Recipe, prune_blocks

EVERYWHERE = ("llama", "mistral", "qwen2", "qwen3")  # that most tests of this package are made with
QUICK = ("gemma2", "gemma3_text", "phi3", "opt:350m", "falcon", "mpt", "mixtral", "qwen2_moe")


@pytest.fixture(autouse=True)
def quiet(one_thread: None) -> None:
    """One thread; matrices are small."""


def through(kind: str, folder: Path, recipe: Recipe, plan=None) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The packed model that comes of a directory of this kind, and the model of transformers with its zeros."""
    skip_older(kind)
    make(kind).save_pretrained(folder / "model")
    plan = plan or plan_of(folder / "model")
    written = prune_folder(folder / "model", folder / "packed", recipe, plan)
    convert(folder / "packed", folder / "dense", packed=False)
    packed = alphaprune.load(folder / "packed")
    own = AutoModelForCausalLM.from_pretrained(folder / "dense", output_loading_info=True)
    assert not own[1]["missing_keys"] and not own[1]["unexpected_keys"]
    assert sum(isinstance(m, SparseLinear) for m in packed.modules()) == written.packed_layers == len(plan.layers)
    return packed, own[0]


@pytest.mark.parametrize("kind", QUICK)
def test_a_family_goes_through_everything(kind: str, tmp_path: Path) -> None:
    make(kind).save_pretrained(tmp_path / "model")
    packed, dense = through(kind, tmp_path, Recipe("wanda"), plan_of(tmp_path / "model", fit="robust"))
    assert_twins(packed, dense)
    dequantized = packed.dequantize()  # as exact as the twin in every weight
    weights = dict(dense.named_parameters())
    for name, own in dequantized.named_parameters():
        if name in weights:
            assert torch.equal(own, weights[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in QUICK])
def test_the_other_kinds_go_through_everything(kind: str, tmp_path: Path) -> None:
    test_a_family_goes_through_everything(kind, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("method", [method for method in METHODS if method != "wanda"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in EVERYWHERE and ":" not in kind])
def test_every_method_prunes_every_family(kind: str, method: str, tmp_path: Path) -> None:
    make(kind).save_pretrained(tmp_path / "model")
    plan = plan_of(tmp_path / "model", 0.5, METHODS[method])
    packed, dense = through(kind, tmp_path, Recipe(method), plan)
    assert_twins(packed, dense)
    found = models.describe(tmp_path / "dense")
    weights = dict(open_source(tmp_path / "dense").skeleton.named_modules())
    assert set(found.shapes) == set(plan.layers) and all(name in weights for name in found.shapes)
    for block in models.blocks(tmp_path / "dense"):
        for name, layer in block.linears.items():
            assert int((layer.weight == 0).sum()) == plan.layers[name].zeros, name


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_one_by_one_are_the_model(kind: str) -> None:
    """Each block is called with what the model calls it with: masks and windows, rotary embeddings, biases."""
    model = make(kind)
    source, hidden, wanted = block_by_block(model)
    last = model.get_submodule(source.prefix.rpartition(".")[0])
    final = next(getattr(last, n) for n in ("norm", "ln_f", "norm_f", "final_layer_norm") if hasattr(last, n))
    hidden = hidden if final is None else final(hidden)
    hidden = last.project_out(hidden) if getattr(last, "project_out", None) is not None else hidden
    torch.testing.assert_close(hidden, wanted[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_says_what_is_there(kind: str) -> None:
    """Every layer of the table exists in some kind, and layers of a group are those that are given one tensor."""
    model = make(kind)
    source = LiveSource(model)
    groups = {frozenset(group) for group in source.family.groups(experts=8)}
    activations = calibrate.first_inputs(source, TOKENS)
    for block in source.blocks():
        found: dict[int, set[str]] = {}
        for name, stat in calibrate.statistics(block, activations).items():
            found.setdefault(id(stat), set()).add(name.removeprefix(f"{block.name}."))
        found = {frozenset(f) for f in found.values()}
        inside = {frozenset(g) for g in groups if all(any(n in f for f in found) for n in g)}
        merged = set().union(*found)
        assert set().union(*inside) == merged  # nothing else is pruned
        for group in inside:  # one tensor may be given to several groups, as in parallel blocks
            assert any(group <= f for f in found), group
        calibrate.run(block, activations)


def test_every_line_of_the_table_is_tried_and_names_what_is_there() -> None:
    assert {kind.partition(":")[0] for kind in KINDS} == set(FAMILIES)
    for name, family in FAMILIES.items():
        models = [LiveSource(make(kind)).skeleton for kind in KINDS if kind.partition(":")[0] == name]
        there = {n for m in models for block in m.get_submodule(family.blocks) for n, _ in block.named_modules()}
        assert {n for group in family.groups(experts=4) for n in group} <= there and set(family.dense) <= there


@pytest.mark.parametrize("kind", ["opt", "gemma3_text", "qwen3_moe"])
def test_a_live_model_is_pruned_as_its_directory_is(kind: str, tmp_path: Path) -> None:
    skip_older(kind)
    make(kind).save_pretrained(tmp_path / "model")
    plan, recipe = plan_of(tmp_path / "model"), Recipe("sparsegpt")
    lazy = {n: m for b in prune_blocks(str(tmp_path / "model"), plan, recipe, TOKENS) for n, m in b.masks.items()}
    live = make(kind)
    masks = alphaprune.prune(live, plan, method="sparsegpt", tokens=TOKENS)
    assert masks.keys() == lazy.keys() and all(torch.equal(masks[n], lazy[n]) for n in masks)
    dense = logits(live)
    packed = alphaprune.sparsify(live, masks)
    assert sum(isinstance(m, SparseLinear) for m in packed.modules()) == len(masks)
    torch.testing.assert_close(logits(packed), dense, rtol=1e-4, atol=1e-4)
    alphaprune.save(packed, tmp_path / "saved")
    assert torch.equal(logits(alphaprune.load(tmp_path / "saved")), logits(packed))


def test_an_unknown_family_says_what_its_modules_are() -> None:
    neox = AutoConfig.for_model("gpt_neox", hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    with pytest.raises(
        ValueError, match=r"'gpt_neox' is not known here.*gpt_neox\.layers, 2 of them, in the first 4"
    ) as e:
        models.family_of(neox, "here")
    assert "attention.query_key_value" in str(e.value) and "alphaprune/families.py" in str(e.value)
    small = AutoConfig.for_model("gpt2", n_embd=32, n_layer=3, n_head=4)
    with pytest.raises(
        ValueError, match=r"transformer\.h, 3 of them, .* no linear layer, and Conv1D, which is not pruned"
    ):
        models.family_of(small, "here")
    with pytest.raises(ValueError, match=r"'t5' is not known here.*To add it"):
        models.family_of(AutoConfig.for_model("t5", num_layers=1), "here")


def test_a_linear_layer_that_the_table_does_not_name_is_refused() -> None:
    model = make("llama")
    model.model.layers[1].mlp.extra = torch.nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.extra: a linear layer .* does not name; add it"):
        models.describe(model)
    block = torch.nn.ModuleDict({"fc1": torch.nn.ModuleDict({"first": torch.nn.Linear(4, 2)})})
    assert list(linears_of("b", block, FAMILIES["opt"])) == ["b.fc1.first"]  # what a layer of the table consists of


def test_resizable_families_have_the_layers_that_are_resized() -> None:
    found = [family for family in FAMILIES.values() if family.resizable]
    assert found and all(family.prunable == GATED and family.experts is None for family in found)
    names = {shapes.QUERY, shapes.KEY, shapes.VALUE, shapes.OUT, shapes.GATE, shapes.UP, shapes.DOWN}
    assert {name for group in GATED for name in group} == names
