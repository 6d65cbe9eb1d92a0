"""`alphaprune generate`: a prompt → its continuation."""

import sys

from alphaprune import model as models
from alphaprune.commands.shared import dump


def run(
    model: str,
    prompt: str,
    max_new: int,
    temperature: float,
    seed: int,
    json: bool,
) -> None:
    from alphaprune import data, hf
    from alphaprune import generate as generation

    if max_new < 1:
        raise ValueError(f"--max-new {max_new}: wanted at least one token")
    if temperature < 0:
        raise ValueError(f"--temperature {temperature}: wanted 0 or more")
    folder = models.resolve(model)
    tokenizer = data.load_tokenizer(folder)
    loaded = hf.load(folder)

    def show(piece: str) -> None:
        print(piece, end="", flush=True)

    made = generation.generate(loaded, tokenizer, prompt, max_new, temperature, seed, None if json else show)
    if json:
        print(dump(vars(made)))
    else:
        rate = made.new_tokens / made.seconds
        print(
            f"{made.new_tokens} tokens in {made.seconds:.2f} s, {rate:.1f} tokens/s, decoder {made.decoder}",
            file=sys.stderr,
        )
