"""Requests in one batch by the continuous batching of transformers: for models that our decoder does not know.

The only file that knows transformers' batching (generation.continuous_batching); tried with 5.24. Its HTTP application
is not taken: it gives all requests the temperature of the first, forgets `stop`, and lets every client load another
model.
"""

import gc
import logging
from time import monotonic, sleep
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.cache import group_layers_by_attn_type

from alphaprune.sampling import Sampling
from alphaprune.serving import attention
from alphaprune.serving.jobs import Job
from alphaprune.serving.kv import KV
from alphaprune.serving.sampling import Sampler

BATCH_TOKENS = 512  # of prompts in one step: longer ones are cut, so that running streams wait less
START_SECONDS = 120
QUIET_SETTINGS = {"auto_switch_to_flash": False, "use_cuda_graph": False, "use_async_batching": False}


class Theirs:
    """A model that generates for many requests at once, in a thread of transformers."""

    name = "transformers"

    def __init__(self, model: nn.Module, kv: KV, running: int) -> None:
        self.model, self.kv = model, kv
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
        alone, config = GenerationConfig(do_sample=False, eos_token_id=-1), self.model.config.get_text_config()
        if getattr(config, "attn_logit_softcapping", None) is not None:
            raise ValueError(self._refusal("it leaves the cap on attention scores out, attn_logit_softcapping"))
        with torch.inference_mode():
            self._cb = self.model.init_continuous_batching(alone, self._batching)
            self._cb.logit_processor = Sampler()
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
        self._cb.register_result_handler(job.id, job.take)
        taken = self._cb.add_request(
            job.prompt,
            request_id=job.id,
            max_new_tokens=job.limit,
            streaming=True,
            eos_token_id=sorted(job.ends) or -1,
            sampling=job.sampling,
        )
        return taken is not None

    def forget(self, request_id: str) -> None:
        with self._cb.output_router._lock:  # cancelled requests are never finished, so it would keep their handlers
            self._cb.output_router.result_handlers.pop(request_id, None)
        self._cb.cancel_request(request_id)


class _Nowhere:
    """In the place of the queue for tokens that nobody waits for: those of a step in which a request was cancelled."""

    def put(self, output: Any) -> None: ...

    def empty(self) -> bool:
        return True
