"""Experts: separate layers that compute what those of transformers do, known by their own tokens."""

import copy
import logging
from pathlib import Path

import pytest
import torch
from family_models import TOKENS, logits, make, plan_of, prune_folder, skip_older
from torch import nn
from transformers import AutoModelForCausalLM

import alphaprune
from alphaprune import SparseLinear, calibrate
from alphaprune import model as models
from alphaprune.experts import Experts, separate
from alphaprune.families import FAMILIES
from alphaprune.hf import AlphaPruneConfig
from alphaprune.model import LiveSource, open_source
from alphaprune.pruning import Recipe
from alphaprune.shards import Shards

KINDS = ("mixtral", "qwen2_moe", "qwen3_moe")


@pytest.fixture(autouse=True)
def quiet(one_thread: None) -> None:
    """One thread; matrices are small."""


def experts_of(model: nn.Module) -> dict[str, Experts]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Experts)}


@pytest.mark.parametrize("kind", KINDS)
def test_separate_experts_compute_the_same(kind: str) -> None:
    model = make(kind).double()
    model.set_experts_implementation("eager")  # the one that float64 has
    wanted, parts = logits(model), copy.deepcopy(model)
    assert separate(parts, FAMILIES[kind]) and not separate(parts, FAMILIES[kind])  # once
    torch.testing.assert_close(logits(parts), wanted, rtol=1e-12, atol=1e-12)
    found, fused = experts_of(parts), dict(model.named_modules())
    assert len(found) == (2 if kind == "mixtral" else 1)
    for name, module in found.items():
        names = module.names
        for index in range(module.count):
            layers = module.get_submodule(str(index))
            both = torch.cat((layers[names.gate].weight, layers[names.up].weight))
            assert torch.equal(both, fused[name].gate_up_proj[index])
            assert torch.equal(layers[names.down].weight, fused[name].down_proj[index])
            assert layers[names.down].weight.requires_grad


def test_an_index_past_the_last_expert_is_nobodys() -> None:
    model = make("mixtral")
    separate(model, FAMILIES["mixtral"])
    (_, module), *_ = experts_of(model).items()
    x, chosen, share = torch.randn(3, 32), torch.tensor([[0, 4], [4, 4], [2, 1]]), torch.rand(3, 2)
    found = module(x, chosen, share)
    assert torch.equal(found[1], torch.zeros(32))
    torch.testing.assert_close(found[0], share[0, 0] * module.expert(0, x[:1])[0])


