"""Bits, ranks, heads and channels: exact budgets, the best of their kind, and directories that load again."""

import json
from pathlib import Path

import family_models
import pytest
import torch
from compressed import BUDGETS, logits, planned, tokens, with_alphas
from conftest import make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import correlated, gram_of, stat
from torch import nn

import alphaprune
from alphaprune import compressions, evaluate, gram, hf, shapes
from alphaprune import model as models
from alphaprune.compressions import Recipe, layers, parts
from alphaprune.compressions.plans import CompressionPlan
from alphaprune.counts import share_choices
from alphaprune.formats import quantize
from alphaprune.layer import SparseLinear


@pytest.fixture(scope="module")
def analysis() -> alphaprune.Analysis:
    return with_alphas(alphaprune.analyze(make_model(1)))


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_choices_never_exceed_the_budget_and_leave_no_step_that_fits(data) -> None:
    cost = st.lists(st.integers(1, 60), min_size=1, max_size=6, unique=True).map(sorted)
    costs = data.draw(st.lists(cost, min_size=1, max_size=6))
    wanted = [data.draw(st.floats(0, 70)) for _ in costs]
    budget = data.draw(st.integers(0, 300))
    least = sum(c[0] for c in costs)
    if budget < least:
        with pytest.raises(ValueError, match="more than"):
            share_choices(costs, wanted, budget)
        return
    found = share_choices(costs, wanted, budget)
    left = budget - sum(c[i] for c, i in zip(costs, found, strict=True))
    assert left >= 0
    assert all(i + 1 == len(c) or c[i + 1] - c[i] > left for c, i in zip(costs, found, strict=True))


def test_choices_are_what_is_wanted_where_that_is_possible() -> None:
    assert share_choices([range(1, 9)] * 3, [2, 4, 6], 12) == [1, 3, 5]
    assert share_choices([range(1, 9)] * 3, [2.2, 4.5, 5.3], 12) == [1, 4, 4]  # the largest remainder


@pytest.mark.parametrize("method", BUDGETS)
@pytest.mark.parametrize("allocator", ["alpha", "uniform"])
def test_a_plan_keeps_its_budget(analysis, method: str, allocator: str) -> None:
    options = {"epsilon": 0.2, "multiple": 1, "granularity": "matrix"}
    plan = planned(analysis, method, allocator=allocator, **options)
    weights = sum(kept.weights for kept in plan.parts.values())
    source = models.open_source(make_model(1))
    entries = parts.parts_of(source, source.description(), method)
    cost = {name: dict(zip(part.amounts, part.costs, strict=True)) for name, part in entries.items()}
    spent = sum(cost[name][kept.amount] for name, kept in plan.parts.items())
    most = {"bits": 4.5 * weights, "rank": 0.6 * weights, "structured": 0.7 * weights}[method]
    steps = []  # what the next amount of each part would cost
    for name, kept in plan.parts.items():
        higher = [c for amount, c in cost[name].items() if amount > kept.amount]
        steps += [min(higher) - cost[name][kept.amount]] if higher else []
    assert most - min(steps) < spent <= most
    figure = {"bits": spent / weights, "rank": spent / weights, "structured": 1 - spent / weights}[method]
    assert plan.realized == pytest.approx(figure, rel=1e-12)


@pytest.mark.parametrize(("method", "more_in"), [("bits", 0), ("rank", 2), ("structured", 0)])
def test_the_direction_of_alpha(analysis, method: str, more_in: int) -> None:
    """Heavy tails (block 0) keep more bits and channels, and lower ranks; `reverse` is the other way round."""
    for reverse, best in ((None, more_in), (not parts.REVERSED[method], 2 - more_in)):
        budget = 5 if method == "bits" else None
        plan = planned(analysis, method, budget, epsilon=0.25, reverse=reverse, multiple=1)
        name = "mlp" if method == "structured" else "mlp.up_proj"
        kept = [plan.parts[f"model.layers.{block}.{name}"].amount for block in range(3)]
        assert kept[best] == max(kept) > kept[1] > min(kept) == kept[2 - best]


