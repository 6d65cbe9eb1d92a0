"""LoRA recovery: the zeros stay, the trained function is the stored one, a killed run ends as if nothing had been."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import family_models
import pytest
import torch
from conftest import make_model, write_tokenizer
from packed import DENSE, logits, sparse_layers, zeros_model
from safetensors.torch import load_file, save_file
from torch import nn

import alphaprune
from alphaprune import SparseLinear, hf, recovery

pytest.importorskip("peft", reason="PEFT is not installed: pip install 'alphaprune[peft]'")
from alphaprune import masked_lora

SMALL = {"hidden_size": 48, "intermediate_size": 80, "head_dim": 12}
FAST = {"rank": 4, "steps": 6, "batch": 4, "learning_rate": 0.01}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    """[12, 24]: a text that can be learned, for every token says which is next."""
    starts = torch.arange(12)[:, None] * 19
    return (starts + 3 * torch.arange(24)) % 257


def small(dtype: torch.dtype = torch.float32) -> nn.Module:
    return zeros_model(**SMALL).to(dtype)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_the_product_and_its_gradients(stored: torch.dtype) -> None:
    """Against autograd through the formula, in float64, where rounding allows it."""
    generator = torch.Generator().manual_seed(3)
    x, w, a, b = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((2, 3, 7), (5, 7), (2, 7), (5, 2)))
    dropped = torch.rand(5, 7, generator=generator) < 0.6
    w = w.to(stored).double().masked_fill(dropped, 0)
    inputs = [t.requires_grad_() for t in (x, a, b)]
    y = masked_lora._Product.apply(x, w, dropped, a, b, 0.7, stored)
    merged = (w + 0.7 * (b @ a) * ~dropped).to(stored).double()
    torch.testing.assert_close(y, x @ merged.t(), rtol=1e-12, atol=1e-12)
    assert torch.equal(masked_lora.update(w, dropped, a, b, 0.7, stored), merged) and not merged[dropped].any()
    merged = w + 0.7 * (b @ a) * ~dropped
    rounded = merged + (merged.to(stored).double() - merged).detach()  # the gradient passes the rounding
    seed = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    wanted = torch.autograd.grad(x @ rounded.t(), inputs, seed)
    for found, reference in zip(torch.autograd.grad(y, inputs, seed), wanted, strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_trains_is_what_is_merged(dtype: torch.dtype) -> None:
    """Bit by bit, also where sums are rounded to a narrower dtype than that of the computation."""
    model = small(dtype)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    masks = recovery.masks_of(model)
    with recovery.computing_in(model, torch.float32) as stored, torch.no_grad():
        assert set(stored.values()) == {dtype}
        layers = masked_lora.attach(model, masks, 4, 8.0, 0, stored)
        for layer in layers.values():
            nn.init.normal_(layer.lora_B[masked_lora.ADAPTER].weight, std=0.1)
        assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())
        trained = logits(model)
        for layer in layers.values():
            layer.merge()
        masked_lora.detach(model, layers)
        assert torch.equal(logits(model), trained)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == dtype
        mask = masks.get(name.removesuffix(".weight"))
        if mask is None:
            assert torch.equal(parameter, before[name])
        else:
            assert not parameter[~mask].any() and (parameter != before[name])[mask].float().mean() > 0.5
    assert not hasattr(model, "peft_config")


def test_the_loss_falls_and_the_zeros_stay(tokens: torch.Tensor) -> None:
    model, before = small(), small()
    masks = recovery.masks_of(model)
    assert masks[DENSE].all() and not all(mask.all() for mask in masks.values())
    model.lm_head.requires_grad_(False)
    steps = []
    losses = alphaprune.recover(model, masks, tokens, progress=steps.append, **FAST | {"steps": 30})
    assert len(losses) == len(steps) == 30 and sum(losses[-5:]) < 0.9 * sum(losses[:5])
    with torch.no_grad():
        first, last = (m(tokens, labels=tokens).loss for m in (before, model))
    assert last < 0.9 * first and not model.training
    for name, mask in masks.items():
        weight = model.get_submodule(name).weight
        assert not weight[~mask].any() and weight.count_nonzero() == mask.sum(), name
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    assert not trains.pop("model.embed_tokens.weight") and all(trains.values())  # tied to the head


def test_packed_layers_come_back_packed_with_the_same_values(tokens: torch.Tensor) -> None:
    dense, packed = small(), alphaprune.sparsify(small(), tokens=None)
    before = {name: layer.packed for name, layer in sparse_layers(packed).items()}
    losses = [alphaprune.recover(m, None, tokens, **FAST) for m in (dense, packed)]
    after = sparse_layers(packed)
    assert losses[0] == losses[1]
    assert after.keys() == before.keys() and len(after) > 10
    for name, layer in after.items():
        assert torch.equal(layer.packed.mask, before[name].mask) and layer.name == name
        assert torch.equal(layer.to_linear().weight, dense.get_submodule(name).weight)


def test_parts_of_a_batch_are_the_batch(tokens: torch.Tensor) -> None:
    whole, parts = small(), small()
    alphaprune.recover(whole, None, tokens, **FAST)
    alphaprune.recover(parts, None, tokens, at_once=3, **FAST)
    torch.testing.assert_close(logits(parts), logits(whole), rtol=1e-2, atol=1e-2)
    other = small()
    alphaprune.recover(other, None, tokens, **FAST | {"seed": 1})
    assert (logits(other) - logits(whole)).abs().max() > 5e-2


def test_every_window_once_per_epoch_and_the_rate() -> None:
    settings = recovery.Settings(steps=40, batch=4, learning_rate=0.5)
    seen = torch.cat([settings.picks(step, 14) for step in range(6)])
    for epoch in seen.split(12):
        assert len(set(epoch.tolist())) == 12 and epoch.max() < 14
    assert not torch.equal(*seen.split(12))
    rates = [settings.rate(step) for step in range(40)]
    assert max(rates) == 0.5 and rates[0] < 0.5 and rates[-1] < 0.03 and min(rates) > 0
    assert torch.equal(settings.picks(2, 14), seen[8:12])


class Stop(Exception):
    pass


def test_a_run_that_stops_goes_on(tokens: torch.Tensor, tmp_path: Path) -> None:
    whole, model, state = small(), small(), tmp_path / "state"
    wanted = alphaprune.recover(whole, None, tokens, **FAST)
    start = logits(model)

    def stop(step: str) -> None:
        stop.steps += 1
        if stop.steps == 4:
            raise Stop

    stop.steps = 0
    with pytest.raises(Stop):
        alphaprune.recover(model, None, tokens, progress=stop, state=state, save_seconds=0, **FAST)
    assert torch.equal(logits(model), start) and not [n for n, _ in model.named_parameters() if "lora" in n]
    steps = []
    losses = alphaprune.recover(model, None, tokens, progress=steps.append, state=state, save_seconds=0, **FAST)
    assert losses == wanted and steps.count("resumed") == 3 and len(steps) == 6
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, whole.get_parameter(name)), name


def test_a_loss_that_is_none_leaves_the_model_as_it_was(tokens: torch.Tensor) -> None:
    model = alphaprune.sparsify(small(), tokens=None)
    wanted = logits(model)
    nan = model.lm_head.weight.detach().clone()
    model.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(ValueError, match="loss of step 1 is nan; try a smaller learning rate"):
        alphaprune.recover(model, None, tokens, **FAST)
    model.lm_head.weight.data = nan
    assert torch.equal(logits(model), wanted) and sparse_layers(model)


@pytest.mark.parametrize("kind", ["opt", "gemma2", "phi3", "falcon", "mixtral"])
def test_other_families(kind: str) -> None:
    """Biases, windows, fused projections, experts: packed layers come back with their zeros, and better."""
    model = family_models.make(kind)
    masks = alphaprune.prune(model, family_models.plan_of(model), "magnitude")
    alphaprune.sparsify(model, masks, tokens=None)
    before = {name: layer.packed for name, layer in sparse_layers(model).items()}
    losses = alphaprune.recover(model, None, family_models.TOKENS, rank=4, steps=12, batch=5, learning_rate=0.02)
    after = sparse_layers(model)
    assert losses[-1] < losses[0] and after.keys() == before.keys() == masks.keys()
    for name, layer in after.items():
        assert torch.equal(layer.packed.mask, before[name].mask)
        assert not torch.equal(layer.packed.weight, before[name].weight), name


BAD = {
    "rank": ({"rank": 49}, r"^model\.layers\.0\.self_attn\.q_proj: rank 49 .*at most 48"),
    "no rank": ({"rank": 0}, "rank 0: wanted a whole number from 1"),
    "rate": ({"learning_rate": -1.0}, "learning_rate -1.0: wanted a number above 0"),
    "batch": ({"batch": 13}, "12 windows of 24 tokens to train on, fewer than a batch of 13"),
    "at once": ({"at_once": 0}, "at_once 0"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_settings(kind: str, tokens: torch.Tensor) -> None:
    changes, sentence = BAD[kind]
    with pytest.raises(ValueError, match=sentence):
        alphaprune.recover(small(), None, tokens, **FAST | changes)


def test_bad_models_and_masks(tokens: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="has a zero, so there is nothing to recover; prune it first"):
        alphaprune.recover(make_model(**SMALL), None, tokens, **FAST)
    with pytest.raises(ValueError, match="tokens: wanted windows of text"):
        alphaprune.recover(small(), **FAST)
    rounded = alphaprune.sparsify(small(), values="int8")
    with pytest.raises(ValueError, match=r"^model\.layers\.0\.self_attn\.q_proj: int8 values do not train"):
        alphaprune.recover(rounded, None, tokens, **FAST)
    name, model = "model.layers.1.mlp.up_proj", small()
    for mask, sentence in (
        (torch.ones(3, 3, dtype=torch.bool), "wanted a mask of bool"),
        (torch.zeros(80, 48, dtype=torch.bool), "drops weights that are not 0"),
    ):
        with pytest.raises(ValueError, match=rf"^{name}: .*{sentence}"):
            alphaprune.recover(model, {name: mask}, tokens, **FAST)
    with pytest.raises(ValueError, match=r"^model\.norm: the mask names a layer"):
        alphaprune.recover(model, {"model.norm": mask}, tokens, **FAST)


def test_without_peft_there_is_one_sentence(run, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery.importlib.util, "find_spec", lambda name: None)
    status, _, err = run("recover", folders["packed"], "-o", "o", "--calibration", folders["text"])
    assert status == 2 and "pip install 'alphaprune[peft]'" in err and len(err.splitlines()) == 1


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> dict[str, Path]:
    """The same pruned bfloat16 model packed, dense with zeros, and with int8 values; the unpruned one; text."""
    folder = tmp_path_factory.mktemp("recovery")
    small(torch.bfloat16).save_pretrained(folder / "zeros")
    alphaprune.save(alphaprune.sparsify(small(torch.bfloat16), tokens=None), folder / "packed")
    alphaprune.save(alphaprune.sparsify(small(torch.bfloat16), values="int8"), folder / "int8")
    make_model(1, torch.bfloat16, **SMALL).save_pretrained(folder / "whole")
    for name in ("zeros", "packed", "int8", "whole"):
        write_tokenizer(folder / name)
    (folder / "text").write_bytes(text_file.read_bytes())
    return {file.name: file for file in folder.iterdir()}


def command(folders: dict[str, Path], model: str, out: str, *more) -> list:
    few = ["--steps", 4, "--batch", 4, "--rank", 4, "--length", 32, "--dtype", "float32", "--windows", 8]
    return ["recover", folders[model], "-o", out, "--calibration", folders["text"], *few, *more]


def test_the_command(run, folders: dict[str, Path], tmp_path: Path) -> None:
    status, out, err = run(*command(folders, "packed", "a", "--dense", folders["whole"], "--json"))
    assert status == 0, err
    found = json.loads(out)
    assert found["loss"]["after"] < found["loss"]["before"] and len(found["training"]) == 4
    won = (found["loss"]["before"] - found["loss"]["after"]) / (found["loss"]["before"] - found["loss"]["dense"])
    assert found["won_back"] == pytest.approx(won)
    before, after = hf.load(folders["packed"], tokens=None), hf.load("a", tokens=None)
    kept = {name: layer.packed.mask for name, layer in sparse_layers(before).items()}
    assert kept.keys() == sparse_layers(after).keys() and len(kept) == found["packed_layers"]
    for name, layer in sparse_layers(after).items():
        assert torch.equal(layer.packed.mask, kept[name]) and layer.packed.dtype == torch.bfloat16
        assert not torch.equal(layer.packed.weight, before.get_submodule(name).packed.weight)
    assert torch.equal(after.model.norm.weight, before.model.norm.weight)
    recipe = json.loads(Path("a", "alphaprune.json").read_text())
    assert recipe["rank"] == 4 and recipe["loss"]["after"] == found["loss"]["after"]
    # Dense with zeros, and written so: the same weights.
    status, out, err = run(*command(folders, "zeros", "b", "--format", "dense"))
    assert status == 0 and "held-out loss" in out and "0 of 21 layers packed" in out, err
    for name, layer in sparse_layers(after).items():
        assert torch.equal(hf.load("b").get_submodule(name).weight, layer.to_linear().weight)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
    assert not list(Path("a").glob("*.part"))


def test_what_is_reported_is_what_was_written(run, folders: dict[str, Path]) -> None:
    text = folders["text"]
    status, out, _ = run(*command(folders, "zeros", "a", "--text", text, "--json"))
    found = json.loads(out)
    evaluated = run("eval", "a", "--text", text, "--length", 32, "--windows", 8, "--dtype", "float32", "--json")
    assert status == 0 and json.loads(evaluated[1])["perplexity"] == pytest.approx(found["after"]["perplexity"], 1e-5)


def test_int8_models_are_refused_unless_they_may_be_rounded_again(run, folders: dict[str, Path]) -> None:
    status, _, err = run(*command(folders, "int8", "o"))
    assert status == 2 and "int8 values" in err and "--values int8" in err and not Path("o").exists()
    status, out, err = run(*command(folders, "int8", "o", "--values", "int8", "--json"))
    assert status == 0, err
    found, again = json.loads(out), hf.load("o", dtype=torch.float32, tokens=None)
    before = sparse_layers(hf.load(folders["int8"], tokens=None))
    assert found["quantization_error"].keys() == before.keys() == sparse_layers(again).keys()
    for name, layer in sparse_layers(again).items():
        assert layer.packed.dtype == torch.int8 and torch.equal(layer.packed.mask, before[name].packed.mask)
    assert isinstance(again.get_submodule(name), SparseLinear) and found["loss"]["after"] < found["loss"]["before"]


@pytest.mark.parametrize(
    ("model", "part", "damaged", "sentence"),
    [
        ("packed", "weight", lambda t: t.fill_(torch.nan), "NaN or infinity"),
        ("packed", "weight_offsets", lambda t: t + 5, "offsets"),
        ("zeros", "weight", lambda t: t.to(torch.float8_e4m3fn), "its weights are float8_e4m3fn"),
    ],
)
def test_damaged_layers_are_named(run, folders: dict[str, Path], model: str, part: str, damaged, sentence: str) -> None:
    name, bad = "model.layers.0.self_attn.q_proj", Path(shutil.copytree(folders[model], "bad"))
    file = next(f for f in bad.glob("*.safetensors") if f"{name}.{part}" in load_file(f))
    tensors = {n: t.clone() for n, t in load_file(file).items()}
    tensors[f"{name}.{part}"] = damaged(tensors[f"{name}.{part}"])
    save_file(tensors, file, {"format": "pt"})
    status, _, err = run(*command({**folders, "bad": bad}, "bad", "o"))
    assert status == 2 and name in err and sentence in err and not Path("o").exists()


@pytest.mark.parametrize("last", ["config.json", "out"])
def test_cut_off_when_only_the_name_is_missing(run, folders: dict[str, Path], last: str, monkeypatch) -> None:
    status, out, err = run(*command(folders, "zeros", "whole", "--json"))
    assert status == 0, err
    replace_file = os.replace

    def cut_off(source, target) -> None:
        replace_file(source, target)
        if Path(target).name == last:
            raise ValueError("cut off")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", cut_off)
        assert run(*command(folders, "zeros", "out"))[0] == 2
    status, again, err = run(*command(folders, "zeros", "out", "--json"))
    assert status == 0, err
    assert json.loads(again)["loss"] == pytest.approx(json.loads(out)["loss"], rel=1e-6)
    found, wanted = ({f.name: f.read_bytes() for f in Path(name).iterdir()} for name in ("out", "whole"))
    assert found == wanted


LINE = {
    "no zeros": ("whole", (), "nothing to recover"),
    "short": ("packed", ("--calibration", "short.txt"), "short.txt: 5 tokens, shorter than one window"),
    "one window": ("packed", ("--calibration", "one.txt"), "one window of 32 tokens only"),
    "short held-out": ("packed", ("--text", "short.txt"), "short.txt: 5 tokens"),
    "batch": ("packed", ("--batch", "100000"), "fewer than a batch of 100000"),
    "rank": ("packed", ("--rank", "49"), "at most 48"),
    "epochs": ("packed", ("--epochs", "-1"), "--epochs -1.0"),
    "both": ("packed", ("--epochs", "1"), "not allowed with"),
    "values": ("packed", ("--values", "int8", "--format", "dense"), "leave out --format dense"),
    "no model": ("text", (), "this is a file"),
    "exists": ("packed", ("-o", "here"), "not empty"),
}


@pytest.mark.parametrize("kind", LINE)
def test_bad_input_is_one_line(run, folders: dict[str, Path], kind: str) -> None:
    Path("short.txt").write_text("short")
    Path("one.txt").write_text("o" * 40)
    Path("here").mkdir()
    Path("here", "file").write_text("")
    model, changes, sentence = LINE[kind]
    arguments = command(folders, model, "o")
    if kind == "epochs":
        arguments = [a for i, a in enumerate(arguments) if "--steps" not in (a, arguments[i - 1])]
    status, out, err = run(*arguments, *changes)
    assert status == 2 and sentence in err and out == "" and "Traceback" not in err
    assert kind == "both" or len(err.strip().splitlines()) == 1
    assert not Path("o").exists()


def test_a_teacher_is_learned_from(run, tokens: torch.Tensor, folders: dict[str, Path]) -> None:
    """KL(teacher ‖ model) against the formula in float64; it falls, and it is 0 where nothing was pruned."""
    model, teacher = small(), make_model(1, **SMALL)
    with torch.no_grad():
        q, p = (m(tokens[:, :-1]).logits.double().log_softmax(-1) for m in (model, teacher))
    wanted = (p.exp() * (p - q)).sum(-1).mean()
    losses = alphaprune.recover(model, None, tokens, teacher=teacher, **FAST | {"batch": 12})
    assert losses[0] == pytest.approx(wanted.item(), rel=1e-4) and losses[-1] < losses[0]
    status, out, err = run(*command(folders, "packed", "o", "--dense", folders["whole"], "--distil", "--json"))
    assert status == 0 and json.loads(out)["training"][0] < json.loads(out)["loss"]["before"], err
    status, _, err = run(*command(folders, "packed", "o2", "--distil"))
    assert status == 2 and "give --dense MODEL" in err


@pytest.mark.slow
def test_killed_and_continued(run, folders: dict[str, Path]) -> None:
    """kill -9 while it trains: the next run ends with the same bytes; one with another setting is refused."""
    more = ("--steps", 60, "--save-seconds", 0)
    line = [sys.executable, "-m", "alphaprune", *map(str, command(folders, "packed", "out", *more))]
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not Path("out.part", recovery.STATE).exists():
        time.sleep(0.01)
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not Path("out").exists() and Path("out.part", recovery.STATE).exists()
    status, _, err = run(*command(folders, "packed", "out", *more, "--learning-rate", 0.1))
    assert status == 2 and "another learning_rate" in err and len(err.strip().splitlines()) == 1
    assert run(*command(folders, "packed", "out", *more))[0] == 0
    assert run(*command(folders, "packed", "whole", *more))[0] == 0
    wanted = {f.name: f.read_bytes() for f in Path("whole").iterdir()}
    assert {f.name: f.read_bytes() for f in Path("out").iterdir()} == wanted
