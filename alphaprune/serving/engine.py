"""The engine behind the routes: prompts in, pieces of text out, one request beside the other.

Two ways to batch have one face (start, stop, alive, running, queued, kv_used, submit, forget): ours.py for models that
our decoder knows, theirs.py for the others. Streams and their parser are those of transformers (cli.serving).
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from time import perf_counter
from typing import Any

from torch import nn

from alphaprune import memory
from alphaprune.data import check_tokens
from alphaprune.files import first_line
from alphaprune.generate import ends_of
from alphaprune.serving import copies
from alphaprune.serving.jobs import Job
from alphaprune.serving.kv import KV, SCRATCH
from alphaprune.serving.ours import Ours, reason_against
from alphaprune.serving.request import Asked, Refused
from alphaprune.serving.stops import Stops

try:
    import transformers
    from transformers.cli.serving.utils import CBStreamer, ReasoningText, ToolCall, build_response_parser

    from alphaprune.serving.theirs import Theirs
except ImportError as error:
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("transformers"):
        raise  # what transformers needs for it
    raise ValueError(
        f"serve needs the continuous batching of transformers 5.24, and transformers {transformers.__version__} has "
        f"none or another one ({first_line(error)}); install transformers==5.24.*"
    ) from error

Piece = str | ReasoningText | ToolCall


class Engine:
    """A model that generates for many requests at once, in a thread of its own.

    tell: called with (kind, value) for each thing worth counting: prompt_tokens, generated_tokens, first_token and
    token, the last two in seconds. engine: alphaprune, transformers, or auto: ours where it can. steps: as in Steps.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        kv: KV,
        running: int,
        tell: Callable[[str, float], None],
        engine: str = "auto",
        steps: str = "auto",
    ) -> None:
        if not hasattr(tokenizer, "_tokenizer"):
            raise ValueError("serve streams through fast tokenizers, and this model has no tokenizer.json")
        self.model, self.tokenizer, self.kv, self.tell = model, tokenizer, kv, tell
        self.vocabulary: int = model.config.get_text_config().vocab_size
        self.ends = ends_of(model.generation_config)
        self.weight_bytes = sum({t.data_ptr(): t.nbytes for t in model.state_dict().values()}.values())
        self._weights = copies.weights_of(model, direct=steps != "compile")
        self.packed_bytes = sum(weight.packed.nbytes for weight in self._weights)
        reason = reason_against(model, kv.context) if engine != "transformers" else None
        if engine == "alphaprune" and reason:
            raise ValueError(f"--engine alphaprune does not serve this model: {reason}")
        ours = engine != "transformers" and reason is None
        batching: Ours | Theirs = Ours(model, kv, running, steps) if ours else Theirs(model, kv, running)
        self.batching, self.start, self.stop, self.alive = batching, batching.start, batching.stop, batching.alive
        self.running, self.queued, self.kv_used = batching.running, batching.queued, batching.kv_used
        self.forget = batching.forget

    def memory(self) -> dict[str, int]:
        """Bytes by name, of the GPU or of this process.

        packed (of the packed layers), weights (of the whole model), copies (that kernels keep of packed layers), kv,
        scratch (what is taken beside these), allocated, peak, limit (weights, copies, KV and SCRATCH).
        """
        device, kv = self.model.device, self.kv.blocks * self.kv.block_bytes
        taken, copied = memory.allocated(device), sum(weight.copied() for weight in self._weights)
        known = self.weight_bytes + copied + kv
        return {
            "packed": self.packed_bytes,
            "weights": self.weight_bytes,
            "copies": copied,
            "kv": kv,
            "scratch": max(0, taken - known),
            "allocated": taken,
            "peak": memory.peak(device),
            "limit": known + SCRATCH,
        }

    def encode(self, asked: Asked) -> list[int]:
        """The tokens of the prompt; raises Refused if there are none, or too many. May take long: not for the loop."""
        if asked.prompt is None:
            field, tokens = "messages", self._encode_chat(asked)
        else:
            field, given = "prompt", asked.prompt
            tokens = given if isinstance(given, list) else self.tokenizer(given, verbose=False)["input_ids"]
        if not tokens:
            raise Refused(400, "the prompt has no tokens")
        if len(tokens) >= self.kv.context:
            raise Refused(
                400,
                f"the prompt has {len(tokens)} tokens, and {self.kv.context - 1} fit beside a new one; shorten it",
                field,
                "context_length_exceeded",
            )
        try:
            check_tokens(tokens, self.model.config, "the prompt")
        except ValueError as error:
            raise Refused(400, str(error), field) from error
        return tokens

    def _encode_chat(self, asked: Asked) -> list[int]:
        from jinja2 import TemplateError

        if self.tokenizer.chat_template is None:
            raise Refused(
                400,
                "this model has no chat template; start the server with --chat-template FILE, or use /v1/completions",
                code="no_chat_template",
            )
        reserved = {"messages", "conversation", "tools", "documents", "chat_template", "tokenize", "return_dict"}
        reserved |= {"add_generation_prompt", "continue_final_message", "padding", "truncation", "max_length"}
        reserved |= {"return_tensors", "return_assistant_tokens_mask", "tokenizer_kwargs"}
        if wrong := sorted(reserved & asked.template.keys()):
            raise Refused(400, f"chat_template_kwargs: {wrong[0]} is not for a request to set", "chat_template_kwargs")
        try:
            found = self.tokenizer.apply_chat_template(
                asked.messages, tools=asked.tools, add_generation_prompt=True, return_dict=True, **asked.template
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            reason = first_line(error)
            raise Refused(400, f"messages: the model's chat template refuses them: {reason}", "messages") from error
        return found["input_ids"]

    def submit(self, tokens: list[int], asked: Asked, request_id: str, arrived: float) -> "Stream":
        """Queues a request; called in the event loop. arrived: perf_counter() when its client sent it."""
        if not self.alive():
            raise Refused(503, "generation has stopped after an error; restart the server", code="engine_stopped")
        return Stream(self, tokens, asked, request_id, arrived)


class Stream:
    """One request that is being generated: iterate over `pieces`, or `cancel`.

    finish: "stop", "length" or "tool_calls", once the pieces have ended; error: one sentence if it failed.
    """

    def __init__(self, engine: Engine, tokens: list[int], asked: Asked, request_id: str, arrived: float) -> None:
        self.id, self.prompt_tokens = request_id, len(tokens)
        self.tokens: list[int] = []  # the new ones
        self.finish, self.error, self.ended = "stop", None, False
        self._engine, self._before, self._stops = engine, arrived, Stops(asked.stops)
        self._queue: asyncio.Queue[Piece | None] = asyncio.Queue()
        self._limit = min(asked.most or engine.kv.context, engine.kv.context - len(tokens))
        parser = None
        if asked.prompt is None:
            parser = build_response_parser(engine.tokenizer, engine.model, tokens, tools=asked.tools)
        loop = asyncio.get_running_loop()
        self._streamer = CBStreamer(None, request_id, engine.tokenizer._tokenizer, loop, self._queue, parser)
        job = Job(request_id, tokens, self._limit, engine.ends, asked.sampling, self._take, loop)
        if not engine.batching.submit(job):
            engine.forget(request_id)
            raise Refused(503, "generation has stopped; restart the server", code="engine_stopped")
        engine.tell("prompt_tokens", len(tokens))

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """What was generated since the last time, as soon as there is anything."""
        going = True
        while going:
            items = [await self._queue.get()]
            while not self._queue.empty():
                items.append(self._queue.get_nowait())
            found: list[Piece] = []
            for item in items:
                if item is None:
                    going = False
                    item = self._stops.end()
                elif type(item) is str:
                    item = self._stops.feed(item)
                if isinstance(item, ToolCall):
                    self.finish = "tool_calls"
                if item:
                    found.append(item)
                if self._stops.found:
                    self.finish, going = "stop", False
                if not going:
                    break
            if found:
                yield found
        self.cancel()

    def cancel(self, error: str | None = None) -> None:
        """Ends the request, in whatever state it is; error: what its client is told."""
        if not self.ended:
            self.ended = True
            self.error = error
            self._engine.forget(self.id)
            self._queue.put_nowait(None)

    def _take(self, output: Any) -> None:
        """New tokens, in the event loop."""
        if self.ended:
            return
        now, new = perf_counter(), len(output.generated_tokens) - len(self.tokens)
        if new > 0:
            self._engine.tell("generated_tokens", new)
            self._engine.tell("token" if self.tokens else "first_token", (now - self._before) / new)
            self.tokens, self._before = output.generated_tokens, now
        try:
            self._streamer.put(output)
            if output.error is None and output.is_finished():
                full = len(self.tokens) >= self._limit and self.tokens[-1] not in self._engine.ends
                self.finish = "length" if full else self.finish
                self.ended = True
                self._streamer.end()
        except Exception as error:  # a parser of somebody's template, on what a model wrote
            self.cancel(f"the answer could not be parsed: {first_line(error)}")
        if output.error is not None:
            self.cancel(f"generation failed: {first_line(output.error)}")
