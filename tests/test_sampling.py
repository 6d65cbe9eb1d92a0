"""Choosing tokens on the device: the distributions, the settings of each sequence, and nothing read back."""

import pytest
import torch
from recorded import Fake, record_products
from test_decoder import build
from test_graphs import ragged_prompts, start
from transformers.generation import logits_process as theirs

from alphaprune.sampling import GREEDY, Kind, Sampler, Sampling, exponential, truncate
from alphaprune.serving.sampling import adjust

pytestmark = pytest.mark.usefixtures("one_thread")


def test_noise_is_exponential_and_of_its_own_for_every_draw() -> None:
    tokens = torch.arange(1000, dtype=torch.int32)
    seeds, positions = torch.arange(40) * (2**40 + 1) - 7, torch.arange(40) % 5
    noise = exponential(seeds, positions, tokens)
    assert noise.dtype == torch.float32 and (noise > 0).all() and noise.isfinite().all()
    uniform = (-noise).double().exp().flatten().sort().values
    distance = (uniform - torch.linspace(0, 1, uniform.numel(), dtype=torch.float64)).abs().max()
    assert distance < 1.95 / uniform.numel() ** 0.5  # Kolmogorov and Smirnov, one in a thousand
    one = torch.tensor([5])
    base = exponential(one, one, tokens)
    for other in (exponential(one + 2**32, one, tokens), exponential(one + 1, one, tokens),
                  exponential(one, one + 1, tokens), exponential(one, one, tokens + 1)):  # fmt: skip
        correlation = torch.corrcoef(torch.cat((base, other)))[0, 1]
        assert not torch.equal(base, other) and correlation.abs() < 4 / 1000**0.5


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -9.0])
    for sampling in (Sampling(0.7), Sampling(0.7, top_k=3), Sampling(1.0, top_p=0.9), Sampling(1.3, min_p=0.2)):
        sampler = Sampler(1, 5, torch.device("cpu"))
        found = []
        for seed in range(5):
            sampler.put(0, Sampling(**{**sampling.__dict__, "seed": seed}), [], [])
            position = torch.arange(800)
            rows = torch.zeros(800, dtype=torch.int64)
            found.append(sampler.choose(logits.expand(800, -1), rows, position, Kind.of([sampling])))
        expected = adjust_probabilities(logits, sampling)
        error = (torch.cat(found).bincount(minlength=5) / 4000 - expected).abs()
        assert (error <= 4.5 * (expected * (1 - expected) / 4000).sqrt()).all(), sampling


def adjust_probabilities(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """What a token should come with, by transformers' warpers."""
    scores, ids = logits[None] / sampling.temperature, torch.tensor([[0]])
    if sampling.top_k:
        scores = theirs.TopKLogitsWarper(sampling.top_k)(ids, scores)
    if sampling.min_p:
        scores = theirs.MinPLogitsWarper(sampling.min_p)(ids, scores)
    if sampling.top_p < 1:
        scores = theirs.TopPLogitsWarper(sampling.top_p)(ids, scores)
    return scores.softmax(-1)[0]


def test_truncation_is_that_of_transformers_row_by_row() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(60, 50, generator=generator) * 3
    top_k = torch.randint(1, 51, (60,), generator=generator)
    top_p, min_p = (torch.rand(60, generator=generator) for _ in range(2))
    min_p, top_p[::7] = min_p * 0.3, 1
    ordered, order = logits.sort(-1, descending=True)
    kept = truncate(ordered, top_k, top_p, min_p).isfinite()
    ids = torch.tensor([[0]])
    for row in range(60):
        scores = theirs.TopKLogitsWarper(int(top_k[row]))(ids, logits[row][None])
        scores = theirs.MinPLogitsWarper(float(min_p[row]))(ids, scores)
        scores = theirs.TopPLogitsWarper(float(top_p[row]))(ids, scores) if top_p[row] < 1 else scores
        assert torch.equal(kept[row], scores[0][order[row]].isfinite()), row


def test_penalties_follow_the_tokens_of_every_row() -> None:
    """Against the sampler that looks at each request on the host, through steps that a graph could hold."""
    vocabulary, generator = 30, torch.Generator().manual_seed(1)
    batch = [
        Sampling(0, repetition=1.4),
        Sampling(0),
        Sampling(0, presence=0.7, frequency=0.4, bias={3: 2.0, 5: -4.0}),
        Sampling(0, bias={7: 9.0}),
    ]
    given = [[1, 2, 2], [4], [5, 6], [9]]
    sampler, rows = Sampler(5, vocabulary, torch.device("cpu")), torch.tensor([2, 0, 3, 1])
    new: list[list[int]] = [[], [], [], []]
    for row, place in enumerate(rows.tolist()):
        sampler.put(place, batch[row], given[row], [])
    kind = Kind.of(batch)
    assert kind == (False, False, True)
    for _ in range(8):
        logits = torch.randn(4, vocabulary, generator=generator)
        found = sampler.choose(logits, rows, torch.zeros(4, dtype=torch.int64), kind).tolist()
        for row, token in enumerate(found):
            assert token == int(adjust(logits[row], batch[row], given[row], new[row]).argmax()), row
            new[row].append(token)
    sampler.put(2, batch[0], given[0], new[0])  # as after a request lost its cache
    assert torch.equal(sampler._counts[2], torch.bincount(torch.tensor(new[0]), minlength=vocabulary).float())


@pytest.mark.parametrize("sampling", [
    Sampling(0.8, seed=3), Sampling(1.2, top_k=5, top_p=0.9, seed=2**61 + 5), Sampling(1.0, repetition=1.3, seed=1)
], ids=("drawn", "truncated", "weighted"))  # fmt: skip
def test_a_seed_gives_the_same_tokens_in_every_batch_and_graph(
    sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    record_products(monkeypatch)
    model = build("llama")
    given = ragged_prompts(model)

    def run(which: list[int], **options) -> dict[int, list[int]]:
        prompts = [given[i] for i in which]
        _, steps, slots, first = start(model, prompts, **options)
        settings = [sampling if i % 2 else Sampling(0) for i in which]
        for slot, one, prompt, token in zip(slots, settings, prompts, first[0], strict=True):
            steps.sampler.put(slot, one, prompt.tolist(), [token])
        found = [steps(slots, Kind.of(settings))[0].tolist() for _ in range(8)]
        return {i: [one[place] for one in found] for place, i in enumerate(which)}

    together = run([0, 1, 2, 3, 4], recorder=Fake())
    assert together == run([0, 1, 2, 3, 4])
    for i in (0, 1, 3):
        assert run([i])[i] == together[i]
    assert len({*together[1]}) > 2


def test_kinds() -> None:
    assert Kind.of([]) == Kind.of([Sampling(0), Sampling(0, top_k=4)]) == GREEDY
    assert Kind.of([Sampling(0), Sampling(1.0)]) == (True, False, False)
    assert Kind.of([Sampling(1.0, min_p=0.1), Sampling(0, presence=1)]) == (True, True, True)
