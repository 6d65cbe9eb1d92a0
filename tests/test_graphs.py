"""Ragged batches give what every sequence alone gives, also as a recorded graph."""

import weakref

import pytest
import torch
from recorded import Fake, record_products
from test_decoder import build, dense_logits, ours, pack, prompts, theirs

from alphaprune import memory
from alphaprune.decoder import Decoder
from alphaprune.formats import native
from alphaprune.graphs import BUCKETS, GREEDY, Steps
from alphaprune.kernels import cpu_attention
from alphaprune.ragged import Ragged

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = ("llama", "every head has its keys", "one key head", "mistral, window", "qwen3, window and biases")
LENGTHS = (3, 17, 9, 1, 12)


def start(model, given, capacity: int = 64, page: int = 8, **options) -> tuple[Ragged, Steps, list[int], list]:
    """A batch with the prompts in it, its steps, slots, and the first new tokens."""
    ragged = Ragged(Decoder(model), len(given), capacity, page=page)
    steps = Steps(ragged, **options)
    slots = [ragged.open() for _ in given]
    first = ragged.prefill([(slot, tokens.tolist()) for slot, tokens in zip(slots, given, strict=True)]).argmax(-1)
    for slot, token in zip(slots, first, strict=True):
        ragged.begin(slot, token)
    return ragged, steps, slots, [first.tolist()]


def decode(model, given, count: int, **options) -> list[list[int]]:
    """The new tokens of every prompt."""
    _, steps, slots, found = start(model, given, **options)
    for _ in range(count - 1):
        found.append(steps(slots)[0].tolist())
    return [list(one) for one in zip(*found, strict=True)]


def ragged_prompts(model) -> list[torch.Tensor]:
    return [prompts(model, 1, length, seed=length)[0] for length in LENGTHS]


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_of_ragged_batches_equal_transformers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    record_products(monkeypatch)
    model = build(kind)
    given = ragged_prompts(model)
    for change in (lambda model: model, pack):
        model = change(model)
        expected = [theirs(model, one[None], 12)[0].tolist() for one in given]
        fake = Fake()
        assert decode(model, given, 12, recorder=fake) == expected
        assert fake.recordings == 1
        assert decode(model, given[1:2], 12) == expected[1:2]
    assert len({token for one in expected for token in one}) > 6


class Told:
    """The native module; `told` is what each call that takes an instruction set was given as that."""

    def __init__(self) -> None:
        self.module, self.told = native.load(), set()

    def __getattr__(self, name: str) -> object:
        def call(*given: object) -> object:
            self.told.add((name, given[-1]))
            return found(*given)

        found = getattr(self.module, name)
        return call if name in ("Attention", "Dense", "Weight", "rms_norm") else found