def test_bits_per_block_are_one_number_in_each(analysis) -> None:
    plan = planned(analysis, "bits", 13 / 3, epsilon=0.3)
    found = {}
    for name, kept in plan.parts.items():
        found.setdefault(name.split(".")[2], set()).add(kept.amount)
    assert all(len(bits) == 1 for bits in found.values()) and plan.realized == pytest.approx(13 / 3)
    assert planned(analysis, "bits", 6, choices=(4, 8)).realized == pytest.approx(16 / 3)  # one block of three at 8
    assert planned(analysis, "bits", 8).realized == 8


def test_heads_stay_unless_asked_for(analysis) -> None:
    source = models.open_source(make_model(1))
    for which, stays in (("channels", "self_attn"), ("heads", "mlp")):
        options = {} if which == "channels" else {"which": which}
        plan = compressions.plan(source, analysis, "structured", 0.15, **options)
        whole = {name.rpartition(".")[2] for name, kept in plan.parts.items() if kept.amount == kept.of}
        assert stays in whole and all(k.amount == k.of for n, k in plan.parts.items() if n.endswith(stays))
        assert plan.realized == pytest.approx(0.15, abs=0.06) and plan.realized >= 0.15


def test_a_plan_survives_its_file_and_is_refused_for_another_model(analysis, tmp_path: Path) -> None:
    for method in BUDGETS:
        plan = planned(analysis, method)
        plan.save(tmp_path / "plan.json")
        assert CompressionPlan.load(tmp_path / "plan.json") == plan
        with pytest.raises(ValueError, match="another model"):
            parts.check(plan, models.open_source(make_model(2)))
        with pytest.raises(ValueError, match="plan again"):
            parts.check(plan, models.open_source(make_model(1, intermediate_size=208)))
    broken = json.loads((tmp_path / "plan.json").read_text())
    broken["parts"]["model.layers.1.mlp"]["amount"] = 0
    (tmp_path / "plan.json").write_text(json.dumps(broken))
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp: wanted amount"):
        CompressionPlan.load(tmp_path / "plan.json")


@pytest.mark.parametrize("bits", quantize.BITS)
@pytest.mark.parametrize("group", [None, 128])
def test_rounding_to_bits(bits: int, group: int | None) -> None:
    weight = 0.02 * torch.randn(37, 300, generator=torch.Generator().manual_seed(bits))
    weight[3] = 0
    found = quantize.quantize(weight, None, group, bits)
    top = 2 ** (bits - 1) - 1
    assert found.integers.abs().max() == top and not found.integers[3].any()
    dense = quantize.dequantize(found.integers, found.scale)
    assert (dense - weight).norm() / weight.norm() == pytest.approx(found.error.relative, rel=1e-4)
    wide = found.scale[:, None] if group is None else found.scale.repeat_interleave(128, 1)[:, :300]
    inside = weight.abs() <= top * wide
    assert ((dense - weight).abs()[inside] <= 0.5001 * wide.expand_as(weight)[inside]).all()
    unclipped = (weight.double() / (weight.abs().amax(1, keepdim=True) / top)).round() if group is None else None
    if unclipped is not None:  # of all scales that were tried, the largest weight's is one
        plain = unclipped.nan_to_num() * weight.abs().amax(1, keepdim=True) / top
        assert (dense - weight).norm() <= (plain - weight).norm() * 1.0001


def test_scales_are_chosen_by_what_columns_matter() -> None:
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
    importance = torch.logspace(3, -3, 128)
    errors = []
    for given_importance in (None, importance):
        found = quantize.quantize(weight, None, None, 3, given_importance)
        off = quantize.dequantize(found.integers, found.scale) - weight
        errors.append((off.square() * importance).sum())
    assert errors[1] < errors[0]


