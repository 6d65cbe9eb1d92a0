"""Masks against the published rules, exact counts, the pruned prefix, patterns, and refusals."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_model, write_tokenizer
from torch import Tensor, nn

import alphaprune
from alphaprune import calibrate, pruners
from alphaprune.mask import keep_mask
from alphaprune.model import open_source
from alphaprune.pattern import NM
from alphaprune.pruning import Recipe, prune_blocks
from alphaprune.scores import wanda

TOKENS = torch.randint(0, 257, (5, 32), generator=torch.Generator().manual_seed(3))


def make_plan(model, sparsity: float, **options):
    return alphaprune.plan(alphaprune.analyze(model, fit=None), sparsity, allocator="uniform", **options)


def published_wanda(model: nn.Module, tokens: Tensor, sparsity: float) -> dict[str, Tensor]:
    """Masks by the published rule, written down directly: hooks on whole-model passes, one sample at a time.

    Statistics of a block come from its dense weights behind the pruned prefix; per row, the int(K·s) smallest
    |W|·sqrt(running mean of squared norms) by a stable sort go (locuslab/wanda, lib/prune.py and layerwrapper.py).
    """
    masks = {}
    for index, block in enumerate(model.model.layers):
        layers = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
        scaler = {n: torch.zeros(m.in_features) for n, m in layers.items()}
        seen = dict.fromkeys(layers, 0)

        def observe(name: str, scaler=scaler, seen=seen):
            def hook(module: nn.Module, arguments: tuple) -> None:
                x = arguments[0].reshape(-1, arguments[0].shape[-1]).t().float()  # [K, tokens]
                scaler[name] *= seen[name] / (seen[name] + 1)
                seen[name] += 1
                scaler[name] += torch.norm(x, p=2, dim=1) ** 2 / seen[name]

            return hook

        handles = [m.register_forward_pre_hook(observe(n)) for n, m in layers.items()]
        with torch.no_grad():
            for sample in tokens:
                model(sample[None], use_cache=False)
        for handle in handles:
            handle.remove()
        for name, layer in layers.items():
            metric = layer.weight.data.abs() * torch.sqrt(scaler[name].reshape(1, -1))
            order = torch.sort(metric, dim=-1, stable=True)[1]
            gone = order[:, : int(metric.shape[1] * sparsity)]
            keep = torch.ones_like(metric, dtype=torch.bool).scatter_(1, gone, False)
            layer.weight.data[~keep] = 0
            masks[f"model.layers.{index}.{name}"] = keep
    return masks


@pytest.mark.parametrize("sparsity", [0.5, 0.75])
def test_wanda_masks_equal_the_published_rule(sparsity: float) -> None:
    changes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}  # K·s is an integer everywhere
    wanted = published_wanda(make_model(7, **changes), TOKENS, sparsity)
    live = make_model(7, **changes)
    masks = alphaprune.prune(live, make_plan(live, sparsity), method="wanda", tokens=TOKENS)
    assert list(masks) == list(wanted)
    assert [n for n in wanted if not torch.equal(masks[n], wanted[n])] == []


def test_the_prefix_is_pruned_when_a_block_is_calibrated() -> None:
    """Behind a dense prefix the masks of later blocks are others, so the test above can fail."""
    live = make_model(7)
    chosen = make_plan(live, 0.75)
    masks = alphaprune.prune(live, chosen, method="wanda", tokens=TOKENS)
    dense = open_source(make_model(7))
    activations = calibrate.first_inputs(dense, TOKENS)
    equal: dict[int, bool] = {}
    for block in dense.blocks():
        norms = calibrate.statistics(block, activations)
        for name, layer in block.linears.items():
            scores = wanda(layer.weight.data, norms[name].norms)
            mask = keep_mask(scores, chosen.layers[name].zeros, chosen.layers[name].pattern, "row")
            equal[block.index] = equal.get(block.index, True) and torch.equal(mask, masks[name])
        calibrate.run(block, activations)
    assert equal == {0: True, 1: False, 2: False}


CHANGING = {"sparsegpt", "alps"}  # methods that make up for what goes by changing what stays


@pytest.mark.parametrize("method", pruners.MEMBERS)
@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.7, 0.95])
def test_every_pruner_hits_its_counts_and_keeps_the_other_weights(method: str, sparsity: float) -> None:
    live, before = make_model(2), make_model(2)
    chosen = make_plan(live, sparsity)
    masks = alphaprune.prune(live, chosen, method=method, tokens=TOKENS)
    for name, mask in masks.items():
        assert int((~mask).sum()) == chosen.layers[name].zeros
        was, now = before.get_submodule(name).weight, live.get_submodule(name).weight
        assert not now[~mask].any()
        assert torch.equal(now[mask], was[mask]) == (method not in CHANGING or mask.all())
    total = sum(m.numel() for m in masks.values())
    assert sum(int((~m).sum()) for m in masks.values()) == round(sparsity * total)


@pytest.mark.parametrize("method", pruners.MEMBERS)
def test_patterns_along_k(method: str) -> None:
    live = make_model(2)
    chosen = make_plan(live, None, pattern="2:4")
    masks = alphaprune.prune(live, chosen, method=method, tokens=TOKENS)
    assert all(p.pattern == NM(2, 4) for p in chosen.layers.values())
    assert all((m.reshape(m.shape[0], -1, 4).sum(-1) == 2).all() for m in masks.values())


def test_live_and_lazy_pruning_agree_and_repeat(directory: Path) -> None:
    live = make_model(1)
    chosen = make_plan(live, 0.6)
    masks = alphaprune.prune(live, chosen, method="wanda", tokens=TOKENS)
    for _ in range(2):
        lazy = {n: m for b in prune_blocks(directory, chosen, Recipe("wanda"), TOKENS) for n, m in b.masks.items()}
        assert list(lazy) == list(masks) and all(torch.equal(lazy[n], masks[n]) for n in masks)


def test_selection_by_row_or_matrix() -> None:
    chosen = make_plan(make_model(2), 0.5)
    rows = alphaprune.prune(make_model(2), chosen, method="magnitude", selection="row")
    whole = alphaprune.prune(make_model(2), chosen, method="magnitude")
    for name, mask in rows.items():
        assert len(set((~mask).sum(1).tolist())) <= 2
        assert len(set((~whole[name]).sum(1).tolist())) > 2
    with pytest.raises(ValueError, match="wanted 'row' or 'matrix'"):
        alphaprune.prune(make_model(2), chosen, method="magnitude", selection="column")


def test_refusals() -> None:
    live = make_model(2)
    chosen = make_plan(live, 0.5)
    with pytest.raises(ValueError, match="needs calibration text"):
        alphaprune.prune(live, chosen, method="wanda")
    with pytest.raises(ValueError, match="no pruner is called 'magic'"):
        alphaprune.prune(live, chosen, method="magic")
    with pytest.raises(ValueError, match="another model"):
        alphaprune.prune(make_model(3), chosen, method="magnitude")
    live.model.layers[1].self_attn.k_proj.weight.data[3, 5] = float("inf")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.k_proj: the weights hold NaN or infinity"):
        alphaprune.prune(live, chosen, method="magnitude")
    with pytest.raises(ValueError, match=r"wanted \[samples, length\]"):
        alphaprune.prune(make_model(2), chosen, method="wanda", tokens=TOKENS[0])


def test_norms_are_those_of_the_inputs(directory: Path) -> None:
    """Against float64 sums over whole-model passes; the batch of samples must not matter."""
    live = make_model(1)
    caught: list[Tensor] = []
    hook = live.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda m, a: caught.append(a[0].double()))
    with torch.no_grad():
        live(TOKENS, use_cache=False)
    hook.remove()
    wanted = (caught[0].square().sum((0, 1)) / len(TOKENS)).sqrt()
    source = open_source(directory)
    activations = calibrate.first_inputs(source, TOKENS)
    assert all(p.is_meta for p in source.skeleton.parameters())  # embeddings were dropped again
    found = calibrate.statistics(next(source.blocks()), activations)
    torch.testing.assert_close(found["model.layers.0.mlp.down_proj"].norms.double(), wanted, rtol=1e-5, atol=0)


def test_prune_keeps_what_its_analysis_found(
    run, directory: Path, text_file: Path, tmp_path: Path, monkeypatch
) -> None:
    """Of an interrupted run with the same text; another text is read again."""
    from alphaprune import activity, pruning, weight_stats

    def stopped(*_, **__):
        raise KeyboardInterrupt

    def command(out: str, seed: int) -> tuple:
        text = ("--calibration", text_file, "--samples", 2, "--length", 16, "--seed", seed)
        return run("prune", directory, "-o", out, "--sparsity", 0.5, "--allocator", "owl", *text)

    assert command("whole", 1)[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(pruning, "prune_blocks", stopped)
        assert command("new/out", 1)[0] == 130
    kept = tmp_path / "new" / "out.part" / "analysis.started-0"
    assert len(kept.read_text().splitlines()) > 1
    with monkeypatch.context() as patch:
        patch.setattr(activity, "columns", stopped)
        patch.setattr(weight_stats, "_spectral", stopped)
        assert command("new/out", 2)[0] == 130
    with monkeypatch.context() as patch:
        patch.setattr(pruning, "prune_blocks", stopped)
        command("new/out", 1)
    with monkeypatch.context() as patch:
        patch.setattr(activity, "columns", stopped)
        assert command("new/out", 1)[0] == 0
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["out"]
    wanted = {f.name: f.read_bytes() for f in (tmp_path / "whole").iterdir()}
    assert {f.name: f.read_bytes() for f in (tmp_path / "new" / "out").iterdir()} == wanted


MEASURED = """
import sys
from pathlib import Path
from alphaprune.cli import main

