"""What is known of layers' inputs: against float64 sums over whole-model passes, shared where inputs are shared."""

import pytest
import torch
from conftest import make_model
from torch import Tensor, nn

import alphaprune
from alphaprune import calibrate
from alphaprune.gram import Gram
from alphaprune.model import open_source
from alphaprune.pruning import Recipe, prune_blocks

TOKENS = torch.randint(0, 257, (5, 32), generator=torch.Generator().manual_seed(3))


def whole_model_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Inputs of every prunable layer, [tokens, K] float64, from one pass of the whole model."""
    found: dict[str, Tensor] = {}
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith("model.layers")}

    def catch(name: str):
        return lambda module, arguments: found.update({name: arguments[0].detach().flatten(0, -2).double()})

    hooks = [module.register_forward_pre_hook(catch(name)) for name, module in layers.items()]
    with torch.no_grad():
        model(TOKENS, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def statistics_of(model: nn.Module, need: str = "gram") -> dict[str, calibrate.InputStat]:
    source = open_source(model)
    activations, found = calibrate.first_inputs(source, TOKENS), {}
    for block in source.blocks():
        found |= calibrate.statistics(block, activations, need)
        calibrate.run(block, activations)
    return found


@pytest.mark.parametrize("at_once", [1, 64, 4096])
def test_moments_are_those_of_the_inputs(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "TOKENS_AT_ONCE", at_once)
    model = make_model(1)
    wanted, found = whole_model_inputs(model), statistics_of(model)
    assert list(found) == list(wanted)
    for name, x in wanted.items():
        moments = x.T @ x / len(TOKENS)
        # float32 inputs of blocks that were run in other batches differ in their last bits
        scale = x.norm(dim=0)[:, None] * x.norm(dim=0)[None, :] / len(TOKENS)
        assert ((found[name].gram.matrix.double() - moments).abs() <= 2e-5 * scale + 1e-12).all(), name
        torch.testing.assert_close(found[name].norms.double().square(), moments.diagonal(), rtol=2e-5, atol=0)
        assert found[name].tokens == found[name].gram.tokens == TOKENS.numel()


def test_layers_of_one_input_share_their_moments() -> None:
    found = statistics_of(make_model(1))
    first = {n.removeprefix("model.layers.0."): s for n, s in found.items() if n.startswith("model.layers.0.")}
    assert first["self_attn.q_proj"].gram is first["self_attn.k_proj"].gram is first["self_attn.v_proj"].gram
    assert first["mlp.gate_proj"].gram is first["mlp.up_proj"].gram
    grams = {id(s.gram) for s in first.values()}
    assert len(first) == 7 and len(grams) == 4


def test_only_what_is_asked_for() -> None:
    model = make_model(1)
    assert statistics_of(model, "nothing") == {}
    assert all(s.gram is None and s.norms.ndim == 1 for s in statistics_of(model, "norms").values())


def test_an_input_that_overflows_names_its_layer() -> None:
    model = make_model(1)
    model.model.layers[1].post_attention_layernorm.weight.data[5] = float("inf")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.gate_proj: its inputs hold NaN or infinity"):
        statistics_of(model)


def test_error_is_that_of_the_outputs() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 7, generator=generator, dtype=torch.float64)
    dense, weight = (torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    gram = Gram((x.T @ x).float(), 40)
    wanted = ((weight - dense) @ x.T).square().sum() / (dense @ x.T).square().sum()
    assert gram.relative_error(weight, dense) == pytest.approx(float(wanted), rel=1e-5)
    assert Gram(torch.zeros(7, 7), 40).relative_error(weight, dense) == 0


def make_plan(model: nn.Module, sparsity: float):
    return alphaprune.plan(alphaprune.analyze(model, fit=None), sparsity, allocator="uniform")


def masks_of(model: nn.Module, recipe: Recipe, **options) -> dict[str, Tensor]:
    blocks = prune_blocks(model, make_plan(model, 0.6), recipe, **options)
    return {name: mask for block in blocks for name, mask in block.masks.items()}


def test_a_dense_prefix_is_the_dense_model() -> None:
    """Statistics of the dense model, given or found behind a dense prefix: the same masks."""
    known = statistics_of(make_model(7), "norms")
    given = masks_of(make_model(7), Recipe("wanda"), statistics=lambda block: {n: known[n] for n in block.linears})
    dense = masks_of(make_model(7), Recipe("wanda", prefix="dense"), tokens=TOKENS)
    pruned = masks_of(make_model(7), Recipe("wanda"), tokens=TOKENS)
    assert all(torch.equal(given[n], dense[n]) for n in dense)
    differ = {n.split(".")[2] for n in dense if not torch.equal(pruned[n], dense[n])}
    assert differ == {"1", "2"}


def test_a_dense_prefix_survives_an_interruption() -> None:
    """Blocks that are restored must be run dense first: their weights are pruned by then."""
    chosen, recipe = make_plan(make_model(7), 0.6), Recipe("wanda", prefix="dense")
    done = {}
    for pruned in prune_blocks(make_model(7), chosen, recipe, TOKENS):
        weights = {n: layer.weight.detach().clone() for n, layer in pruned.block.linears.items()}
        done[pruned.block.index] = (weights, pruned.masks)

    def restore(block):
        if block.index > 1:
            return None
        for name, layer in block.linears.items():
            layer.weight.data = done[block.index][0][name]
        return done[block.index][1]

    again = list(prune_blocks(make_model(7), chosen, recipe, TOKENS, restore=restore))
    assert [b.restored for b in again] == [True, True, False]
    assert all(torch.equal(again[2].masks[n], m) for n, m in done[2][1].items())


def test_recipes_are_checked_before_any_work() -> None:
    model = make_model(2)
    for recipe, sentence in (
        (Recipe("magic"), "no pruner is called 'magic'"),
        (Recipe("wanda", "column"), "wanted 'row' or 'matrix'"),
        (Recipe("wanda", prefix="sparse"), "wanted 'pruned' or 'dense'"),
        (Recipe("magnitude", refit=True), "a refit needs calibration text"),
        (Recipe("wanda"), "method wanda needs calibration text.*or choose --method magnitude"),
    ):
        with pytest.raises(ValueError, match=sentence):
            prune_blocks(model, make_plan(model, 0.5), recipe)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_pruning_on_a_gpu_is_pruning_here() -> None:
    here = masks_of(make_model(7), Recipe("wanda"), tokens=TOKENS)
    there = masks_of(make_model(7), Recipe("wanda", device="cuda"), tokens=TOKENS)
    assert all(m.device.type == "cpu" for m in there.values())
    same = [float((there[n] == here[n]).float().mean()) for n in here]
    assert min(same) > 0.99  # sums in another order change near-ties
