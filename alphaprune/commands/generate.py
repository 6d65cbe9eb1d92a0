"""`alphaprune generate`: a prompt → its continuation."""

import sys
from typing import Any

from alphaprune.commands.shared import dump


def run(
    model: str,
    prompt: str,
    max_new: int,
    temperature: float,
    seed: int,
    stop: list[str] | None,
    activations: str | None,
    json: bool,
    **sampling: Any,
) -> None:
    from alphaprune import textgen

    if max_new < 1:
        raise ValueError(f"--max-new {max_new}: wanted at least one token")
    if temperature < 0:
        raise ValueError(f"--temperature {temperature}: wanted 0 or more")
    given = {name: value for name, value in sampling.items() if value is not None}
    if temperature == 0 and (unused := sorted(given.keys() - {"repetition_penalty"})):
        raise ValueError(f"--{unused[0].replace('_', '-')} chooses among samples: give a --temperature above 0, too")
    pipeline = textgen.TextGeneration(model, activations=activations)
    settings = {"max_new_tokens": max_new, "temperature": temperature, "seed": seed, "stop": stop} | given
    text, tokens = "", 0
    for made in pipeline(prompt, streaming=True, **settings):
        text += made.generations[0].text
        tokens += len(made.generations[0].tokens)
        if not json:
            print(made.generations[0].text, end="", flush=True)
    if json:
        found = {"text": text, "prompt_tokens": made.prompt_tokens, "new_tokens": tokens, "seconds": made.seconds}
        reason = made.generations[0].finished_reason
        print(dump(found | {"decoder": made.decoder, "finished_reason": reason, "seed": seed}))
    else:
        print()
        rate = tokens / made.seconds
        print(
            f"{tokens} tokens in {made.seconds:.2f} s, {rate:.1f} tokens/s, decoder {made.decoder}",
            file=sys.stderr,
        )