def peak():
    return 1024 * int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])

folder, text = Path(sys.argv[1]), ["--calibration", sys.argv[2], "--samples", "4", "--length", "64", "--memory", "0"]
prune = [["--method", "magnitude"], text, [*text, "--method", "sparsegpt"]]
grown = []
for model in ("small", "large"):  # the first one for imports
    for index, options in enumerate(prune):
        before = peak()
        out = ["-o", str(folder / f"{model}-{index}"), "--sparsity", "0.6", "--allocator", "uniform"]
        assert main(["prune", str(folder / model), *out, *options]) == 0
        grown.append(peak() - before)
print(max(grown[len(prune):]))
"""


@pytest.mark.slow
def test_never_the_whole_model_in_memory(tmp_path: Path, text_file: Path) -> None:
    """The peak of a process grows by a few blocks of sixteen, with hidden states in a file."""
    changes = {"hidden_size": 512, "intermediate_size": 1536, "head_dim": 64}
    changes |= {"num_attention_heads": 8, "num_key_value_heads": 8}
    model = make_model(3, num_hidden_layers=16, **changes)
    size = sum(p.nbytes for p in model.model.layers.parameters())
    model.save_pretrained(tmp_path / "large", max_shard_size="50MB")
    del model
    make_model(3, num_hidden_layers=1, **changes).save_pretrained(tmp_path / "small")
    for name in ("small", "large"):
        write_tokenizer(tmp_path / name)
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}  # freed is given back
    command = [sys.executable, "-c", MEASURED, str(tmp_path), str(text_file)]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout
    assert int(found.splitlines()[-1]) < 3 / 16 * size, (found, size)
