"""The families under the commands: info, generate, convert, serve; each runs or is refused in a sentence."""

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, write_tokenizer
from family_models import KINDS, NOT_SERVED, PROMPT, TOKENS, WHOLES, make, plan_of

import alphaprune
from alphaprune import data, decoder, generate
from alphaprune.families import FAMILIES, MULTIMODAL

sys.path.insert(0, str(ROOT / "bench"))
import families as page


@pytest.fixture(autouse=True)
def quiet(one_thread: None) -> None:
    """One thread; matrices are small."""


def packed(kind: str, folder: Path) -> torch.nn.Module:
    """A packed model of this kind, with a tokenizer in its folder."""
    model = make(kind)
    model.generation_config.eos_token_id = None
    masks = alphaprune.prune(model, plan_of(model), method="magnitude")
    alphaprune.save(alphaprune.sparsify(model, masks), folder)
    write_tokenizer(folder)
    return alphaprune.load(folder)


@pytest.mark.slow
def test_commands_on_a_model_with_experts(run, tmp_path: Path) -> None:
    make("mixtral").save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    (tmp_path / "text.txt").write_text("a heavy tail, and so on. " * 40)
    given = ("--calibration", "text.txt", "--samples", 4, "--length", 32, "--sparsity", 0.6, "--allocator", "uniform")
    status, out, err = run("prune", "model", "-o", "packed", *given)
    assert status == 0 and "32 of 32 layers packed" in out, err
    status, out, _ = run("info", "packed", "--json")
    rows = {row["name"]: row for row in json.loads(out)["layers"]}
    assert status == 0 and len(rows) == 32
    row = rows["model.layers.1.mlp.experts.3.w2"]
    assert row["shape"] == [32, 72] and row["stored"] == "sbt float32" and row["zeros"] == round(0.6 * 32 * 72)
    status, out, err = run("generate", "packed", "--prompt", "so", "--max-new", 4)
    assert status == 0 and "decoder transformers: model type mixtral is none of llama" in err
    status, out, err = run("convert", "packed", "dense", "--format", "dense")
    assert status == 0, err
    status, out, err = run("prune", "model", "-o", "no", *given, "--channel-permute", "--pattern", "2:4")
    assert status == 2 and not Path("no").exists()


@pytest.mark.parametrize("kind", ["phi3", "phi3:4k", "opt"])
def test_generation_is_ours_or_says_why_transformers_does_it(kind: str, tmp_path: Path) -> None:
    model = packed(kind, tmp_path / "packed")
    reason = generate.why_not_ours(model)
    settings = model.generation_config
    tokens = [int(t) for t in generate.new_tokens(model, PROMPT, 6, settings)]
    with torch.no_grad():
        wanted = model.generate(PROMPT, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert tokens == wanted[0, PROMPT.shape[1] :].tolist()
    assert reason == (None if "phi3" in kind else f"model type {kind} is none of {', '.join(decoder.FAMILIES)}")
    if reason is None:
        steps = decoder.Decoder(model)
        state = steps.state(2, 40)
        found = [steps.prefill(state, TOKENS[:2, :30])]
        found += [steps.step(state, TOKENS[:2, 30 + i]) for i in range(10)]
        with torch.no_grad():
            own = model(TOKENS[:2], use_cache=False).logits[:, 29:]
        torch.testing.assert_close(torch.stack(found, 1), own, rtol=1e-4, atol=1e-4)


def serve(kind: str, folder: Path) -> None:
    from engines import ask
    from engines import generate as served

    from alphaprune.serving import kv
    from alphaprune.serving.engine import Engine

    model, family = packed(kind, folder), kind.partition(":")[0]
    tokenizer = data.load_tokenizer(folder)
    engine = Engine(model, tokenizer, kv.plan(model.config, model.dtype, 4, 16, blocks=32), 4, lambda kind, value: None)
    if family in NOT_SERVED:
        with pytest.raises(ValueError, match=rf"'{family}' do not run.*{NOT_SERVED[family]}.*alphaprune generate"):
            engine.start()
        return
    prompts = [row[: 5 + 9 * i].tolist() for i, row in enumerate(TOKENS[:3])]
    engine.start()
    try:
        found = [stream.tokens for stream in served(engine, [ask(prompt, 8) for prompt in prompts])]
    finally:
        engine.stop()
    model.set_attn_implementation("sdpa")
    for prompt, tokens in zip(prompts, found, strict=True):
        with torch.no_grad():
            out = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert tokens == out[0, len(prompt) :].tolist()


def test_a_family_is_refused_by_the_server(tmp_path: Path) -> None:
    serve("gemma2", tmp_path / "packed")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in (*KINDS, *WHOLES) if kind != "gemma2"])
def test_the_others_are_served_or_refused(kind: str, tmp_path: Path) -> None:
    serve(kind, tmp_path / "packed")


def test_the_page_of_families_is_of_this_table() -> None:
    assert (ROOT / "docs" / "families.md").read_text(encoding="utf-8") == page.page()
    assert all(f"`{name}`" in page.page() for name in (*FAMILIES, *MULTIMODAL))
