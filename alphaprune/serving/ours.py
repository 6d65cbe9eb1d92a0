"""Requests in one batch by our decoder: prompts in pieces, then steps that are rounded up to buckets, as CUDA graphs.

Prompts go through the kernels for many tokens (expansion and the library's product), a step through those for few.
Keys and values lie in pages. A request gets pages as it grows; when there are none left, the one that came last gives
its pages back, waits, and reads again what it had, so that its tokens stay the same. Where memory for something else
runs out, prompts are read in smaller pieces, and if that does not do, the request that came last ends with a sentence.
"""

import contextlib
import gc
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from alphaprune import memory, ragged
from alphaprune.decoder import Decoder, why_not
from alphaprune.files import first_line
from alphaprune.graphs import BUCKETS, Recorder, Steps, fetch
from alphaprune.ragged import Ragged
from alphaprune.sampling import NOT_FINITE, Kind, sound
from alphaprune.serving.jobs import Job, Output
from alphaprune.serving.kv import KV
from alphaprune.serving.shortage import BATCH_TOKENS, fewer

IDLE_SECONDS = 5
NO_TOKEN = -1  # where scores are not finite


@dataclass(eq=False)
class Progress(Job):
    """A request, and how far it is.

    source: what it has to read, its prompt and what it had of an answer; read: how many of these it has.
    new: its tokens so far; launched: their number and that of those that the device is still computing.
    """

    new: list[int] = field(default_factory=list)
    source: list[int] = field(default_factory=list)
    slot: int = -1
    read: int = 0
    launched: int = 0
    done: bool = False


def reason_against(model: nn.Module, context: int) -> str | None:
    """Why our decoder does not serve this model, in one sentence; None if it does."""
    return why_not(model.config, model) or ragged.why_not(Decoder(model), context)


