"""Permuted channels: the same function, more kept by N:M masks, statistics that follow, runs that resume."""

import json
from itertools import combinations
from pathlib import Path

import pytest
import torch
from conftest import make_model, write_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import alphaprune
from alphaprune import calibrate, checkpoint, permute
from alphaprune.calibrate import InputStat
from alphaprune.cli import main
from alphaprune.mask import keep_mask
from alphaprune.model import Block, open_source
from alphaprune.pattern import NM, Unstructured
from alphaprune.planning import LayerPlan
from alphaprune.pruning import Recipe, prune_blocks
from alphaprune.scores import wanda

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = torch.randint(0, 257, (6, 48), generator=torch.Generator().manual_seed(3))
KINDS = {
    "llama, grouped heads": ("llama", {}),
    "llama, a KV head each": ("llama", {"num_key_value_heads": 4}),
    "llama, one KV head": ("llama", {"num_key_value_heads": 1}),
    "llama, biases everywhere": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3_text", {}),
}


def family(kind: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A model of the shapes of `make_model` whose biases and norms are random, not the initial zeros and ones."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, changes = KINDS[kind]
    plain = make_model().config.to_dict()
    own = ("model_type", "architectures", "dtype", "rope_parameters", *(["head_dim"] if model_type == "qwen2" else []))
    plain = {name: value for name, value in plain.items() if name not in own}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**plain, **changes}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            middle = 1.0 if "norm" in name else 0.0
            parameter.copy_(middle + 0.1 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype).eval()


def planned(model: nn.Module, pattern: str = "2:4"):
    sparsity = None if pattern != "unstructured" else 0.5
    return alphaprune.plan(alphaprune.analyze(model, fit=None), sparsity, allocator="uniform", pattern=pattern)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


def random_inputs(block: Block, seed: int = 0) -> dict[str, InputStat]:
    generator = torch.Generator().manual_seed(seed)
    return {n: InputStat(torch.rand(m.in_features, generator=generator), None, 1) for n, m in block.linears.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", ["2:4", "1:8"])
def test_the_model_computes_what_it_did(kind: str, pattern: str) -> None:
    model = family(kind)
    wanted, plan = logits(model), planned(model, pattern)
    before = {n: p.clone() for n, p in model.named_parameters()}
    for block in open_source(model).blocks():
        permute.block(block, random_inputs(block), plan.layers, model.config)
    torch.testing.assert_close(logits(model), wanted, rtol=1e-10, atol=1e-10)
    changed = {n.removeprefix("model.layers.") for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    moved = ("self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    weights = {f"{b}.{n}.weight" for b in range(3) for n in moved}
    biased = {f"{b}.{n}.bias" for b in range(3) for n in moved[:1] + moved[2:4]}
    assert changed == weights | (biased & {n.removeprefix("model.layers.") for n in before})


def kept(scores: Tensor, pattern: NM) -> float:
    return float(scores.double().unflatten(-1, (-1, pattern.of)).topk(pattern.keep, -1).values.sum())


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_orders_are_permutations_that_never_keep_less(data: st.DataObject) -> None:
    of = data.draw(st.integers(2, 8))
    pattern = NM(data.draw(st.integers(1, of - 1)), of)
    batch, rows, groups = (data.draw(st.integers(1, n)) for n in (3, 9, 7))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 20)))
    scores = torch.rand(batch, rows, groups * of, generator=generator)
    if data.draw(st.booleans()):
        scores = (scores * 3).round()  # ties and zeros
    order = permute.best_order(scores, pattern)
    assert torch.equal(order, permute.best_order(scores, pattern))
    assert torch.equal(order.sort(1).values, torch.arange(groups * of).expand(batch, -1))
    for matrix, columns in zip(scores, order, strict=True):
        assert kept(matrix[:, columns], pattern) >= kept(matrix, pattern)


