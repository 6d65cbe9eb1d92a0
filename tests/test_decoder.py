"""The lean decoder gives what transformers gives: tokens in float32, logits in half precision, for every family."""

import argparse
import copy
from pathlib import Path

import pytest
import torch
from conftest import shared

from alphaprune import data, hf, layer
from alphaprune.decoder import Decoder, State, why_not
from alphaprune.demo.run import MODEL
from alphaprune.generate import continuation, decode_rates, greedy, step_seconds
from alphaprune.mask import keep_mask

pytestmark = pytest.mark.usefixtures("one_thread")
ROPE = {"rope_theta": 10000.0}
SMALL = {
    **{"vocab_size": 101, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3},
    **{"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256},
    **{"initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": False},
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 16,
}
LONG = {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 24}
WINDOWS = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
KINDS = {
    "llama": ("Llama", {}),
    "every head has its keys": ("Llama", {"num_key_value_heads": 6}),
    "one key head": ("Llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "gelu": ("Llama", {"hidden_act": "gelu"}),
    "linear": ("Llama", {"rope_parameters": {**ROPE, "rope_type": "linear", "factor": 2.0}}),
    "llama3": ("Llama", {"rope_parameters": {**ROPE, **LLAMA3}}),
    "yarn": ("Llama", {"rope_parameters": {**ROPE, **YARN}}),
    "dynamic": (
        "Llama",
        {"rope_parameters": {**ROPE, "rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 24},
    ),
    "longrope": (
        "Llama",
        {"rope_parameters": {**ROPE, **LONG, "short_factor": [1.0] * 8, "long_factor": [2.0 + i for i in range(8)]}},
    ),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral, window": ("Mistral", {"sliding_window": 7}),
    "qwen2": ("Qwen2", {}),
    "qwen2, window": ("Qwen2", WINDOWS),
    "qwen3": ("Qwen3", {}),
    "qwen3, heads of 32": ("Qwen3", {"head_dim": 32}),  # which our attention takes
    "qwen3, window and biases": ("Qwen3", {**WINDOWS, "attention_bias": True}),
}


def build(kind: str, dtype: torch.dtype = torch.float32):
    """A small random model whose norms and biases are random, too."""
    import transformers

    family, changes = KINDS[kind]
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **changes})
    torch.manual_seed(5)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.5)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.generation_config.eos_token_id = None  # tests want as many tokens as they ask for
    return cast(model, dtype).eval()


def prompts(model, batch: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, model.config.vocab_size, (batch, length), generator=generator)


def pack(model, sparsity: float = 0.7):
    """Pruned by magnitude and packed; where a layer is named `v_proj` in the first block, only zeroed."""
    masks = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            zeros = round(sparsity * module.weight.numel())
            masks[name] = keep_mask(module.weight.detach().float().abs(), zeros)
    layer.sparsify(model, masks)
    first = "model.layers.0.self_attn.v_proj"
    model.set_submodule(first, model.get_submodule(first).to_linear())
    return model


def dense_twin(model, dtype: torch.dtype):
    """A copy with dense layers, its parameters in `dtype`."""
    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        if isinstance(module, layer.SparseLinear):
            twin.set_submodule(name, module.to_linear())
    return cast(twin, dtype)


def cast(model, dtype: torch.dtype):
    """The parameters in another dtype; model.to would round the frequencies of the rotary embedding, too."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def theirs(model, tokens: torch.Tensor, count: int, **settings) -> torch.Tensor:
    """New tokens [batch, count] of transformers' own generate."""
    settings = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(tokens), **settings}
    with torch.inference_mode():
        return model.generate(tokens, max_new_tokens=count, **settings)[:, tokens.shape[1] :]


def ours(model, tokens: torch.Tensor, count: int, **settings) -> torch.Tensor:
    return torch.stack(list(continuation(Decoder(model), tokens, count, greedy, **settings)), 1)


def forced(decoder: Decoder, tokens: torch.Tensor, first: int, chunk: int = 1024) -> torch.Tensor:
    """Logits [batch, length - first + 1, vocabulary] with tokens [batch, length] given: a prefill, then steps."""
    state = decoder.state(tokens.shape[0], tokens.shape[1])
    found = [decoder.prefill(state, tokens[:, :first], chunk)]
    found += [decoder.step(state, tokens[:, i]) for i in range(first, tokens.shape[1])]
    return torch.stack(found, 1)


def dense_logits(model, tokens: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=tokens).logits