def test_a_layer_of_low_rank_is_the_best_of_its_rank() -> None:
    x = correlated(400, 48, 1)
    layer = nn.Linear(48, 32)
    known = gram_of(x)
    plain, whitened = layers.factor_layer(layer, 10), layers.factor_layer(layer, 10, known)
    weight = layer.weight.detach()
    sizes = torch.linalg.svdvals(weight.double())
    best = sizes[10:].square().sum().sqrt()
    assert (plain.to_linear().weight - weight).norm() == pytest.approx(float(best), rel=1e-4)
    root = known.factor().matrix.double()
    best = torch.linalg.svdvals(weight.double() @ root)[10:].square().sum().sqrt()
    assert ((whitened.to_linear().weight - weight).double() @ root).norm() == pytest.approx(float(best), rel=1e-4)
    assert known.error(whitened.to_linear().weight - weight) < known.error(plain.to_linear().weight - weight)
    y = torch.randn(3, 5, 48)
    torch.testing.assert_close(plain(y), plain.to_linear()(y), rtol=1e-4, atol=1e-5)


def test_columns_are_refitted_to_the_least_squares_solution() -> None:
    x, weight = correlated(300, 40, 2), torch.randn(16, 40, generator=torch.Generator().manual_seed(2))
    kept = torch.tensor([0, 3, 4, 9, 20, 21, 22, 38])
    known = gram_of(x)
    new = layers.refit_columns(weight, kept, known)
    inner = known.matrix.double()[kept][:, kept]
    damped = inner + gram.DAMPING * inner.diagonal().mean() * torch.eye(8, dtype=torch.float64)
    rest = [i for i in range(40) if i not in kept.tolist()]
    wanted = (
        weight[:, kept].double() + weight[:, rest].double() @ known.matrix.double()[rest][:, kept] @ damped.inverse()
    )
    torch.testing.assert_close(new.double(), wanted, rtol=1e-3, atol=1e-4)
    full = torch.zeros_like(weight).index_copy(1, kept, new)
    plain = torch.zeros_like(weight).index_copy(1, kept, weight[:, kept])
    assert known.error(full - weight) < known.error(plain - weight)


def test_the_lowest_channels_go() -> None:
    model = make_model(3)
    block = next(models.open_source(model).blocks())
    inputs = {name: stat(gram_of(correlated(60, layer.in_features, 4))) for name, layer in block.linears.items()}
    down, out = (block.linears[f"{block.name}.{name}"].weight.clone() for name in (shapes.DOWN, shapes.OUT))
    layers.remove(block, model.config, 1, 120, inputs, "wanda", refit=False, narrow=True)
    scores = down.norm(dim=0) * inputs[f"{block.name}.{shapes.DOWN}"].norms
    kept = scores.argsort(descending=True)[:120].sort().values
    torch.testing.assert_close(block.module.mlp.down_proj.weight, down[:, kept])
    head = (out.norm(dim=0) * inputs[f"{block.name}.{shapes.OUT}"].norms).view(2, -1).norm(dim=1).argmax()
    torch.testing.assert_close(block.module.self_attn.o_proj.weight, out.view(96, 2, -1)[:, head])
    assert block.module.self_attn.k_proj.weight.shape == (24, 96)


@pytest.mark.parametrize("method", BUDGETS)
@pytest.mark.parametrize("calibrated", [False, True])
def test_a_live_model_and_its_directory_are_one(analysis, method: str, calibrated: bool, tmp_path: Path) -> None:
    """Compressed in memory, saved and loaded: the same outputs; really smaller; dense format computes the same."""
    plan = planned(analysis, method, epsilon=0.2)
    text, dense = tokens() if calibrated else None, make_model(1)
    options = {"refit": True} if calibrated and method == "structured" else {}
    live = alphaprune.compress(make_model(1), plan, text, **options)
    twin = alphaprune.compress(make_model(1), plan, text, packed=False, **options)
    torch.testing.assert_close(logits(live), logits(twin), rtol=2e-3, atol=2e-3)
    written = alphaprune.save(live, tmp_path / "small")
    loaded = alphaprune.load(tmp_path / "small")
    torch.testing.assert_close(logits(loaded), logits(live), rtol=1e-5, atol=1e-5)
    files = sum(file.stat().st_size for file in (tmp_path / "small").glob("*.safetensors"))
    whole = 4 * sum(p.numel() for p in dense.parameters())
    inside = 4 * sum(kept.weights for kept in plan.parts.values())
    gone = {"bits": 0.5, "rank": 0.39, "structured": 0.29}[method] * inside
    assert files < whole - gone + 30_000 and written.layers
    kinds = {type(module) for module in loaded.model.layers.modules()}
    assert (SparseLinear in kinds) == (method == "bits") and (shapes.LowRankLinear in kinds) == (method == "rank")
    before, after = (evaluate.window_losses(m, tokens(8, 3)).mean() for m in (dense, loaded))
    assert torch.isfinite(after) and abs(after - before) < 3