def test_rows_that_were_not_sampled_have_a_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is best for one row of many seldom is for all: then the order stays."""
    monkeypatch.setattr(permute, "ROWS", 1)
    scores = torch.rand(24, 60, 16, generator=torch.Generator().manual_seed(2))
    order = permute.best_order(scores, NM(2, 4))
    for matrix, columns in zip(scores, order, strict=True):
        assert kept(matrix[:, columns], NM(2, 4)) >= kept(matrix, NM(2, 4))
    stayed = (order == torch.arange(16)).all(1).sum()
    assert 0 < stayed < 24


def optimum(scores: Tensor) -> float:
    """The most that 2:4 can keep of scores [R, 8], over all ways to part eight columns into two groups."""
    parts = [(*a, *(set(range(8)) - set(a))) for a in combinations(range(8), 4) if 0 in a]
    return max(kept(scores[:, list(columns)], NM(2, 4)) for columns in parts)


def test_small_cases_come_near_the_optimum() -> None:
    generator = torch.Generator().manual_seed(1)
    shares, reached = [], 0
    for _ in range(40):
        scores = torch.rand(6, 8, generator=generator) * torch.rand(8, generator=generator).square()
        before, best = kept(scores, NM(2, 4)), optimum(scores)
        found = kept(scores[:, permute.best_order(scores[None], NM(2, 4))[0]], NM(2, 4))
        assert found <= best + 1e-6
        shares.append((found - before) / (best - before) if best > before else 1.0)
        reached += found >= best - 1e-6
    assert sum(shares) / len(shares) > 0.95 and min(shares) >= 0 and reached >= 30


def test_strong_neighbours_are_parted() -> None:
    """Two of every four columns carry everything, four in a row: 2:4 loses half of it, and nothing once they moved."""
    scores = torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0]).repeat(8).expand(1, 5, 64)
    order = permute.best_order(scores, NM(2, 4))[0]
    assert kept(scores[0], NM(2, 4)) == 5 * 16 and kept(scores[0][:, order], NM(2, 4)) == 5 * 32


def heavy_model() -> nn.Module:
    """Channels of very different strength, strong ones beside each other."""
    model = make_model(5, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    generator = torch.Generator().manual_seed(5)
    for layer in model.model.layers:
        for rows in (layer.self_attn.v_proj, layer.mlp.up_proj):
            size = torch.randn(rows.out_features // 4, generator=generator).mul(1.5).exp().repeat_interleave(4)
            rows.weight.data *= size[:, None]
    return model


def layer_error(block: Block, inputs: dict[str, InputStat], name: str) -> float:
    weight, stat = block.linears[name].weight.data, inputs[name]
    mask = keep_mask(wanda(weight, stat.norms), weight.numel() // 2, NM(2, 4))
    return stat.gram.relative_error(weight * mask, weight)


def test_layer_errors_fall_and_statistics_follow_the_channels() -> None:
    model = heavy_model()
    plan, source = planned(model), open_source(model)
    activations = calibrate.first_inputs(source, TOKENS)
    for block in source.blocks():
        inputs = calibrate.statistics(block, activations, "gram")
        held = {n: (s.norms.clone(), s.gram.matrix.clone()) for n, s in inputs.items()}
        moved = [f"{block.name}.self_attn.o_proj", f"{block.name}.mlp.down_proj"]
        before = [layer_error(block, inputs, name) for name in moved]
        found = permute.block(block, inputs, plan.layers, model.config)
        after = [layer_error(block, found, name) for name in moved]
        assert all(new < 0.8 * old for new, old in zip(after, before, strict=True)), (before, after)
        seen = calibrate.statistics(block, activations, "gram")  # of the permuted block, summed anew
        for name, stat in found.items():
            assert torch.equal(inputs[name].norms, held[name][0]) and torch.equal(
                inputs[name].gram.matrix, held[name][1]
            )
            assert (stat is inputs[name]) == (name not in moved)
            torch.testing.assert_close(stat.norms, seen[name].norms, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(stat.gram.matrix, seen[name].gram.matrix, rtol=1e-4, atol=1e-4)
            assert stat.tokens == stat.gram.tokens == TOKENS.numel()
        calibrate.run(block, activations)


def test_only_layers_with_an_nm_mask_are_moved() -> None:
    model = make_model(2)
    block = next(open_source(model).blocks())
    layers = dict(planned(model).layers)
    shape = layers[f"{block.name}.mlp.down_proj"].shape
    layers[f"{block.name}.mlp.down_proj"] = LayerPlan(shape, 7, Unstructured())
    shape = layers[f"{block.name}.self_attn.o_proj"].shape
    layers[f"{block.name}.self_attn.o_proj"] = LayerPlan(shape, 0, NM(4, 4))  # dense
    before = {n: p.clone() for n, p in model.named_parameters()}
    inputs = random_inputs(block)
    assert permute.block(block, inputs, layers, model.config) == inputs
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("options", [{"method": "magnitude"}, {"refit": True}, {"prefix": "dense"}], ids=str)
def test_live_models_are_permuted_and_pruned(options: dict) -> None:
    live = make_model(4)
    tokens = None if options.get("method") else TOKENS
    masks = alphaprune.prune(live, planned(live), tokens=tokens, channel_permute=True, **options)
    plain = make_model(4)
    others = alphaprune.prune(plain, planned(plain), tokens=tokens, **options)
    for name, mask in masks.items():
        weight = live.get_submodule(name).weight
        assert not weight[~mask].any() and (mask.unflatten(1, (-1, 4)).sum(2) == 2).all()
        if name.endswith(("down_proj", "o_proj")) and options.get("method"):
            assert weight.abs().sum() > plain.get_submodule(name).weight.abs().sum()
    assert any(not torch.equal(masks[n], others[n]) for n in masks)


def write(folder: Path, out: Path, stop_after: int | None = None, prefix: str = "pruned"):
    source = open_source(folder)
    plan = planned(folder)

    def run(restore, finish):
        recipe = Recipe("wanda", channel_permute=True, prefix=prefix)
        for count, block in enumerate(prune_blocks(source, plan, recipe, TOKENS, restore=restore, finish=finish)):
            if count == stop_after:
                raise KeyboardInterrupt
            yield block

    return checkpoint.write_pruned(source, out, {"seed": 0}, {"made": "here"}, run)


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Biases of v move with its channels, and must be there again when a run continues."""
    folder = tmp_path_factory.mktemp("models") / "qwen2"
    family("qwen2", dtype=torch.float32).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.mark.parametrize("prefix", ["pruned", "dense"])
