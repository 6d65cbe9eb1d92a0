"""Tokens → text as it comes: whole characters only, and nothing that may turn out to begin a stop string."""

from collections.abc import Iterable
from typing import Any

UNFINISHED = "\ufffd"  # what a tokenizer shows for bytes that are no character, or not yet
BYTES = 3  # of a character that may be there before it is one
PATIENCE = 16  # tokens: a model that makes nothing but broken bytes is not waited for any longer


class Detokenizer:
    """The text of one sequence, token by token; together what the tokenizer decodes, up to a stop string.

    stopped: whether one of `stops` was met. Of several the one that is complete first counts, however the text is cut
    into tokens; neither it nor what follows is ever given out.
    """

    def __init__(self, tokenizer: Any, stops: Iterable[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._tokens: list[int] = []
        # Text of [first, read) was given out; decoding goes on from `first`, since the text of a token may depend on
        # the one before it.
        self._first = self._read = 0
        self._given = 0  # characters after `read` that were given out, too
        self._held = ""
        self.stopped = False

    def put(self, token: int) -> str:
        """The text that is certain with this token; often its own, sometimes none."""
        self._tokens.append(token)
        fresh = self._fresh()
        broken = len(fresh) - len(fresh.rstrip(UNFINISHED))
        done = not broken or len(self._tokens) - self._read > PATIENCE
        certain = fresh if done else fresh[: len(fresh) - min(broken, BYTES)]
        piece = certain[self._given :]
        self._given = max(self._given, len(certain))
        if fresh and done:
            self._first, self._read, self._given = self._read, len(self._tokens), 0
        return self._release(piece)

    def end(self) -> str:
        """What was held back, once it is known that no more tokens come."""
        piece = self._release(self._fresh()[self._given :]) + self._held
        self._first = self._read = len(self._tokens)
        self._given, self._held = 0, ""
        return piece

    def _fresh(self) -> str:
        """The text of the tokens that were not read yet."""
        shown, known = self._decode(self._tokens[self._first : self._read]), self._decode(self._tokens[self._first :])
        return known[len(shown) :]

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _release(self, fresh: str) -> str:
        """What can be given out of the text held and the text that is new."""
        if self.stopped:
            return ""
        text = self._held + fresh
        places = [(text.find(stop) + len(stop), text.find(stop)) for stop in self._stops if stop in text]
        if places:
            self._held, self.stopped = "", True
            return text[: min(places)[1]]
        longest = max(map(len, self._stops), default=1) - 1
        sizes = range(min(longest, len(text)), 0, -1)
        held = next((size for size in sizes if any(stop.startswith(text[-size:]) for stop in self._stops)), 0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]
