"""`alphaprune chat`: a conversation in a terminal; from a pipe, every line is a message."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def run(
    model: str,
    chat_template: str | None,
    plain: bool,
    max_new: int | None,
    temperature: float,
    system: str | None,
    seed: int,
    activations: str | None,
) -> None:
    if max_new is not None and max_new < 1:
        raise ValueError(f"--max-new {max_new}: wanted at least one token")
    if temperature < 0:
        raise ValueError(f"--temperature {temperature}: wanted 0 or more")
    if plain and chat_template:
        raise ValueError("--plain takes no chat template: leave out one of them")
    template = _read(chat_template) if chat_template else None

    from alphaprune import chat, textgen
    from alphaprune.generate import OURS

    pipeline = textgen.TextGeneration(model, activations=activations)
    settings = {"max_new_tokens": max_new, "temperature": temperature}
    try:
        talk = chat.Chat(pipeline, system, template, plain, seed, **settings)
    except ValueError as error:
        raise ValueError(f"{model}: {error}") from error
    reads = "" if talk.decoder == OURS else "; every turn reads the whole conversation anew"
    _say(f"{model}: decoder {talk.decoder}{reads}. /reset forgets the conversation, /exit or Ctrl-D ends it.")
    for message in _messages():
        if message == "/exit":
            return
        if message == "/reset":
            talk.reset()
            _say("forgotten")
        else:
            _answer(talk, message)


def _read(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--chat-template {file}: cannot be read as UTF-8 text ({error})") from error


def _messages() -> Iterator[str]:
    """What is typed, without empty lines, until the input ends. Ctrl-C at the prompt of a terminal only clears it."""
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  line editing and history of input()
    while True:
        try:
            line = input("> " if terminal else "").strip()
        except EOFError:
            if terminal:
                print()
            return
        except KeyboardInterrupt:
            if not terminal:
                raise
            print()
            continue
        if line:
            yield line


def _answer(talk: Any, message: str) -> None:
    """Prints the answer as it comes. Ctrl-C stops it and nothing else; what was said so far stays said."""
    try:
        pieces = talk.ask(message)
    except ValueError as error:
        _say(str(error))
        return
    if talk.dropped:
        _say(f"the context is full: the oldest {talk.dropped} turns were dropped")
    with contextlib.closing(pieces), contextlib.suppress(KeyboardInterrupt):
        for piece in pieces:
            print(piece, end="", flush=True)
    print(flush=True)


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)