@pytest.mark.parametrize("stop_after", [1, 2])
def test_an_interrupted_run_continues_to_identical_bytes(qwen2: Path, tmp_path: Path, stop_after, prefix: str) -> None:
    write(qwen2, tmp_path / "whole", prefix=prefix)
    with pytest.raises(KeyboardInterrupt):
        write(qwen2, tmp_path / "out", stop_after, prefix)
    write(qwen2, tmp_path / "out", prefix=prefix)
    wanted = {f.name: f.read_bytes() for f in (tmp_path / "whole").iterdir()}
    assert {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()} == wanted


def test_packed_directories_equal_their_dense_twin(qwen2: Path, tmp_path: Path) -> None:
    write(qwen2, tmp_path / "out")
    twin = family("qwen2", dtype=torch.float32)
    alphaprune.prune(twin, planned(twin), tokens=TOKENS, channel_permute=True)
    loaded = alphaprune.load(tmp_path / "out")
    torch.testing.assert_close(logits(loaded), logits(twin), rtol=1e-4, atol=1e-4)


def test_through_the_command_line(qwen2: Path, text_file: Path, tmp_path: Path, capsys) -> None:
    options = ["--pattern", "2:4", "--allocator", "uniform", "--calibration", str(text_file), "--samples", "4"]
    for name, more in {"packed": [], "dense": ["--format", "dense"]}.items():
        out = str(tmp_path / name)
        assert main(["prune", str(qwen2), "-o", out, *options, "--channel-permute", *more]) == 0
    assert main(["prune", str(qwen2), "-o", str(tmp_path / "plain"), *options]) == 0
    packed, dense, plain = (alphaprune.load(tmp_path / name) for name in ("packed", "dense", "plain"))
    torch.testing.assert_close(logits(packed), logits(dense), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(dense), logits(plain), rtol=1e-2, atol=1e-2)
    assert json.loads((tmp_path / "packed" / "alphaprune.json").read_text())["channel_permute"] is True
    assert json.loads((tmp_path / "plain" / "alphaprune.json").read_text())["channel_permute"] is False
    capsys.readouterr()
    out = str(tmp_path / "refused")
    for more in (["--sparsity", "0.5"], ["--pattern", "1:48", "--max-sparsity", "1"]):
        assert main(["prune", str(qwen2), "-o", out, "--method", "magnitude", "--channel-permute", *more]) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1 and ("--channel-permute" in error or "multiple of 48" in error)
    assert not list(tmp_path.glob("refused*"))


def test_refusals() -> None:
    model = make_model(2)
    with pytest.raises(ValueError, match="--channel-permute needs an N:M pattern"):
        alphaprune.prune(model, planned(model, "unstructured"), "magnitude", channel_permute=True)
    narrow = make_model(2, head_dim=12, hidden_size=96, intermediate_size=192, num_attention_heads=8)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.o_proj: .* heads of 12 channels .* groups of 8"):
        alphaprune.prune(narrow, planned(narrow, "4:8"), "magnitude", channel_permute=True)
    plan = planned(model)
    block = next(open_source(model).blocks())
    block.linears.pop(f"{block.name}.mlp.gate_proj")
    with pytest.raises(ValueError, match=r"model\.layers\.0: --channel-permute wants the layers .* self_attn\.q_proj,"):
        permute.block(block, {}, plan.layers, model.config)
    block = next(open_source(model).blocks())
    model.config.num_key_value_heads = 4
    with pytest.raises(ValueError, match="v_proj has 48 channels where --channel-permute wants 96"):
        permute.block(block, {}, plan.layers, model.config)
    model.config.model_type = "mixtral"
    with pytest.raises(ValueError, match=r"knows the blocks of llama, mistral, qwen2, qwen3, gemma.* not of 'mixtral'"):
        permute.check(model.config, "a model", plan.layers)
