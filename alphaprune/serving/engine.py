"""The adapter to transformers' continuous batching: prompts in, pieces of text out, one request beside the other.

The only file that knows transformers' serving internals (cli.serving and generation.continuous_batching); tried with
5.24. The batching, the paged cache and the parser of streams are transformers'. Its HTTP application is not taken: it
gives all requests the temperature of the first, forgets `stop`, and lets every client load another model.
"""

import asyncio
import gc
import logging
from collections.abc import AsyncIterator, Callable
from time import monotonic, perf_counter, sleep
from typing import Any

import torch
from torch import nn

from alphaprune.files import first_line
from alphaprune.generate import ends_of
from alphaprune.sampling import Sampling
from alphaprune.serving import attention
from alphaprune.serving.kv import KV
from alphaprune.serving.request import Asked, Refused
from alphaprune.serving.sampling import Sampler
from alphaprune.serving.stops import Stops

try:
    import transformers
    from transformers import AttentionInterface, ContinuousBatchingConfig, GenerationConfig
    from transformers.cli.serving.utils import CBStreamer, ReasoningText, ToolCall, build_response_parser
    from transformers.generation.continuous_batching.cache import group_layers_by_attn_type
except ImportError as error:
    raise ValueError(
        f"serve needs the continuous batching of transformers 5.24, and transformers {transformers.__version__} has "
        f"none or another one ({first_line(error)}); install transformers==5.24.*"
    ) from error

BATCH_TOKENS = 512  # of prompts in one step: longer ones are cut, so that running streams wait less
START_SECONDS = 120
QUIET_SETTINGS = {"auto_switch_to_flash": False, "use_cuda_graph": False, "use_async_batching": False}

Piece = str | ReasoningText | ToolCall


class Engine:
    """A model that generates for many requests at once, in a thread of its own.

    tell: called with (kind, value) for each thing worth counting: prompt_tokens, generated_tokens, first_token and
    token, the last two in seconds.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, kv: KV, running: int, tell: Callable[[str, float], None]
    ) -> None:
        if not hasattr(tokenizer, "_tokenizer"):
            raise ValueError("serve streams through fast tokenizers, and this model has no tokenizer.json")
        self.model, self.tokenizer, self.kv, self.tell = model, tokenizer, kv, tell
        self.vocabulary: int = model.config.get_text_config().vocab_size
        self.ends = ends_of(model.generation_config)
        self.weight_bytes = sum({t.data_ptr(): t.nbytes for t in model.state_dict().values()}.values())
        self._batching = ContinuousBatchingConfig(
            page_size=kv.block,
            num_blocks=kv.blocks,
            max_batch_tokens=max(BATCH_TOKENS, running),
            max_requests_per_batch=running,
            **QUIET_SETTINGS,
        )
        self._cb: Any = None

    def start(self) -> None:
        """Starts the thread and generates a token; ValueError if it cannot."""
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)  # it prints tracebacks; we report
        alone = GenerationConfig(do_sample=False, eos_token_id=-1)
        with torch.inference_mode():
            self._cb = self.model.init_continuous_batching(alone, self._batching)
            self._cb.logit_processor = Sampler()
            if set(group_layers_by_attn_type(self.model.config.get_text_config())) == {"full_attention"}:
                AttentionInterface.register(attention.NAME, attention.Paged())
                self.model.set_attn_implementation(attention.NAME)
            self._cb.start()
        self._cb.add_request([0], "first", max_new_tokens=1, sampling=Sampling(temperature=0))
        patience = monotonic() + START_SECONDS
        while (done := self._cb.get_result(timeout=0.1)) is None and self._cb.is_running() and monotonic() < patience:
            sleep(0.01)
        if done is None or done.error:
            cause = done.error if done else self._cb.background_thread_status.fatal_error or "no token in time"
            self.stop()
            raise ValueError(f"the model does not run under transformers' continuous batching: {cause}")
        self._cb.output_router.output_queue = _Nowhere()

    def stop(self) -> None:
        """Ends the thread; running requests get an error."""
        if self._cb is not None:
            self._cb.stop(block=True, timeout=10, hard_stop=True)
            gc.collect()

    def alive(self) -> bool:
        return self._cb.background_thread_status.can_accept_new_requests() is None and self._cb.is_running()

    def running(self) -> int:
        processor = self._cb.batch_processor
        return len(processor.scheduler.active_requests) if processor else 0

    def queued(self) -> int:
        processor = self._cb.batch_processor
        return self._cb.input_queue.qsize() + (len(processor.scheduler.waiting_requests) if processor else 0)

    def kv_used(self) -> int:
        """Blocks that requests hold; a block that several share counts once, one that is only remembered not at all."""
        processor = self._cb.batch_processor
        allocators = processor.cache.cache_allocators.values() if processor else ()
        return sum(len(set().union(*list(a.block_table.values()))) for a in allocators)

    def encode(self, asked: Asked) -> list[int]:
        """The tokens of the prompt; raises Refused if there are none, or too many. May take long: not for the loop."""
        if asked.prompt is None:
            tokens = self._encode_chat(asked)
        else:
            given = asked.prompt
            tokens = given if isinstance(given, list) else self.tokenizer(given, verbose=False)["input_ids"]
        if not tokens:
            raise Refused(400, "the prompt has no tokens")
        if len(tokens) >= self.kv.context:
            raise Refused(
                400,
                f"the prompt has {len(tokens)} tokens, and {self.kv.context - 1} fit beside a new one; shorten it",
                "prompt" if asked.prompt is not None else "messages",
                "context_length_exceeded",
            )
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
        return Stream(self, self._cb, tokens, asked, request_id, arrived)

    def forget(self, request_id: str) -> None:
        """Cancels a request: its KV is free after the current step, and nobody waits for its tokens any more."""
        with self._cb.output_router._lock:  # cancelled requests are never finished, so it would keep their handlers
            self._cb.output_router.result_handlers.pop(request_id, None)
        self._cb.cancel_request(request_id)


class _Nowhere:
    """In the place of the queue for tokens that nobody waits for: those of a step in which a request was cancelled."""

    def put(self, output: Any) -> None: ...

    def empty(self) -> bool:
        return True


class Stream:
    """One request that is being generated: iterate over `pieces`, or `cancel`.

    finish: "stop", "length" or "tool_calls", once the pieces have ended; error: one sentence if it failed.
    """

    def __init__(
        self, engine: Engine, cb: Any, tokens: list[int], asked: Asked, request_id: str, arrived: float
    ) -> None:
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
        self._streamer = CBStreamer(cb, request_id, engine.tokenizer._tokenizer, loop, self._queue, parser)
        # Before the request, not after it: a request of one token may be done by then.
        cb.register_result_handler(request_id, self._take)
        taken = cb.add_request(
            tokens,
            request_id=request_id,
            max_new_tokens=self._limit,
            streaming=True,
            eos_token_id=sorted(engine.ends) or -1,
            sampling=asked.sampling,
        )
        if taken is None:
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
