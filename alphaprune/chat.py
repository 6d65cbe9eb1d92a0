"""A conversation with a model: messages in, answers out, the oldest turns forgotten when the context is full."""

import contextlib
from collections.abc import Iterator
from typing import Any

from jinja2.exceptions import TemplateError

from alphaprune.generate import Memory
from alphaprune.textgen import TextGeneration

USER, ANSWER = "User:", "Assistant:"  # of a plain transcript
LONGEST_ANSWER = 512  # tokens, unless the caller says otherwise or the context is short


class Chat:
    """Turns of a user and a model.

    Where our decoder runs the model, keys and values are kept and each turn reads only its new tokens; transformers
    reads the whole conversation at every turn. plain: the conversation is a transcript of User and Assistant instead of
    what the tokenizer's chat template makes of it. template: a chat template in place of the tokenizer's.
    settings: of every answer, see TextGeneration; max_new_tokens is a quarter of the context, at most 512.

    decoder: see TextGeneration. dropped: turns that the last message left no room for.
    ValueError if there is neither a template nor `plain`.
    """

    def __init__(
        self,
        pipeline: TextGeneration,
        system: str | None = None,
        template: str | None = None,
        plain: bool = False,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        if not plain and template is None and not pipeline.tokenizer.chat_template:
            raise ValueError(
                "its tokenizer has no chat template: give one with --chat-template FILE, or --plain for a transcript "
                "of User and Assistant"
            )
        self.pipeline, self.template, self.plain, self.seed = pipeline, template, plain, seed
        self.system = [] if system is None else [{"role": "system", "content": system}]
        longest = min(LONGEST_ANSWER, (pipeline.context or 4 * LONGEST_ANSWER) // 4)
        self.settings = {"max_new_tokens": longest} | {k: v for k, v in settings.items() if v is not None}
        self.reset()
        self.dropped = 0
        # Made for what cannot work to be told before the first message.
        self.decoder = pipeline.decoder(self._request(self._tokens([{"role": "user", "content": "Hi"}])))

    def reset(self) -> None:
        """Forgets the turns; the system message stays."""
        self.turns: list[list[dict[str, str]]] = []
        self._asked, self._memory = 0, Memory()

    def ask(self, message: str) -> Iterator[str]:
        """The answer, piece by piece. If it is closed before the end, what was given out so far is the answer.

        ValueError if message and answer do not fit into the context of the model, or the template refuses them; the
        conversation is then what it was before.
        """
        question = {"role": "user", "content": message}
        for first in range(len(self.turns) + 1):
            kept = self.turns[first:]
            tokens = self._tokens([*(one for turn in kept for one in turn), question])
            if not self.pipeline.context or len(tokens) + self.settings["max_new_tokens"] <= self.pipeline.context:
                break
        request = self._request(tokens)
        self.turns, self.dropped = kept, first
        self._asked += 1
        return self._answer(question, tokens, request)

    def _answer(self, question: dict[str, str], tokens: list[int], request: Any) -> Iterator[str]:
        text = ""
        try:
            with contextlib.closing(self.pipeline.stream(tokens, request, self._memory)) as pieces:
                for piece in pieces:
                    fresh = piece if text else piece.lstrip() if self.plain else piece
                    text += fresh
                    yield fresh
        finally:
            if text:
                self.turns.append([question, {"role": "assistant", "content": text.rstrip() if self.plain else text}])

    def _request(self, tokens: list[int]) -> Any:
        stop = f"\n{USER}" if self.plain else None
        return self.pipeline.request(len(tokens), self.settings, stop, self.seed + self._asked)

    def _tokens(self, messages: list[dict[str, str]]) -> list[int]:
        if self.plain:
            names = {"system": "", "user": USER + " ", "assistant": ANSWER + " "}
            lines = [names[one["role"]] + one["content"] for one in [*self.system, *messages]]
            return self.pipeline.encode("\n".join([*lines, ANSWER]))
        try:
            text = self.pipeline.tokenizer.apply_chat_template(
                [*self.system, *messages], chat_template=self.template, tokenize=False, add_generation_prompt=True
            )
        except (TemplateError, TypeError) as error:
            raise ValueError(f"the chat template refuses this conversation: {error}") from error
        return self.pipeline.encode(text, special=False)