def routed(model: nn.Module, path: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What the experts at a path are given for TOKENS: hidden states and the chosen ones."""
    seen = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda module, a: seen.append((a[0], a[1])))
    logits(model, TOKENS)
    hook.remove()
    return seen[0]


def test_an_expert_is_known_by_the_tokens_that_are_routed_to_it() -> None:
    model = make("qwen3_moe")
    source = LiveSource(model)
    (path, module), *_ = experts_of(model).items()
    hidden, chosen = routed(model, path)
    activations = calibrate.first_inputs(source, TOKENS)
    block = next(source.blocks())
    found = calibrate.statistics(block, activations, "gram")
    for index in range(module.count):
        own = hidden[(chosen == index).any(1)].double()
        assert 0 < len(own) < TOKENS.numel()
        stats = [found[f"{path}.{index}.{name}"] for name in ("gate_proj", "up_proj", "down_proj")]
        assert stats[0] is stats[1] and stats[0].tokens == stats[2].tokens == len(own)
        torch.testing.assert_close(stats[0].norms.double().square(), own.square().sum(0) / 5, rtol=1e-5, atol=0)
        torch.testing.assert_close(stats[0].gram.matrix.double(), own.T @ own / 5, rtol=1e-5, atol=1e-5)
        layers = module.get_submodule(str(index)).double()
        inner = module.act_fn(layers["gate_proj"](own)) * layers["up_proj"](own)
        layers.float()
        torch.testing.assert_close(stats[2].norms.double().square(), inner.square().sum(0) / 5, rtol=1e-4, atol=1e-6)


def test_an_expert_without_tokens_is_named_and_known_by_all_tokens(caplog: pytest.LogCaptureFixture) -> None:
    model, few = make("qwen3_moe"), TOKENS[:1, :3]
    source = LiveSource(model)
    (path, module), *_ = experts_of(model).items()
    activations = calibrate.first_inputs(source, few)
    seen = []
    hook = module.register_forward_pre_hook(lambda module, a: seen.append((a[0], a[1])))
    with torch.no_grad():
        model(few)
    hook.remove()
    hidden, chosen = seen[0]
    idle = sorted({*range(module.count)} - {*chosen.flatten().tolist()})
    assert idle  # three tokens, two experts each, that have likes
    block = next(source.blocks())
    with caplog.at_level(logging.WARNING, "alphaprune"):
        found = calibrate.statistics(block, activations, "gram")
    (record,) = caplog.records
    assert f"{path}: no calibration token was routed to {len(idle)} of 6" in record.getMessage()
    assert f"({', '.join(map(str, idle))})" in record.getMessage() and "more calibration text" in record.getMessage()
    for index in idle:
        stat = found[f"{path}.{index}.gate_proj"]
        assert stat.tokens == 3
        torch.testing.assert_close(stat.norms.square(), hidden.square().sum(0), rtol=1e-5, atol=0)
        assert found[f"{path}.{index}.down_proj"].tokens == 3
    for index in {*range(module.count)} - {*idle}:
        assert found[f"{path}.{index}.gate_proj"].tokens == int((chosen == index).sum())
    plan = plan_of(model)
    masks = alphaprune.prune(model, plan, method="sparsegpt", tokens=few)
    assert all(int((~masks[n]).sum()) == p.zeros for n, p in plan.layers.items())


def stored_experts(folder: Path) -> set[str]:
    return {name for name in Shards(folder).names() if "experts" in name}


@pytest.mark.parametrize("kind", KINDS)
def test_files_keep_the_names_of_the_family_and_the_round_trip(kind: str, tmp_path: Path) -> None:
    skip_older(kind)
    make(kind).save_pretrained(tmp_path / "model")
    names = set(Shards(tmp_path / "model").names())
    assert any(n.endswith(".experts.1.w3.weight" if kind == "mixtral" else ".experts.1.up_proj.weight") for n in names)
    plan = plan_of(tmp_path / "model")
    prune_folder(tmp_path / "model", tmp_path / "dense", Recipe("magnitude"), plan, packed=False)
    prune_folder(tmp_path / "model", tmp_path / "packed", Recipe("magnitude"), plan)
    packed = {n for n in Shards(tmp_path / "packed").names() if not n.endswith(("_mask", "_offsets"))}
    assert set(Shards(tmp_path / "dense").names()) == packed == names
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert sum(isinstance(m, SparseLinear) for m in model.modules()) == len(plan.layers)
    model.save_pretrained(tmp_path / "again")
    assert set(Shards(tmp_path / "again").names()) == set(Shards(tmp_path / "packed").names())
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(model))
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")  # transformers' own experts
    assert not experts_of(dense)
    torch.testing.assert_close(logits(dense), logits(model), rtol=1e-4, atol=1e-4)
    expanded = model.dequantize()
    expanded.save_pretrained(tmp_path / "expanded")
    assert set(Shards(tmp_path / "expanded").names()) == names
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "expanded", quantization_config=AlphaPruneConfig())
    assert sum(isinstance(m, SparseLinear) for m in again.modules()) == len(plan.layers)  # packed while it is loaded
    torch.testing.assert_close(logits(again), logits(dense), rtol=1e-4, atol=1e-4)


def test_experts_in_one_tensor_are_read_one_by_one(tmp_path: Path) -> None:
    """As files hold them that were saved in transformers' own layout."""
    skip_older("mixtral")
    make("mixtral").save_pretrained(tmp_path / "model")
    make("mixtral").save_pretrained(tmp_path / "fused", save_original_format=False)
    assert all(len(Shards(tmp_path / "fused").shape(n)) == 3 for n in stored_experts(tmp_path / "fused"))
    usual, fused = models.describe(tmp_path / "model"), models.describe(tmp_path / "fused")
    assert usual.shapes == fused.shapes and usual.fingerprint == fused.fingerprint
    for a, b in zip(models.blocks(tmp_path / "model"), models.blocks(tmp_path / "fused"), strict=True):
        state = b.module.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in a.module.state_dict().items())
    plan = plan_of(tmp_path / "fused")
    prune_folder(tmp_path / "fused", tmp_path / "packed", Recipe("wanda"), plan)
    prune_folder(tmp_path / "model", tmp_path / "same", Recipe("wanda"), plan)
    assert (tmp_path / "packed" / "model-00001-of-00003.safetensors").read_bytes() == (
        tmp_path / "same" / "model-00001-of-00003.safetensors"
    ).read_bytes()
    with pytest.raises(
        ValueError, match=r"experts\.down_proj: holds the matrices of all experts.*alphaprune\.sparsify"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path / "fused", quantization_config=AlphaPruneConfig())
    assert len(models.describe(alphaprune.load(tmp_path / "fused")).shapes) == len(plan.layers)


def test_an_interrupted_run_goes_on_with_the_names_in_files(tmp_path: Path) -> None:
    from alphaprune import checkpoint
    from alphaprune.pruning import prune_blocks

    make("mixtral").save_pretrained(tmp_path / "model")
    plan = plan_of(tmp_path / "model")
    prune_folder(tmp_path / "model", tmp_path / "whole", Recipe("sparsegpt"), plan)
    source = open_source(tmp_path / "model")

    def one(restore, finish):
        yield next(prune_blocks(source, plan, Recipe("sparsegpt"), TOKENS, restore=restore, finish=finish))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.write_pruned(source, tmp_path / "out", {"seed": 0}, {"made": "here"}, one)
    prune_folder(tmp_path / "model", tmp_path / "out", Recipe("sparsegpt"), plan)
    for file in sorted((tmp_path / "whole").iterdir()):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name