class Ours:
    """A model that generates for many requests at once, in a thread of its own."""

    name = "alphaprune"

    def __init__(
        self, model: nn.Module, kv: KV, running: int, how: str = "auto", recorder: Recorder | None = None
    ) -> None:
        self.kv, self.most = kv, running
        self.ragged = Ragged(Decoder(model, direct=how != "compile"), running, kv.context, kv.blocks, kv.block)
        buckets = [*(bucket for bucket in BUCKETS if bucket < running), running]
        self.steps = Steps(self.ragged, how, buckets, recorder)
        # On a GPU a token is read while the next one is computed; on a CPU there would be nothing to wait for.
        self.late = int(self.ragged.decoder.device.type == "cuda" or recorder is not None)
        self.turns, self.batch_tokens = 0, BATCH_TOKENS
        self._inbox: deque[Progress | str] = deque()  # new requests, and the ids of cancelled ones
        self._waiting: deque[Progress] = deque()
        self._active: list[Progress] = []  # in the order in which they came
        self._pending: deque[tuple[list[Progress], Callable[[], Tensor]]] = deque()
        self._wake, self._ending = threading.Event(), False
        self._error: str | None = None
        self._thread = threading.Thread(target=self._work, name="alphaprune serve", daemon=True)

    def start(self) -> None:
        """Records the steps, generates a token and starts the thread; ValueError if it cannot."""
        try:
            slot = self.ragged.open()
            self.ragged.prefill([(slot, [0])])
            self.ragged.begin(slot, 0)
            if self.ragged.capacity > 1:
                self.steps([slot])
            self.ragged.close(slot)
            if self.late:
                self.steps.prepare()
        except Exception as error:
            raise ValueError(f"the model does not run under our batching: {first_line(error)}") from error
        self._thread.start()

    def stop(self) -> None:
        self._ending = True
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join(10)
        gc.collect()

    def alive(self) -> bool:
        return self._error is None and self._thread.is_alive() and not self._ending

    def running(self) -> int:
        return len(self._active)

    def queued(self) -> int:
        return len(self._waiting) + sum(type(one) is Progress for one in list(self._inbox))

    def kv_used(self) -> int:
        return sum(map(len, self.ragged.owned))

    def submit(self, job: Job) -> bool:
        """Queues a request; False if generation has stopped."""
        self._inbox.append(Progress(**vars(job)))
        self._wake.set()
        return self.alive()

    def forget(self, request_id: str) -> None:
        """Cancels a request: its pages are free after the current step."""
        self._inbox.append(request_id)
        self._wake.set()

    def _work(self) -> None:
        try:
            with torch.inference_mode():
                while not self._ending:
                    self._wake.clear()
                    if not self.turn():
                        self._wake.wait(IDLE_SECONDS)
            words = "the server is shutting down"
        except BaseException as error:
            words = self._error = first_line(error) or type(error).__name__
        left = [one for one in self._inbox if type(one) is Progress]
        _tell([(job, Output(list(job.new), error=words)) for job in (*self._active, *self._waiting, *left)])

    def turn(self) -> bool:
        """One round: new requests, a piece of their prompts, a step of the others. False if there was nothing to do."""
        self._sort_inbox()
        self._admit()
        busy = self._read_prompts()
        self._receive_all(but=self.late)  # on a CPU a first token waits for no step
        busy |= self._step()
        self._receive_all(but=self.late if busy else 0)
        self.turns += busy
        return busy or bool(self._active)

    def _sort_inbox(self) -> None:
        cancelled: set[str] = set()
        while self._inbox:
            one = self._inbox.popleft()
            if type(one) is Progress:
                self._waiting.append(one)
            else:
                cancelled.add(one)
        if cancelled:
            self._waiting = deque(job for job in self._waiting if job.id not in cancelled)
            for job in [job for job in self._active if job.id in cancelled]:
                self._close(job)

    def _admit(self) -> None:
        """Gives a slot, and pages for all its tokens so far, to those that wait, in order."""
        while self._waiting and len(self._active) < self.most:
            job, slot = self._waiting[0], self.ragged.open()
            source = job.prompt + job.new
            if not self.ragged.reserve(slot, len(source) + 1):
                self.ragged.close(slot)
                return
            self._waiting.popleft()
            job.source, job.slot, job.read, job.launched = source, slot, 0, len(job.new)
            self.steps.sampler.put(slot, job.sampling, job.prompt, job.new)
            self._active.append(job)

    def _read_prompts(self) -> bool:
        """Reads a piece of what requests have to read, and chooses the next token of those that are done."""
        pieces: list[tuple[Progress, list[int]]] = []
        left = self.batch_tokens
        for job in self._active:
            if piece := job.source[job.read : job.read + left]:
                pieces.append((job, piece))
                left -= len(piece)
        if not pieces:
            self.batch_tokens = BATCH_TOKENS
            return False
        try:
            self._read(pieces)
        except Exception as error:
            for job, _ in pieces:
                self.ragged.trim(job.slot, job.read)
                self.ragged.reserve(job.slot, len(job.source) + 1)  # as before, or others would take them
            if less := fewer(self.batch_tokens, error, self.ragged.decoder.device):
                self.batch_tokens = less
            else:
                self._without(pieces[-1][0], error)
        return True

    def _read(self, pieces: list[tuple[Progress, list[int]]]) -> None:
        logits = self.ragged.prefill([(job.slot, piece) for job, piece in pieces])
        ready = [i for i, (job, piece) in enumerate(pieces) if job.read + len(piece) == len(job.source)]
        if ready:
            jobs, device = [pieces[i][0] for i in ready], logits.device
            rows = memory.upload(torch.tensor(ready), device)
            slots = memory.upload(torch.tensor([job.slot for job in jobs]), device)
            kind = Kind.of(job.sampling for job in jobs)
            logits = logits[rows]
            new = self.steps.sampler.choose(logits, slots, self.ragged.lengths[slots] - 1, kind)
            self.ragged.tokens.index_copy_(0, slots, new)
            self._launch(jobs, new, logits)
        for job, piece in pieces:
            job.read += len(piece)

    def _without(self, job: Progress, error: Exception) -> None:
        """Ends a request that there is no memory for, so that the others go on."""
        self._close(job)
        _tell([(job, Output(list(job.new), error=memory.device_fault(error)))])

    def _step(self) -> bool:
        """A token for all that have read everything and may have more."""
        while jobs := [job for job in self._active if job.read == len(job.source) and job.launched < job.limit]:
            if self._make_room(jobs):
                try:
                    new, logits = self.steps([job.slot for job in jobs], Kind.of(job.sampling for job in jobs))
                except Exception as error:
                    fewer(0, error, self.ragged.decoder.device)
                    self._without(jobs[-1], error)
                    return True
                self._launch(jobs, new, logits.gather(1, new[:, None]))  # a prompt's were looked at, all of them
                return True
        return False

    def _make_room(self, jobs: Sequence[Progress]) -> bool:
        """Whether every one has a page for its next position; otherwise something was done about it: ask again."""
        for job in jobs:
            if not self.ragged.reserve(job.slot, self.ragged.held[job.slot] + 1):
                if self._pending:
                    self._receive()
                    return False
                last = self._active.pop()
                self.ragged.close(last.slot)
                self._waiting.appendleft(last)
                return False
        return True

    def _launch(self, jobs: list[Progress], new: Tensor, scores: Tensor) -> None:
        """scores: [jobs, …], those that must be numbers for the tokens to mean anything."""
        wait = fetch(torch.where(sound(scores), new, NO_TOKEN))
        for job in jobs:
            job.launched += 1
        self._pending.append((jobs, wait))

    def _receive_all(self, but: int) -> None:
        while len(self._pending) > but:
            self._receive()

    def _receive(self) -> None:
        """Takes the oldest tokens that are under way."""
        jobs, wait = self._pending.popleft()
        found = []
        for job, token in zip(jobs, wait().tolist(), strict=True):
            if job.done:  # it has ended, or was cancelled, while this token was computed
                continue
            if token == NO_TOKEN:
                self._close(job)
                found.append((job, Output(list(job.new), error=NOT_FINITE)))
                continue
            job.new.append(token)
            finished = token in job.ends or len(job.new) >= job.limit
            found.append((job, Output(list(job.new), finished)))
            if finished:
                self._close(job)
        _tell(found)

    def _close(self, job: Job) -> None:
        job.done = True
        self._active.remove(job)
        self.ragged.close(job.slot)


def _tell(found: list[tuple[Progress, Output]]) -> None:
    """Hands outputs to the event loops of their requests, all of one loop at once."""

    def deliver(group: list[tuple[Progress, Output]]) -> None:
        for job, output in group:
            job.take(output)

    loops = {id(job.loop): job.loop for job, _ in found}
    for key, loop in loops.items():
        with contextlib.suppress(RuntimeError):  # a loop that has ended: nobody listens
            loop.call_soon_threadsafe(deliver, [one for one in found if id(one[0].loop) == key])