@pytest.mark.parametrize("batched", [False, True])
def test_the_environment_limits_all_of_a_step(
    batched: bool, native_only: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, module = pack(build("qwen3, heads of 32", torch.bfloat16)), Told()
    cpu_attention._bound.cache_clear()
    monkeypatch.setenv("ALPHAPRUNE_ISA", "scalar")
    monkeypatch.setattr(native, "load", lambda: module)
    if batched:
        decode(model, ragged_prompts(model)[:2], 2)
    else:
        ours(model, prompts(model, 1, 3), 2)
    assert module.told == {(name, "scalar") for name in ("Attention", "Weight", "rms_norm")}


def test_a_graph_serves_other_sequences_lengths_and_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """One recording for two to four sequences: who they are, where their pages lie, how long they are."""
    record_products(monkeypatch)
    model, fake = pack(build("llama")), Fake()
    ragged = Ragged(Decoder(model), 4, 40, page=4)
    steps = Steps(ragged, recorder=fake, buckets=(4,))
    generator = torch.Generator().manual_seed(3)
    running: dict[int, tuple[torch.Tensor, list[int]]] = {}
    for turn in range(40):
        if turn % 3 == 0 and len(running) < 4:
            tokens = prompts(model, 1, 2 + turn % 11, seed=turn)[0]
            slot = ragged.open()
            first = ragged.prefill([(slot, tokens.tolist())])[0].argmax()
            ragged.begin(slot, first)
            running[slot] = (tokens, [int(first)])
        slots = [slot for slot in running if torch.rand(1, generator=generator) < 0.8] or list(running)
        for slot, token in zip(slots, steps(slots)[0].tolist(), strict=True):
            running[slot][1].append(token)
        for slot, (tokens, new) in list(running.items()):
            if len(new) > 9:
                assert new == theirs(model, tokens[None], len(new))[0].tolist()
                ragged.close(slot)
                del running[slot]
    assert fake.recordings == 1
    assert len(ragged.free_pages) + sum(map(len, ragged.owned)) == ragged.pages


def test_prompts_in_pieces_and_forgotten_ends() -> None:
    model = build("mistral, window")
    ragged = Ragged(Decoder(model), 2, 40, page=4)
    tokens = prompts(model, 2, 30)
    slots = [ragged.open(), ragged.open()]
    for begin, end in ((0, 5), (5, 6), (6, 21)):
        ragged.prefill([(slot, row[begin:end].tolist()) for slot, row in zip(slots, tokens, strict=True)])
    ragged.trim(slots[1], 11)
    assert len(ragged.owned[slots[1]]) == 3
    found = ragged.prefill([(slots[1], tokens[1, 11:].tolist()), (slots[0], tokens[0, 21:].tolist())])
    wanted = dense_logits(model, tokens)[:, -1]
    torch.testing.assert_close(found, wanted.flip(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_pages_that_do_not_follow_each_other_change_nothing(kind: str) -> None:
    """A prompt reads its keys where they lie, or gathers them; those after it take the same pages in the same order."""
    model = build(kind)
    given = [prompts(model, 1, length, seed=length)[0].tolist() for length in (37, 20)]
    found = []
    for order in (lambda pages: pages, lambda pages: pages[::-1], lambda pages: pages[::2] + pages[1::2]):
        ragged = Ragged(Decoder(model), 2, 64, page=8)
        ragged.free_pages = order(ragged.free_pages)
        slots = [ragged.open(), ragged.open()]
        logits = [ragged.prefill(list(zip(slots, given, strict=True)))]
        kinds = {type(ragged._rows_of(slot, len(tokens))) for slot, tokens in zip(slots, given, strict=True)}
        assert kinds == ({torch.Tensor} if found else {slice})
        logits.append(ragged.prefill([(slots[0], given[1]), (slots[1], given[0])]))  # behind what is there
        owned = ragged.owned[slots[1]]
        ragged.close(slots[1])
        ragged.open()
        logits.append(ragged.prefill([(slots[1], given[1])]))
        assert ragged.owned[slots[1]] == owned[: len(ragged.owned[slots[1]])]
        found.append(logits)
    for others in found[1:]:
        for a, b in zip(found[0], others, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_as_dense(dtype: torch.dtype) -> None:
    from test_decoder import assert_logits, dense_twin

    model = pack(build("qwen3", dtype))
    given = ragged_prompts(model)
    _, steps, slots, _ = start(model, given)
    ragged = steps.ragged
    forced = [prompts(model, 1, 6, seed=i)[0] for i in range(len(given))]
    found = []
    for place in range(6):
        for slot, tokens in zip(slots, forced, strict=True):
            ragged.begin(slot, int(tokens[place]))
        found.append(steps(slots)[1].clone())
    for i, tokens in enumerate(given):
        whole = torch.cat((tokens, forced[i]))[None]
        dense = dense_logits(dense_twin(model, dtype), whole)[:, len(tokens) :]
        truth = dense_logits(dense_twin(model, torch.float64), whole)[:, len(tokens) :]
        assert_logits(torch.stack([one[i] for one in found])[None], dense, truth)


def test_a_recording_finds_what_a_graph_would_get_wrong() -> None:
    """The fake is a test only if it fails where CUDA would."""
    model = build("llama")
    given = ragged_prompts(model)
    expected = decode(model, given, 8)
    ragged, steps, slots, found = start(model, given, recorder=Fake())
    original = ragged.step

    def frozen(rows, reach, choose):
        ragged.lengths = ragged.lengths.clone()  # a tensor that is not where it was
        return original(rows, reach, choose)

    steps._run = frozen
    for _ in range(7):
        found.append(steps(slots)[0].tolist())
    assert [list(one) for one in zip(*found, strict=True)] != expected

    _, steps, slots, _ = start(model, given, recorder=Fake())
    original_step = steps._run

    def reading(rows, reach, choose):
        return original_step(rows, int(steps.ragged.lengths.max()) + 1, choose)

    steps._run = reading
    with pytest.raises(RuntimeError, match="waits for the device"):
        steps(slots)


@pytest.mark.slow
def test_compiled_steps_give_the_same_tokens() -> None:
    model = build("llama")
    given = ragged_prompts(model)[:2]
    expected = decode(model, given, 6)
    assert decode(model, given, 6, how="compile", backend="aot_eager") == expected


def test_one_sentence_for_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    decoder = Decoder(model)
    ragged = Ragged(decoder, 3, 16, pages=3, page=8)
    steps = Steps(ragged, buckets=(1, 2))
    slots = [ragged.open() for _ in range(3)]
    with pytest.raises(ValueError, match="all 3 sequences of the batch are taken"):
        ragged.open()
    with pytest.raises(ValueError, match=r"holds 16 positions, and 17 are wanted; make the batch with a larger cap"):
        ragged.prefill([(slots[0], [1] * 17)])
    ragged.prefill([(slots[0], [1] * 16), (slots[1], [1] * 8)])
    with pytest.raises(ValueError, match="need more pages than the 0 of 3"):
        ragged.prefill([(slots[2], [1])])
    with pytest.raises(ValueError, match=r"from 1 to 2 sequences, .* and got 3; split the batch"):
        steps(slots)
    with pytest.raises(ValueError, match="all 3 pages of the batch are taken"):
        steps([slots[1]])
    with pytest.raises(ValueError, match="holds 16 positions, and 17 are wanted"):
        steps([slots[0]])
    for parts in ([], [(0, [])], [(0, [1]), (0, [1])]):
        with pytest.raises(ValueError, match="at least one part"):
            ragged.prefill(parts)
    with pytest.raises(ValueError, match="CUDA graphs need a model on a CUDA device, and this one is on cpu"):
        Steps(ragged, how="graphs")
    with pytest.raises(ValueError, match="wanted one of auto, graphs, compile, eager"):
        Steps(ragged, how="fast")
    with pytest.raises(ValueError, match=r"change past 24 positions, and 25 are asked for"):
        Ragged(Decoder(build("dynamic")), 1, 25)
    monkeypatch.setattr(memory, "free", lambda device: 10**5)
    with pytest.raises(ValueError, match=r"cpu has too little memory: .* for keys and values of 800032 positions"):
        Ragged(decoder, 8, 100_000)


def test_out_of_memory_while_recording_says_what_was_needed() -> None:
    class Full:
        def record(self, call):
            raise torch.OutOfMemoryError("CUDA out of memory")

    _, steps, slots, _ = start(build("llama"), ragged_prompts(build("llama"))[:1], recorder=Full())
    with pytest.raises(ValueError, match=r"needed \(.* for logits and hidden states of 1 sequences, .* there was no"):
        steps(slots)


def test_buckets_and_reaches_round_up() -> None:
    steps = Steps(Ragged(Decoder(build("llama")), 2, 900))
    assert [steps.bucket(n) for n in (1, 2, 3, 9, 33, 64)] == [1, 2, 4, 16, 64, 64]
    assert [steps.reach(n) for n in (1, 256, 257, 513, 900)] == [256, 256, 512, 900, 900]
    fake = Fake()
    steps.recorder = fake
    steps.prepare()
    reaches = (900, 512, 256)
    assert list(steps.recorded) == [(bucket, reach, GREEDY) for bucket in BUCKETS[::-1] for reach in reaches]


def test_the_order_of_calls_to_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warm-ups run on a stream of their own, before the recording and not in it; replays give what was recorded."""
    from contextlib import contextmanager
    from types import SimpleNamespace

    from alphaprune import graphs

    said: list[str] = []

    @contextmanager
    def within(name: str, *_: object, **options: object):
        said.append(f"{name} {options['pool']} {options['capture_error_mode']}" if options else name)
        yield
        said.append(f"end of {name}")

    stream = SimpleNamespace(wait_stream=lambda other: said.append("wait"))
    cuda = SimpleNamespace(
        graph_pool_handle=lambda: "pool",
        Stream=lambda device: stream,
        current_stream=lambda: stream,
        device=lambda device: within("device"),
        stream=lambda which: within("stream"),
        CUDAGraph=lambda: SimpleNamespace(replay=lambda: said.append("replay")),
        graph=lambda graph, **options: within("graph", **options),
    )
    monkeypatch.setattr(graphs, "torch", SimpleNamespace(cuda=cuda))

    def call() -> int:
        said.append("call")
        return len(said)

    held, replay = weakref.ref(call), graphs.Graphs(torch.device("cuda:1")).record(call)
    del call
    assert said == [
        *("device", "wait", "stream", "call", "call", "end of stream", "wait"),
        *("graph pool thread_local", "call", "end of graph", "end of device"),
    ]
    recorded = 9
    said.clear()
    assert held() is not None, "a replay keeps what it calls"
    assert replay() == replay() == recorded and said == ["device", "replay", "end of device"] * 2