def assert_logits(found: torch.Tensor, dense: torch.Tensor, truth: torch.Tensor) -> None:
    """At most twice the largest error of dense torch; another greedy token only where dense's top two are as close."""
    allowed = 2 * (dense.double() - truth.double()).abs().max()
    error = (found.double() - truth.double()).abs().max()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"
    top = dense.double().topk(2, -1)
    differs = found.argmax(-1) != top.indices[..., 0]
    assert ((top.values[..., 0] - top.values[..., 1])[differs] <= allowed).all()


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_equal_transformers(kind: str) -> None:
    model = build(kind)
    tokens = prompts(model, 2, 20)  # longer than the windows, shorter than the growing ropes begin
    expected = theirs(model, tokens, 16)
    assert len(expected.unique()) > 6
    assert torch.equal(ours(model, tokens, 16), expected)
    one = tokens[:1]
    assert torch.equal(ours(pack(model), one, 16), theirs(model, one, 16))


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_logits_are_within_tolerance(kind: str) -> None:
    tokens = prompts(build(kind), 1, 36, seed=1)
    if kind in ("dynamic", "longrope"):
        tokens = tokens[:, :24]  # past it, transformers' frequencies depend on how the tokens were cut
    for dtype, change in ((torch.bfloat16, pack), (torch.bfloat16, lambda model: model), (torch.float16, pack)):
        model = change(build(kind, dtype))
        dense = dense_logits(dense_twin(model, dtype), tokens)[:, 11:]
        truth = dense_logits(dense_twin(model, torch.float64), tokens)[:, 11:]
        assert_logits(forced(Decoder(model), tokens, 12), dense, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norms_round_as_transformers_does(dtype: torch.dtype) -> None:
    model = build("llama", dtype)
    block, theirs_block = Decoder(model).blocks[1], model.model.layers[1]
    x = (torch.randn(33, 48, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    assert torch.equal(block.qkv.norm(x), theirs_block.input_layernorm(x))
    assert torch.equal(block.inside.norm(x), theirs_block.post_attention_layernorm(x))


@pytest.mark.parametrize("kind", ["llama", "mistral, window", "qwen3, window and biases", "dynamic"])
def test_chunks_of_a_prefill_equal_one_piece(kind: str) -> None:
    model = build(kind)
    decoder, tokens = Decoder(model), prompts(model, 2, 30)
    dense = dense_logits(model, tokens)[:, -1]
    truth = dense_logits(dense_twin(model, torch.float64), tokens)[:, -1]
    for chunk in (1, 4, 7, 29, 30):
        state = decoder.state(2, 31)
        found = decoder.prefill(state, tokens, chunk)
        assert state.length == 30
        assert_logits(found, dense, truth)


def test_a_prompt_may_come_in_pieces() -> None:
    model = build("qwen2, window")
    decoder, tokens = Decoder(model), prompts(model, 1, 24)
    state, once = decoder.state(1, 24), decoder.state(1, 24)
    for part in tokens.split([5, 1, 11, 7], 1):
        found = decoder.prefill(state, part)
    torch.testing.assert_close(found, decoder.prefill(once, tokens), rtol=1e-4, atol=1e-4)
    state.reset()
    assert torch.equal(decoder.prefill(state, tokens), decoder.prefill(decoder.state(1, 24), tokens))


@pytest.mark.parametrize("kind", ["llama", "every head has its keys", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sequences_of_a_batch_do_not_meet(kind: str, dtype: torch.dtype) -> None:
    model = pack(build(kind, dtype))
    decoder, tokens = Decoder(model), prompts(model, 3, 14)
    together = forced(decoder, tokens, 6)
    alone = torch.cat([forced(decoder, one[None], 6) for one in tokens])
    dense = dense_logits(dense_twin(model, dtype), tokens)[:, 5:]
    truth = dense_logits(dense_twin(model, torch.float64), tokens)[:, 5:]
    assert_logits(together, dense, truth)
    assert_logits(alone, dense, truth)


def test_positions_and_the_end_of_the_cache() -> None:
    model = build("llama")
    decoder, tokens = Decoder(model), prompts(model, 1, 9)
    state = decoder.state(1, 10)
    decoder.prefill(state, tokens)
    decoder.step(state, tokens[:, 0])
    assert state.length == state.capacity == 10
    before = state.cache.clone()
    for call in (lambda: decoder.step(state, tokens[:, 0]), lambda: decoder.prefill(state, tokens)):
        with pytest.raises(ValueError, match=r"holds 10 positions, 10 are taken and [19] more") as error:
            call()
        assert "larger capacity" in str(error.value) and "\n" not in str(error.value)
    assert state.length == 10 and torch.equal(state.cache, before)
    state.reset()
    with pytest.raises(ValueError, match="10 positions, 0 are taken and 11 more"):
        decoder.prefill(state, prompts(model, 1, 11), chunk=2)
    assert state.length == 0
    assert decoder.state().capacity == 256  # the context of the model


def test_wrong_shapes_are_one_sentence() -> None:
    decoder = Decoder(build("llama"))
    state = decoder.state(2, 8)
    for tokens in (torch.ones(1, 3), torch.ones(2, 0), torch.ones(2)):
        with pytest.raises(ValueError, match="prefill of 2 sequences needs tokens"):
            decoder.prefill(state, tokens.long())
    with pytest.raises(ValueError, match="a step of 2 sequences needs tokens"):
        decoder.step(state, torch.ones(3).long())
    for batch, capacity in ((0, 4), (1, 0)):
        with pytest.raises(ValueError, match="at least one sequence and one position"):
            decoder.state(batch, capacity)


def test_weights_are_shared_and_hooks_are_heard() -> None:
    model, heard = pack(build("llama")), []
    up, q = model.model.layers[1].mlp.up_proj, model.model.layers[0].self_attn.q_proj
    hooks = [module.register_forward_hook(lambda *_: heard.append(1)) for module in (up, q)]
    ours(model, prompts(model, 1, 3), 4)
    assert len(heard) == 8
    for hook in hooks:
        hook.remove()
    decoder, tokens = Decoder(model), prompts(model, 1, 5)
    before = decoder.prefill(decoder.state(1, 8), tokens)
    with torch.no_grad():
        up.weight.mul_(2)  # packed values
    assert not torch.equal(decoder.prefill(decoder.state(1, 8), tokens), before)
    assert len(heard) == 8


def test_what_it_does_not_run_has_a_reason() -> None:
    from transformers import GPT2Config, LlamaConfig

    assert "gpt2" in why_not(GPT2Config())
    config = LlamaConfig(**SMALL)
    assert why_not(config) is None
    for change, word in (
        ({"rope_parameters": {**ROPE, "rope_type": "proportional"}}, "proportional"),
        ({"rope_parameters": {**ROPE, "rope_type": "default", "partial_rotary_factor": 0.5}}, "part of each head"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
    ):
        changed = copy.deepcopy(config)
        for name, value in change.items():
            setattr(changed, name, value)
        assert word in why_not(changed)
    model = build("llama")
    assert "LlamaModel" in why_not(config, model.model)
    model.lm_head.to("meta")
    with pytest.raises(ValueError, match="several devices"):
        Decoder(model)


def test_steps_are_timed_one_by_one() -> None:
    model = build("llama")
    for way in (True, False):
        assert len(step_seconds(model, 4, 3, way)) == 3 and decode_rates([model, model], 4, 3, 1, way)[1] > 0


def twenty(model, folder: Path, text: str) -> torch.Tensor:
    """Twenty pieces of real text, 12 tokens each."""
    model.generation_config.eos_token_id = None
    found = torch.tensor(data.load_tokenizer(folder)(text[:20_000]).input_ids)
    return found[: found.numel() // 20 * 20].view(20, -1)[:, :12].clone()


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_twenty_prompts_of_the_embedded_model(packed: bool) -> None:
    model = hf.load(MODEL, dtype="float32")
    tokens = twenty(model, MODEL, Path(argparse.__file__).read_text())
    model = pack(model) if packed else model
    expected = theirs(model, tokens, 64)
    assert torch.equal(ours(model, tokens, 64), expected)
    for i in (3, 11):  # alone, through the kernels of a single token
        assert torch.equal(ours(model, tokens[i : i + 1], 64)[0], expected[i])


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_twenty_prompts_of_somebody_elses_model(packed: bool) -> None:
    folder = shared("models/stories260K_hf")
    model = hf.load(folder, dtype="float32")
    tokens = twenty(model, folder, (shared("data/tinystories") / "test.txt").read_text()[:40_000])
    model = pack(model, 0.4) if packed else model
    expected = theirs(model, tokens, 64)
    assert torch.equal(torch.cat([ours(model, one[None], 64) for one in tokens]), expected)


def test_a_state_reads_nothing_that_was_not_written() -> None:
    """Memory starts as NaN in these tests: no position past the last one may reach the logits."""
    model = build("mistral, window")
    decoder = Decoder(model)
    state = State(decoder, 1, 40)
    assert state.cache.isnan().all()
    for count in range(1, 30, 3):
        state.reset()
        assert not decoder.prefill(state, prompts(model, 1, count)).isnan().any()
        assert not decoder.step(state, torch.tensor([3])).isnan().any()
