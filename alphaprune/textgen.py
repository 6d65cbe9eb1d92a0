"""Text from a prompt in one call, as users of DeepSparse's TextGeneration know it.

pipeline = TextGeneration("pruned")
pipeline("Once upon a time", max_new_tokens=20).generations[0].text
for piece in pipeline("Once upon a time", streaming=True):
    print(piece.generations[0].text, end="")
"""

import contextlib
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from alphaprune import data, generate, hf, text_request
from alphaprune import model as models
from alphaprune.detokenize import Detokenizer
from alphaprune.families import text_config
from alphaprune.text_request import Config, Request

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class GeneratedText:
    """One sequence; while streaming, what is new of it.

    finished_reason: "stop" (end of text or a stop string), "max_new_tokens", "length" (max_length), "capacity" (the
    context of the model is full), "callback" (it returned False) or "time". score: logits [new tokens, vocabulary],
    float32, with output_scores. tokens: the new ones, an end of text included.
    """

    text: str
    score: Tensor | None = None
    finished: bool = False
    finished_reason: str | None = None
    tokens: list[int] = field(default_factory=list)


@dataclass
class TextGenerationOutput:
    """What one call gave; while streaming, one token of it.

    generations: of one prompt its sequences; of a list of prompts one text for each, or a list for each where several
    sequences are asked for. seed: gives the same again. decoder: "alphaprune", or "transformers: " and why not ours.
    seconds: since the call.
    """

    created: datetime
    prompts: str | list[str]
    generations: list[Any]
    prompt_tokens: int
    seed: int
    decoder: str
    seconds: float


