"""A small random model of every family, and the way of one through the whole package."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer

import alphaprune
from alphaprune import calibrate, checkpoint, families
from alphaprune.model import LiveSource, open_source
from alphaprune.pruning import Recipe, prune_blocks

COMMON = {
    **{
        "vocab_size": 257,
        "hidden_size": 32,
        "intermediate_size": 72,
        "num_hidden_layers": 2,
        "tie_word_embeddings": False,
    },
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2},
}
OTHER_NAMES = {"num_key_value_heads", "head_dim", "intermediate_size"}  # that these families do not have
WINDOW = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 16,
}
# What is particular, by name of the model; the family is what stands before the colon.
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama:3": {"rope_parameters": LLAMA3, "tie_word_embeddings": True},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {**WINDOW, "query_pre_attn_scalar": 8},
    "gemma3_text": {**WINDOW, "query_pre_attn_scalar": 8},
    "phi3": {},
    "phi3:4k": {"sliding_window": 8},
    "opt": {"ffn_dim": 72},
    "opt:350m": {"ffn_dim": 72, "do_layer_norm_before": False, "word_embed_proj_dim": 16},
    "falcon": {"bias": True, "ffn_hidden_size": 72},
    "falcon:40b": {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 72},
    "falcon:rw": {"alibi": True, "multi_query": False, "parallel_attn": False, "ffn_hidden_size": 72},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2, "max_seq_len": 64},
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {
        **{"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "mlp_only_layers": [0]},
        "shared_expert_intermediate_size": 48,
    },
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "mlp_only_layers": [1]},
}
# Multimodal models: what holds the text model, which is one of those above or, of Qwen's, like them.
PICTURES = {
    **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"image_size": 16, "patch_size": 4},
}
SIGLIP, CLIP = ({**PICTURES, "model_type": f"{name}_vision_model"} for name in ("siglip", "clip"))
PIXTRAL = {**PICTURES, "model_type": "pixtral", "head_dim": 8}
QWEN = {"depth": 1, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
QWEN_2 = {**QWEN, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}
QWEN_25 = {**QWEN, "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32}
QWEN_3 = {**QWEN_25, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
IMAGE = {"image_token_index": 257}
QWEN_IMAGE = {"image_token_id": 257, "video_token_id": 258, "vision_start_token_id": 259, "vision_end_token_id": 260}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
# Kind of the text model, what is particular of it, and the rest.
WHOLES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gemma3": ("gemma3_text", {}, {"vision_config": SIGLIP, "mm_tokens_per_image": 4, **IMAGE}),
    "llava": ("llama", {}, {"vision_config": CLIP, **IMAGE}),
    "llava:mistral": ("mistral", {}, {"vision_config": CLIP, **IMAGE}),
    "llava_next": ("mistral", {}, {"vision_config": CLIP, "image_grid_pinpoints": [[16, 16]], **IMAGE}),
    "mistral3": ("mistral", {}, {"vision_config": PIXTRAL, **IMAGE}),
    "paligemma": ("gemma2", {}, {"vision_config": SIGLIP, "projection_dim": 32, **IMAGE}),
    "qwen2_vl": ("qwen2_vl_text", MROPE, {"vision_config": QWEN_2, **QWEN_IMAGE}),
    "qwen2_5_vl": ("qwen2_5_vl_text", MROPE, {"vision_config": QWEN_25, **QWEN_IMAGE}),
    "qwen3_vl": ("qwen3_vl_text", MROPE, {"vision_config": QWEN_3, **QWEN_IMAGE}),
}
TOKENS = torch.randint(3, 257, (5, 40), generator=torch.Generator().manual_seed(5))
PROMPT = TOKENS[:1, :12]


def skip_older(kind: str) -> None:
    """Skips, with the reason, what transformers before 5.8 does not do."""
    if hasattr(HfQuantizer, "update_weight_conversions"):
        return
    if kind in ("mixtral", "qwen2_moe", "qwen3_moe"):
        pytest.skip("packed experts are loaded by transformers 5.8 and newer")
    if kind == "mpt":
        pytest.skip("MPT has no float64 before transformers 5.8")


def config_of(kind: str, **changes: Any) -> Any:
    """The config of a model of this kind; changes: of its text model."""
    from transformers import AutoConfig

    family = kind.partition(":")[0]
    if kind in WHOLES:
        text, more, whole = WHOLES[kind]
        inside = {**COMMON, **KINDS.get(text, {}), **more, **changes, "model_type": text}
        return AutoConfig.for_model(family, text_config=inside, tie_word_embeddings=False, **whole)
    common = {n: v for n, v in COMMON.items() if family not in ("opt", "falcon", "mpt") or n not in OTHER_NAMES}
    return AutoConfig.for_model(family, **{**common, **KINDS[kind], **changes})


def make(kind: str, seed: int = 0, **changes: Any) -> nn.Module:
    """A model of this kind in float32; layer norms and biases are no trivial ones."""
    torch.manual_seed(seed)
    config = config_of(kind, **changes)
    model = families.auto_class(config).from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif name.endswith("gate.weight") and "mlp.gate." in name:  # a router with opinions
                parameter.normal_()
            elif not parameter.any():  # a projector that would see no picture
                parameter.normal_(0, 0.2)
    return model


def plan_of(source: Any, sparsity: float = 0.6, pattern: str = "unstructured", fit: str | None = None) -> Any:
    allocator = "uniform" if fit is None else "alpha"
    analysis = alphaprune.analyze(source, fit=fit)
    return alphaprune.plan(analysis, sparsity, allocator=allocator, pattern=pattern)


def prune_folder(folder: Path, out: Path, recipe: Recipe, plan: Any, packed: bool = True) -> Any:
    """What `alphaprune prune` does with a directory."""
    source = open_source(folder)
    return checkpoint.write_pruned(
        source,
        out,
        {"seed": 0},
        {"made": "here"},
        lambda restore, finish: prune_blocks(source, plan, recipe, TOKENS, restore=restore, finish=finish),
        checkpoint.Storage(packed),
    )


@torch.no_grad()
def block_by_block(model: nn.Module) -> tuple[LiveSource, Tensor, tuple[Tensor, ...]]:
    """The model's source, what its last block makes of TOKENS, and the hidden states that transformers has of it.

    Each block must be given what the model gives it.
    """
    with torch.no_grad():
        wanted = model(TOKENS, use_cache=False, output_hidden_states=True).hidden_states
    source = LiveSource(model)
    activations = calibrate.first_inputs(source, TOKENS)
    for block in source.blocks():
        torch.testing.assert_close(torch.cat(list(activations.hidden)), wanted[block.index], rtol=1e-5, atol=1e-5)
        calibrate.run(block, activations)
    return source, torch.cat(list(activations.hidden)), wanted


def logits(model: nn.Module, tokens: Tensor = TOKENS[:2]) -> Tensor:
    return model(tokens, use_cache=False).logits


def assert_twins(packed: nn.Module, dense: nn.Module) -> None:
    """Logits as near to those in float64 as twice the dense model is, in float32, and the same greedy tokens."""
    found, own = logits(packed), logits(dense)
    if getattr(dense.config, "num_experts_per_tok", None):
        dense.set_experts_implementation("eager")  # the other one has no float64
    truth = logits(dense.double())
    dense.float()
    allowed = 2 * (own.double() - truth).abs().max() + 2.0**-22 * truth.abs().max()
    assert truth.std() > 0.1 and (found.double() - truth).abs().max() <= allowed
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(packed.generate(PROMPT, **settings), dense.generate(PROMPT, **settings))


# Why `alphaprune serve` does not run a family, in the words of its refusal; the others are served.
NOT_SERVED = {
    "gemma2": "it leaves the cap on attention scores out",
    "opt": "no attribute 'get_seq_length'",
    "falcon": "no attribute 'get_seq_length'",
    "mpt": "'NoneType' object has no attribute 'to'",
    "paligemma": "it leaves the cap on attention scores out",
}
# Which methods are run for every kind, with which pattern.
METHODS = {
    "wanda": "unstructured",
    "magnitude": "unstructured",
    "ria": "unstructured",
    "alps": "unstructured",
    "sparsegpt": "2:4",
}
