"""Memory runs out under the engine: smaller pieces of prompts, one request less, and never a wrong token."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import make_model
from engines import WAYS, alone, ask, generate, prompts, starting, windows_model

from alphaprune import data
from alphaprune.serving import ours, shortage, theirs
from alphaprune.serving.engine import Engine
from alphaprune.serving.shortage import BATCH_TOKENS


@pytest.fixture(params=WAYS)
def start(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Engine]]:
    yield from starting(request.param, monkeypatch)


@pytest.fixture(scope="module")
def tokenizer(directory: Path):
    return data.load_tokenizer(directory)


def short_of_memory(kind: str) -> Exception:
    if kind == "GPU":
        return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 79 GiB")
    return RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried")


def each_call(engine: Engine, monkeypatch: pytest.MonkeyPatch, where: str, seen: Callable[[int], None]) -> None:
    """Calls `seen` in each "prompt", "step" of answers alone, or "sample"; what it raises ends that.

    It is given the number of tokens of prompts, or 0. Where transformers batches, all has been computed by then.
    """
    batching = engine.batching
    if batching.name == "transformers":
        runner = batching._cb.batch_processor.model_runner
        places = dict.fromkeys(("prompt", "step"), (engine.model, "forward")) | {"sample": (runner, "logit_processor")}
    else:
        places = {"prompt": (batching.ragged, "prefill"), "step": (batching, "steps")}
        places |= {"sample": (batching.steps.sampler, "choose")}
    owner, name = places[where]
    call = getattr(owner, name)

    def tokens_of(given: tuple, named: dict) -> int:
        if where == "sample":
            return 0
        if batching.name == "transformers":
            lengths = named["cu_seq_lens_q"].diff()
            return int(lengths[lengths > 1].sum())
        return sum(len(tokens) for _, tokens in given[0]) if where == "prompt" else 0

    class Watched:
        def __call__(self, *given: object, **named: object) -> object:
            found = call(*given, **named) if batching.name == "transformers" else None
            tokens = tokens_of(given, named)
            if where == "sample" or bool(tokens) == (where == "prompt"):
                seen(tokens)
            return call(*given, **named) if found is None else found

        def __getattr__(self, name: str) -> object:
            return getattr(call, name)

    monkeypatch.setattr(owner, name, Watched())


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("kind", ["GPU", "CPU"])
def test_prompts_are_read_in_smaller_pieces_where_memory_is_short(
    kind: str, windows: bool, tokenizer, start, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start(windows_model() if windows else make_model(seed=4), tokenizer)
    asked, read = [ask(prompt, 5) for prompt in prompts(6, 256, 60)], []
    wanted = [stream.tokens for stream in generate(engine, asked)]

    def limited(tokens: int) -> None:
        read.append(tokens)
        pieces = sum(16 < one <= 50 for one in read)
        if tokens > 50 or (tokens > 16 and pieces == 3):  # the third is no beginning of a prompt
            raise short_of_memory(kind)

    each_call(engine, monkeypatch, "prompt", limited)
    found = generate(engine, asked)
    assert [stream.tokens for stream in found] == wanted
    assert not any(stream.error for stream in found) and max(read) > 50
    assert engine.alive() and engine.kv_used() == 0
    whole = engine.batching
    whole = whole.batch_tokens if whole.name == "alphaprune" else whole._cb.batch_processor.max_batch_tokens
    assert whole == BATCH_TOKENS, "the next prompt is tried as a whole again"


def test_a_prompt_that_is_read_again_keeps_its_pages(tokenizer, start, monkeypatch: pytest.MonkeyPatch) -> None:
    """A third request waits for pages of the first two, one of which has no memory at its first try."""
    engine = start(make_model(seed=4), tokenizer, blocks=9)
    asked, read = [ask([one] * 60, 2) for one in (7, 8, 9)], []
    wanted = [stream.tokens for stream in generate(engine, asked)]

    def once(tokens: int) -> None:
        read.append(tokens)
        if len(read) == 1:
            raise short_of_memory("CPU")

    each_call(engine, monkeypatch, "prompt", once)
    assert [(stream.tokens, stream.error) for stream in generate(engine, asked)] == [(new, None) for new in wanted]
    assert engine.alive() and engine.kv_used() == 0


@pytest.mark.parametrize("where", ["prompt", "sample", "step"])
def test_a_request_that_there_is_no_memory_for_ends_alone(
    where: str, tokenizer, start, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start(make_model(seed=4), tokenizer, running=3)
    asked = [ask(prompt, 8) for prompt in prompts(5, 256, 20)]
    wanted = [stream.tokens for stream in generate(engine, asked)]
    sizes = []

    def fewer(*given: object) -> int:
        sizes.append(shortage.fewer(*given))
        return sizes[-1]

    for file in (ours, theirs):
        monkeypatch.setattr(file, "fewer", fewer)

    def short(_: int) -> None:
        if engine.running() == 3 and 0 not in sizes:
            raise short_of_memory("GPU")

    each_call(engine, monkeypatch, where, short)
    found = generate(engine, asked)
    ended = [stream for stream in found if stream.error]
    assert len(ended) == 1
    assert ended[0].error.startswith("generation failed: out of memory: 2.00 GiB more could not be had; take ")
    assert ended[0].tokens == wanted[found.index(ended[0])][: len(ended[0].tokens)]
    assert all(stream.tokens == tokens for stream, tokens in zip(found, wanted, strict=True) if not stream.error)
    assert engine.alive() and engine.kv_used() == 0
    assert [stream.tokens for stream in generate(engine, asked[:2])] == wanted[:2]


@pytest.mark.parametrize("windows", [False, True])
def test_whenever_memory_is_short_answers_are_right_as_far_as_they_go(
    windows: bool, tokenizer, start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a fifth of all calls at random, with a cache that is too small for all requests at a time."""
    model = windows_model() if windows else make_model(seed=4)
    given = prompts(8, 256, 60)
    wanted = [alone(model, prompt, 12) for prompt in given]
    engine = start(model, tokenizer, blocks=9)
    draws = torch.Generator().manual_seed(0)

    def short(_: int) -> None:
        if torch.rand((), generator=draws) < 1 / 5:
            raise short_of_memory("CPU")

    for where in ("prompt", "sample", "step"):
        each_call(engine, monkeypatch, where, short)
    found = generate(engine, [ask(prompt, 12) for prompt in given])
    for stream, tokens in zip(found, wanted, strict=True):
        assert stream.tokens == tokens[: len(stream.tokens)]
        assert (stream.error is None) == (len(stream.tokens) == 12)
    assert engine.alive() and engine.kv_used() == engine.running() == engine.queued() == 0
    if start.kind == "transformers":
        cache = engine.batching._cb.batch_processor.cache
        cache.evict_cached_blocks()
        assert cache.compute_free_capacity() == 1
    else:
        assert len(engine.batching.ragged.free_pages) == 9