class TextGeneration:
    """A model with its tokenizer, called with a prompt or a list of them; threads may call it at the same time.

    model: folder, hub id, or a loaded model with its tokenizer. generation_config: for every call; a GenerationConfig,
    a dict, or a JSON file or a folder with one. Greedy unless sampling is asked for, whatever the checkpoint says; its
    other settings hold. dtype, device, activations: as `load` takes them, of a folder or hub id.
    """

    def __init__(
        self,
        model: "str | Path | PreTrainedModel",
        tokenizer: Any = None,
        generation_config: Config = None,
        dtype: "torch.dtype | str" = "auto",
        device: str = "cpu",
        activations: str | None = None,
    ) -> None:
        self._given = text_request.read(generation_config)
        if isinstance(model, nn.Module):
            if tokenizer is None:
                raise ValueError("TextGeneration of a loaded model needs its tokenizer, too")
            self.model, self.tokenizer = model, tokenizer
        else:
            folder = models.resolve(model)
            self.tokenizer = tokenizer or data.load_tokenizer(folder)
            self.model = hf.load(folder, dtype, device, activations=activations)
        self.context: int | None = getattr(text_config(self.model.config), "max_position_embeddings", None)
        self._lock = threading.Lock()

    def __call__(
        self,
        prompt: str | list[str],
        *,
        streaming: bool = False,
        stop: str | Sequence[str] | None = None,
        callback: Callable[[int], Any] | None = None,
        generation_config: Config = None,
        seed: int | None = None,
        **settings: Any,
    ) -> "TextGenerationOutput | Iterator[TextGenerationOutput]":
        """The texts that follow one prompt or each of a list; with `streaming` one output per token, as it is made.

        stop: strings that end a text and are not part of it. callback: called with each token; False ends the text.
        settings: those of a GenerationConfig, such as max_new_tokens, do_sample, temperature, top_k, top_p,
        repetition_penalty, num_return_sequences, output_scores; a temperature above 0 samples unless do_sample=False.
        seed: of sampling, otherwise another one every time. Prompts of a list run one after the other, so that no text
        depends on its neighbours.

        ValueError in one sentence for a setting that is unknown or out of range, and if prompt and new tokens do not
        fit into the context of the model.
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(prompts, list | tuple) or not prompts or not all(isinstance(one, str) for one in prompts):
            raise ValueError("prompt: wanted a string or a list of strings")
        given = text_request.read(generation_config) | text_request.read(settings)
        seed = secrets.randbits(63) if seed is None else seed
        jobs = []
        for one in prompts:
            tokens = self.encode(one)
            jobs.append((one, tokens, self.request(len(tokens), given, stop, seed, callback)))
        if streaming:
            self._check_streaming(jobs[0][2])
            return (output for job in jobs for output in self._stream(*job))
        started = perf_counter()
        made: list[Any] = []
        for _, tokens, request in jobs:
            rows = self._rows(request)
            for _ in self._pieces(tokens, request, rows):
                pass
            made.append([row.whole() for row in rows])
        if not isinstance(prompt, str):
            made = [made] if len(made[0]) > 1 else [[texts[0] for texts in made]]
        total = sum(len(tokens) for _, tokens, _ in jobs)
        return self._output(prompt, made[0], total, jobs[0][2], started)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """The tokens of a prompt; one at least.   special: with those that the tokenizer adds to a text."""
        try:
            text.encode()
        except UnicodeEncodeError as error:  # bytes of a command line, or half a pair of surrogates
            raise ValueError("prompt: is not valid UTF-8; give it in that encoding") from error
        tokens = list(self.tokenizer(text, add_special_tokens=special, verbose=False).input_ids)
        data.check_tokens(tokens, self.model.config, "the prompt")
        return tokens or [text_config(self.model.config).bos_token_id or 0]

    def request(
        self,
        prompt_tokens: int,
        given: dict[str, Any],
        stop: str | Sequence[str] | None = None,
        seed: int = 0,
        callback: Callable[[int], Any] | None = None,
    ) -> Request:
        """What a call asks for, checked for a prompt of so many tokens. given: settings by name."""
        base, given = self.model.generation_config, self._given | given
        return text_request.request(base, self.tokenizer, prompt_tokens, self.context, given, stop, seed, callback)

    def stream(self, tokens: list[int], request: Request, memory: generate.Memory | None = None) -> Iterator[str]:
        """The text after `tokens`, piece by piece. memory: of the conversation that they continue."""
        for pieces in self._pieces(tokens, request, self._rows(request), memory):
            yield pieces[0]

    def decoder(self, request: Request) -> str:
        """Which decoder runs a request: "alphaprune", or "transformers: " and why not ours."""
        reason = generate.why_not_ours(self.model, request.settings)
        return f"transformers: {reason}" if reason else generate.OURS

    def _check_streaming(self, request: Request) -> None:
        if request.beams:
            raise ValueError("beam search knows its text only at the end: leave out streaming or num_beams")
        if request.scores and self.decoder(request) != generate.OURS:
            raise ValueError(
                f"transformers gives scores only at the end ({generate.why_not_ours(self.model, request.settings)}): "
                f"leave out streaming or output_scores"
            )

    def _rows(self, request: Request) -> "list[_Row]":
        scores: list[Tensor] | None = [] if request.scores else None
        return [_Row(self.tokenizer, request, place, scores) for place in range(request.sequences)]

    def _pieces(
        self, tokens: list[int], request: Request, rows: "list[_Row]", memory: generate.Memory | None = None
    ) -> Iterator[list[str]]:
        """What each token adds to the text of each row, until all have ended."""
        prompt = torch.tensor([tokens], device=self.model.device)
        new = generate.new_tokens(
            *(self.model, prompt, request.limit, request.settings, request.seed, self._lock, rows[0].scores, memory)
        )
        with contextlib.closing(new):
            for token in new:
                yield [row.put(one) for row, one in zip(rows, token.tolist(), strict=True)]
                if all(row.reason for row in rows):
                    return
            yield [row.end("time") for row in rows]  # transformers ended it for a reason of its own

    def _stream(self, prompt: str, tokens: list[int], request: Request) -> Iterator[TextGenerationOutput]:
        started, rows = perf_counter(), self._rows(request)
        for pieces in self._pieces(tokens, request, rows):
            found = [row.news(piece) for row, piece in zip(rows, pieces, strict=True)]
            yield self._output(prompt, found, len(tokens), request, started)

    def _output(
        self, prompts: Any, generations: list[Any], prompt_tokens: int, request: Request, started: float
    ) -> TextGenerationOutput:
        seconds, now = perf_counter() - started, datetime.now(timezone.utc)
        return TextGenerationOutput(
            now, prompts, generations, prompt_tokens, request.seed, self.decoder(request), seconds
        )


class _Row:
    """One sequence as it grows."""

    def __init__(self, tokenizer: Any, request: Request, place: int, scores: list[Tensor] | None) -> None:
        self.request, self.place, self.scores = request, place, scores
        self.ends, self.text = generate.ends_of(request.settings), Detokenizer(tokenizer, request.stops)
        self.tokens: list[int] = []
        self.pieces: list[str] = []
        self.told = 0  # tokens that `news` has given out
        self.reason: str | None = None

    def put(self, token: int) -> str:
        """What a token adds to the text; nothing once it has ended."""
        if self.reason:
            return ""
        self.tokens.append(token)
        self.pieces.append(self.text.put(token))
        called = self.request.callback
        goes_on = called is None or called(token) is not False
        if token in self.ends or self.text.stopped:
            return self.pieces[-1] + self.end("stop")
        if not goes_on:
            return self.pieces[-1] + self.end("callback")
        if len(self.tokens) == self.request.limit:
            return self.pieces[-1] + self.end(self.request.limit_reason)
        return self.pieces[-1]

    def end(self, reason: str) -> str:
        """Ends the text, unless it has ended before; what was held back of it."""
        if self.reason:
            return ""
        self.reason = reason
        self.pieces.append(self.text.end())
        return self.pieces[-1]

    def whole(self) -> GeneratedText:
        return self._generated("".join(self.pieces), 0)

    def news(self, piece: str) -> GeneratedText:
        """What came since the last call; `piece` is its text."""
        start, self.told = self.told, len(self.tokens)
        return self._generated(piece, start)

    def _generated(self, text: str, start: int) -> GeneratedText:
        found = None if self.scores is None else [one[self.place] for one in self.scores[start : len(self.tokens)]]
        score = torch.stack(found) if found else None  # [new tokens, vocabulary]
        return GeneratedText(text, score, self.reason is not None, self.reason, self.tokens[start:])