@pytest.mark.parametrize(
    ("kind", "method"),
    [(kind, method) for kind in ("phi3", "opt:350m", "mixtral") for method in ("bits", "rank")]
    + [(kind, "structured") for kind in ("qwen2", "qwen3", "gemma2", "gemma3_text")],
)
def test_other_families(kind: str, method: str, tmp_path: Path, one_thread) -> None:
    """Fused layers, biases, experts; heads with norms and windows: a directory is what the live model is."""
    family_models.make(kind).save_pretrained(tmp_path / "model")
    source = models.open_source(tmp_path / "model")
    plan = compressions.plan(source, alphaprune.analyze(source), method, BUDGETS[method], multiple=1, which="both")
    text = family_models.TOKENS
    live = alphaprune.compress(alphaprune.load(tmp_path / "model"), plan, text)
    zeros = alphaprune.compress(alphaprune.load(tmp_path / "model"), plan, text, packed=False)
    written = compressions.write(source, tmp_path / "out", plan, Recipe(calibrated=True), {}, {}, text)
    loaded = alphaprune.load(tmp_path / "out")
    wanted = family_models.logits(live)
    torch.testing.assert_close(family_models.logits(loaded), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(family_models.logits(zeros), wanted, rtol=2e-3, atol=2e-3)
    share = written.stored_bytes / written.dense_bytes
    assert 0.3 < share < {"bits": 0.4, "rank": 0.61, "structured": 0.71}[method]


@pytest.mark.parametrize("kind", ["phi3", "opt", "mixtral"])
def test_families_whose_channels_are_not_known(kind: str, one_thread) -> None:
    source = models.open_source(family_models.make(kind))
    stats = alphaprune.analyze(source)
    with pytest.raises(ValueError, match="heads and channels can be removed from llama"):
        compressions.plan(source, stats, "structured", 0.3)


@pytest.fixture(scope="module")
def folders(analysis, tmp_path_factory) -> dict[str, Path]:
    """A directory of each method."""
    folder, found = tmp_path_factory.mktemp("compressed"), {}
    for method in BUDGETS:
        live = alphaprune.compress(make_model(1), planned(analysis, method, epsilon=0.2))
        alphaprune.save(live, folder / method)
        found[method] = folder / method
    return found


@pytest.mark.parametrize("method", ["rank", "structured"])
def test_compressed_directories_go_on_through_the_package(folders, method: str, tmp_path: Path) -> None:
    """Read block by block, analyzed, pruned and packed; the packed one keeps its shapes, and generates."""
    found = alphaprune.analyze(folders[method])
    assert found.layers.keys() == models.describe(folders[method]).shapes.keys()
    pruned = alphaprune.load(folders[method])
    masks = alphaprune.prune(pruned, alphaprune.plan(found, 0.6, "uniform"), method="magnitude")
    alphaprune.save(alphaprune.sparsify(pruned, masks), tmp_path / "sparse")
    again = alphaprune.load(tmp_path / "sparse")
    assert any(isinstance(module, SparseLinear) for module in again.modules())
    torch.testing.assert_close(logits(again), logits(pruned), rtol=1e-4, atol=1e-4)
    expanded = again.dequantize()
    torch.testing.assert_close(logits(expanded), logits(pruned), rtol=1e-3, atol=1e-3)
    assert not any(isinstance(m, SparseLinear | shapes.LowRankLinear) for m in expanded.modules())
    new = again.generate(tokens(1)[:, :4], max_new_tokens=4, do_sample=False)
    assert new.shape == (1, 8)


def test_from_pretrained_loads_them_too(folders) -> None:
    from transformers import AutoModel, AutoModelForCausalLM

    for folder in folders.values():
        ours, theirs = hf.load(folder), AutoModelForCausalLM.from_pretrained(folder)
        torch.testing.assert_close(logits(ours), logits(theirs))
        bare = AutoModel.from_pretrained(folder)
        assert sum(p.numel() for p in bare.parameters()) == sum(p.numel() for p in theirs.model.parameters())


def test_the_lean_decoder_and_its_refusal(folders, analysis) -> None:
    from alphaprune.decoder import Decoder, why_not

    low = hf.load(folders["rank"])
    channels = alphaprune.compress(make_model(1), planned(analysis, "structured", 0.2, which="channels"))
    for model in (low, channels):
        decoder = Decoder(model)
        ids = tokens(1, 5)[:, :7]
        with torch.inference_mode():
            wanted = model(input_ids=ids).logits[:, -1]
        torch.testing.assert_close(decoder.prefill(decoder.state(1, 8), ids), wanted, rtol=1e-3, atol=1e-3)
        for call, width in decoder.products():
            call(torch.zeros(1, width))
    mixed = hf.load(folders["structured"])
    assert mixed.model.layers[0].self_attn.k_proj.out_features in (24, 48)
    assert "different numbers of heads" in why_not(mixed.config, mixed)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"kv_heads": [1, 1]}, "2 kv_heads for 3 blocks"),
        ({"kv_heads": [1, 0, 1]}, "wanted a size from 1"),
        ({"channels": [900, 1, 1]}, "900 channels, config.json has 200"),
        ({"ranks": {"model.layers.0.mlp.nothing": 3}}, "is no linear layer"),
        ({"ranks": {"model.layers.0.mlp.up_proj": 300}}, "rank 300 is more than"),
        ({"channels": [96, 96, 96]}, "one of them belongs to another model"),
        ({"sizes": 3}, "no setting is called sizes"),
    ],
)
def test_settings_that_do_not_fit(folders, change: dict, sentence: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folders["structured"].iterdir():
        (copy / file.name).symlink_to(file)
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] |= change
    (copy / "config.json").unlink()
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=sentence):
        alphaprune.load(copy)
    if "sizes" not in change:
        with pytest.raises(ValueError):
            models.open_source(copy)


