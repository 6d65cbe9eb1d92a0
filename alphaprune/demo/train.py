"""Trains the embedded model: `python -m alphaprune.demo.train --out DIR [--steps N]`.

Constant learning rate after a warm-up on half-length sequences (attention costs less), then a linear decay on
sequences of the full length. A run that was stopped can therefore be resumed with another `--steps`. The state
is saved every hundred steps and on SIGTERM.
"""

import argparse
import json
import math
import signal
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from alphaprune.demo import corpus

VOCABULARY = 4096
LENGTH = 512  # context of the finished model, in tokens
DECAY = 0.3  # share of the steps in which the learning rate falls and sequences have the full length


def configuration() -> LlamaConfig:
    """11 M parameters: grouped-query attention with 2 KV heads, tied embeddings, sizes in multiples of 128."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )


def initial_model(seed: int = 0) -> LlamaForCausalLM:
    """The model before its first step; the spectra of the finished one are compared with it."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(configuration())


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE: every text round-trips, whatever bytes it holds."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[corpus.END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": corpus.END_OF_TEXT,
        "eos_token": corpus.END_OF_TEXT,
        "model_max_length": LENGTH,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def learning_rate(step: int, steps: int, peak: float, warmup: int = 200) -> float:
    start = steps * (1 - DECAY)
    falling = 1.0 if step < start else max(0.02, (steps - step) / (steps - start))
    return peak * min(1.0, (step + 1) / warmup) * falling


def optimizer_for(model: torch.nn.Module, peak: float) -> torch.optim.AdamW:
    """Weight decay on matrices only, as is usual."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), eps=1e-8, fused=True)


def sequences(tokens: torch.Tensor, step: int, options: argparse.Namespace) -> torch.Tensor:
    """The batch of one step, [sequences, length]: every window once per epoch, in a new order each time."""
    length = LENGTH if step >= options.steps * (1 - DECAY) else LENGTH // 2
    count, windows = options.batch // length, tokens.numel() // length
    epoch, place = divmod(step * count, windows - count)
    order = torch.randperm(windows, generator=torch.Generator().manual_seed(options.seed + epoch))
    return torch.stack([tokens[w * length : (w + 1) * length] for w in order[place : place + count].tolist()])


def save_state(path: Path, step: int, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer) -> None:
    beside = path.with_suffix(".part")
    torch.save({"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, beside)
    beside.replace(path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the state and the finished model")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch", type=int, default=4096, help="tokens per step")
    parser.add_argument("--peak", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="fuse the step with torch.compile (needs g++)")
    options = parser.parse_args(arguments)

    train = corpus.load("train")
    options.out.mkdir(parents=True, exist_ok=True)
    if (options.out / "tokenizer.json").exists():
        tokenizer = Tokenizer.from_file(str(options.out / "tokenizer.json"))
    else:
        tokenizer = train_tokenizer([text for _, text in train.documents])
        save_tokenizer(tokenizer, options.out)
    encoded = tokenizer.encode_batch([corpus.END_OF_TEXT + text for _, text in train.documents])
    tokens = torch.tensor([i for document in encoded for i in document.ids])
    print(f"train: {len(train.documents)} documents, {tokens.numel()} tokens, sha256 {train.sha256[:16]}", flush=True)

    model = initial_model(options.seed)
    optimizer = optimizer_for(model, options.peak)
    state_file, first = options.out / "state.pt", 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    stopping = []
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))

    forward = torch.compile(model) if options.compile else model
    precision = torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_amx_tile_supported())  # else slower
    started, smooth = time.monotonic(), None
    for step in range(first, options.steps):
        batch = sequences(tokens, step, options)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options.steps, options.peak)
        with precision:
            logits = forward(input_ids=batch, use_cache=False).logits  # [batch, LENGTH, VOCABULARY]
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        smooth = loss.item() if smooth is None else 0.95 * smooth + 0.05 * loss.item()
        if step % 20 == 0:
            rate = (step + 1 - first) * batch.numel() / (time.monotonic() - started)
            print(
                f"step {step} loss {smooth:.4f} ({smooth / math.log(2):.3f} bits/token) {rate:.0f} tokens/s", flush=True
            )
        if stopping or (step + 1) % 100 == 0:
            save_state(state_file, step + 1, model, optimizer)
        if stopping:
            return
    model.to(torch.bfloat16).save_pretrained(options.out)


if __name__ == "__main__":
    main()
