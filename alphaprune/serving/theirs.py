"""Requests in one batch by the continuous batching of transformers: for models that our decoder does not know.

The only file that knows transformers' batching (generation.continuous_batching); tried with 5.24. Its HTTP application
is not taken: it gives all requests the temperature of the first, forgets `stop`, and lets every client load another
model. Its batching ends with the first step that there is no memory for; here that step is made again in smaller parts.
"""

import gc
import logging
from time import monotonic, sleep
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.cache import group_layers_by_attn_type

from alphaprune import memory
from alphaprune.sampling import NOT_FINITE, Sampling
from alphaprune.serving import attention
from alphaprune.serving.jobs import Job, Output
from alphaprune.serving.kv import KV
from alphaprune.serving.sampling import Sampler
from alphaprune.serving.shortage import BATCH_TOKENS, fewer

START_SECONDS = 120
QUIET_SETTINGS = {"auto_switch_to_flash": False, "use_cuda_graph": False, "use_async_batching": False}


class Theirs:
    """A model that generates for many requests at once, in a thread of transformers."""

    name = "transformers"

    def __init__(self, model: nn.Module, kv: KV, running: int) -> None:
        self.model, self.kv = model, kv
        self.most_tokens = self.prompt_tokens = max(BATCH_TOKENS, running)  # in one step, and of prompts
        self._batching = ContinuousBatchingConfig(
            page_size=kv.block,
            num_blocks=kv.blocks,
            max_batch_tokens=self.most_tokens,
            max_requests_per_batch=running,
            **QUIET_SETTINGS,
        )
        self._cb: Any = None
        self._sampler = Sampler()
        self._broken: dict[str, int] = {}  # requests whose scores were not finite, after how many tokens

    def start(self) -> None:
        """Starts the thread and generates a token; ValueError if it cannot."""
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)  # it prints tracebacks; we report
        alone, config = GenerationConfig(do_sample=False, eos_token_id=-1), self.model.config.get_text_config()
        if getattr(config, "attn_logit_softcapping", None) is not None:
            raise ValueError(self._refusal("it leaves the cap on attention scores out, attn_logit_softcapping"))
        with torch.inference_mode():
            self._cb = self.model.init_continuous_batching(alone, self._batching)
            self._cb.logit_processor = self._sampler
            self._cb._generation_step = self._step
            if set(group_layers_by_attn_type(config)) == {"full_attention"}:
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
            raise ValueError(self._refusal(str(cause).splitlines()[0]))
        self._cb.output_router.output_queue = _Nowhere()

    def _refusal(self, cause: str) -> str:
        return (
            f"models of type {self.model.config.model_type!r} do not run under transformers' continuous batching: "
            f"{cause}; `alphaprune generate` runs them, one text at a time"
        )

    def stop(self) -> None:
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
        """A block that several requests share counts once, one that is only remembered not at all."""
        processor = self._cb.batch_processor
        allocators = processor.cache.cache_allocators.values() if processor else ()
        return sum(len(set().union(*list(a.block_table.values()))) for a in allocators)

    def submit(self, job: Job) -> bool:
        """Queues a request, in its event loop; False if generation has stopped."""
        # Before the request, not after it: a request of one token may be done by then.
        self._cb.register_result_handler(job.id, lambda output: job.take(self._checked(job.id, output)))
        taken = self._cb.add_request(
            job.prompt,
            request_id=job.id,
            max_new_tokens=job.limit,
            streaming=True,
            eos_token_id=sorted(job.ends) or -1,
            sampling=job.sampling,
        )
        return taken is not None

    def _checked(self, request_id: str, output: Any) -> Any:
        """What is handed to a request: no token whose scores meant nothing, or that came after one."""
        whole = self._broken.get(request_id)
        if whole is None or len(output.generated_tokens) <= whole:
            return output
        return Output(output.generated_tokens[:whole], error=NOT_FINITE)

    def forget(self, request_id: str) -> None:
        self._broken.pop(request_id, None)
        with self._cb.output_router._lock:  # cancelled requests are never finished, so it would keep their handlers
            self._cb.output_router.result_handlers.pop(request_id, None)
        self._cb.cancel_request(request_id)

    def _step(self) -> None:
        """A step in the thread of transformers; one that there is no memory for is as if it had not been."""
        processor = self._cb.batch_processor
        made, scheduler = processor.inputs_and_outputs, processor.scheduler
        try:
            processor._generation_step(self.model)
        except Exception as error:
            batch, made.requests_in_batch = made.requests_in_batch, []  # who gets a token by it
            answering = self._take_back(batch, error)
            made.retrieve_device_outputs()  # waits until the device has done the part that it was given
        else:
            answering = sum(one.has_new_token for one in made.requests_in_batch)
            for request_id, tokens in self._sampler.broken().items():
                if request_id in self._cb.output_router.result_handlers:  # it may have been cancelled
                    self._broken.setdefault(request_id, tokens)
        if not scheduler.waiting_requests and not any(
            s.remaining_prefill_tokens for s in scheduler.active_requests.values()
        ):
            self.prompt_tokens = self.most_tokens  # the next prompt is tried as a whole again
        processor.max_batch_tokens = min(self.most_tokens, answering + self.prompt_tokens)

    def _take_back(self, batch: list[Any], error: Exception) -> int:
        """Has the requests of a step do it again in smaller parts, or ends the last, as in ours.py; how many answer.

        Answers go on behind the token that they had. Prompts are read again from their beginning, because the keys of
        a part of one lie where attention in windows had those before it. Raises what is no want of memory.
        """
        processor = self._cb.batch_processor
        scheduler, prompts = processor.scheduler, [one for one in batch if not one.state.generated_tokens]
        if less := fewer(sum(one.query_length for one in prompts), error, self.model.device):
            self.prompt_tokens = less
        else:
            last = batch.pop().state
            scheduler.finish_request(last.request_id)
            processor.output_router.fail_and_deliver(last, RuntimeError(memory.device_fault(error)))
        answers = [one.state for one in batch if one.state.generated_tokens]
        for state in answers:
            state.position_offset -= 1
            state.tokens_to_process = state.generated_tokens[-1:]
        for state in reversed([one.state for one in batch if not one.state.generated_tokens]):
            scheduler.finish_request(state.request_id)
            scheduler.waiting_requests[state.request_id] = state.create_equivalent_initial_request()
            scheduler.waiting_requests_order.appendleft(state.request_id)
        scheduler.block_new_requests = False  # which it does until a request has finished
        return len(answers)


class _Nowhere:
    """In the place of the queue for tokens that nobody waits for: those of a step in which a request was cancelled."""

    def put(self, output: Any) -> None: ...

    def empty(self) -> bool:
        return True