def test_what_cannot_be_asked_for(analysis) -> None:
    source = models.open_source(make_model(1))
    for method, budget, options, sentence in (
        ("bits", 1.5, {}, "mean from 2 to 8"),
        ("bits", 4, {"choices": (1, 4)}, "wanted some of the bits"),
        ("rank", 1.0, {}, "share between 0 and 1"),
        ("rank", 0.01, {}, "can"),
        ("structured", 0.97, {}, "can"),
        ("structured", 0.3, {"which": "layers"}, "both, heads, channels"),
        ("structured", 0.3, {"multiple": 0}, "whole number from 1"),
        ("structured", 0.3, {"allocator": "owl"}, "--calibration"),
        ("structured", 0.3, {"epsilon": 1.5}, "epsilon"),
    ):
        with pytest.raises(ValueError, match=sentence):
            compressions.plan(source, analysis, method, budget, **options)
    plan = planned(analysis, "rank")
    for options, sentence in (({"refit": True}, "removed channels"), ({"calibrated": True}, "calibration text")):
        with pytest.raises(ValueError, match=sentence):
            alphaprune.compress(make_model(1), plan, **options)
    low = alphaprune.compress(make_model(1), plan)
    with pytest.raises(ValueError, match="low rank already"):
        compressions.plan(models.open_source(low), alphaprune.analyze(low), "rank", 0.5)
