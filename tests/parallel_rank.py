"""One rank of a tensor-parallel run of transformers on packed directories; started by torchrun from tests.

    torchrun --nproc-per-node 2 tests/parallel_rank.py OUT FOLDER…

Leaves OUT/RANK.pt: for each folder its logits, tokens and what this rank holds, or the sentence that refused it.
"""

import sys
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import alphaprune
from alphaprune import hf_parallel
from alphaprune.decoder import Decoder

TOKENS = torch.arange(3, 15)[None]
NEW = 12


def config() -> DistributedConfig:
    return DistributedConfig(tp_plan="auto")


def one(folder: str) -> dict:
    """What a rank has to say of one directory."""
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=config())
    except (ValueError, RuntimeError) as error:
        return {"refused": str(error)}
    with torch.no_grad():
        logits = model(TOKENS).logits
        prompt = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}
        tokens = model.generate(**prompt, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    decoder = Decoder(model)
    state = decoder.state(1, 40)
    own = [decoder.prefill(state, TOKENS)]
    for _ in range(NEW - 1):
        own.append(decoder.step(state, own[-1].argmax(-1)))
    held = {n: (m.held, m.packed.nbytes) for n, m in model.named_modules() if isinstance(m, hf_parallel.SlicedLinear)}
    said = [refusal(lambda: model.save_pretrained(Path(folder) / "again")), refusal(model.dequantize)]
    return {
        "logits": logits,
        "tokens": tokens[0, TOKENS.shape[1] :],
        "decoder": torch.stack(own, 1),
        "held": held,
        "grad": gradient(model),
        "body": body(folder),
        "said": said,
    }


def gradient(model: nn.Module) -> torch.Tensor:
    """Of the sum of squared logits, in the embeddings of the tokens."""
    x = model.get_input_embeddings()(TOKENS).detach().requires_grad_()
    model(inputs_embeds=x).logits.square().sum().backward()
    return x.grad


@torch.no_grad()
def body(folder: str) -> torch.Tensor:
    return AutoModel.from_pretrained(folder, distributed_config=config())(TOKENS).last_hidden_state


def refusal(call) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


def main() -> None:
    out, *folders = sys.argv[1:]
    torch.set_num_threads(1)
    found = {folder: one(folder) for folder in folders}
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    torch.save(found | {"version": alphaprune.__version__}, Path(out) / f"{rank}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
