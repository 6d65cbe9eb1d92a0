"""Generation in graphs, on the CPU by recordings: the tokens of transformers, with settings, ends and conversations."""

import pytest
import torch
from recorded import Fake, record_products
from test_decoder import build, dense_logits, pack, prompts, theirs
from transformers import GenerationConfig

from alphaprune import generate, rollout
from alphaprune.graphs import Steps

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Fake]:
    """Generation takes the way that it takes on a GPU; the recorders that were made."""
    record_products(monkeypatch)
    made, take = [], rollout.take

    def recorded(ragged) -> Steps:
        made.append(Fake())
        return Steps(ragged, recorder=made[-1])

    monkeypatch.setattr(generate, "in_graphs", lambda decoder, capacity: True)
    monkeypatch.setattr(rollout, "take", lambda *given: take(*given, recorded))
    return made


def new_tokens(model, tokens, count, memory=None, scores=None, seed=0, **settings) -> list[list[int]]:
    made = generate.new_tokens(model, tokens, count, GenerationConfig(**settings), seed, None, scores, memory)
    return [list(one) for one in zip(*(token.tolist() for token in made), strict=True)]


def test_greedy_tokens_scores_and_what_is_kept_between_calls(graphs: list[Fake]) -> None:
    model = pack(build("llama"))
    for length in (5, 20, 1):
        tokens, scores = prompts(model, 1, length), []
        (found,) = new_tokens(model, tokens, 12, scores=scores)
        assert found == theirs(model, tokens, 12)[0].tolist()
        whole = torch.cat((tokens, torch.tensor([found])), 1)
        dense = dense_logits(model, whole)[0, length - 1 : -1]
        torch.testing.assert_close(torch.cat(scores), dense, rtol=1e-4, atol=1e-4)
    assert len(graphs) == graphs[0].recordings == 1
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.roll(1, 0))  # another tensor: another graph
    assert new_tokens(model, tokens, 4)[0] == theirs(model, tokens, 4)[0].tolist()
    assert len(graphs) == 2


def test_it_ends_where_every_sequence_has_ended() -> None:
    model = build("llama")
    tokens = prompts(model, 1, 6)
    expected = theirs(model, tokens, 14)[0].tolist()
    place = next(i for i in range(3, 14) if expected[i] not in expected[:i])
    (found,) = new_tokens(model, tokens, 14, eos_token_id=[expected[place], 10**6])
    assert found == expected[: place + 1]
    assert new_tokens(model, tokens, 1)[0] == expected[:1]
    repeated = {"repetition_penalty": 1.3}
    assert new_tokens(model, tokens, 12, **repeated)[0] == theirs(model, tokens, 12, **repeated)[0].tolist()


def test_sampled_sequences_differ_and_come_again() -> None:
    model = build("llama")
    tokens = prompts(model, 1, 6)
    settings = {"do_sample": True, "temperature": 1.2, "top_p": 0.9, "num_return_sequences": 3}
    scores: list[torch.Tensor] = []
    found = new_tokens(model, tokens, 9, seed=4, scores=scores, **settings)
    assert len({tuple(one) for one in found}) == 3 and [len(one) for one in scores] == [3] * 9
    assert new_tokens(model, tokens, 9, seed=4, **settings) == found
    assert new_tokens(model, tokens, 9, seed=5, **{**settings, "num_return_sequences": 1})[0] == found[1]
    assert new_tokens(model, tokens, 9, seed=40, **settings) != found


def test_a_conversation_reads_only_what_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    model, memory = build("llama"), generate.Memory()
    tokens = prompts(model, 1, 10)
    (first,) = new_tokens(model, tokens, 8, memory)
    read: list[int] = []
    original = memory.steps.ragged.prefill
    monkeypatch.setattr(memory.steps.ragged, "prefill", lambda parts: read.append(len(parts[0][1])) or original(parts))
    longer = torch.cat((tokens, torch.tensor([first]), prompts(model, 1, 4, seed=3)), 1)
    (second,) = new_tokens(model, longer, 8, memory)
    assert second == theirs(model, longer, 8)[0].tolist() and read[0] <= 5
    other = torch.cat((tokens[:, :7], prompts(model, 1, 3, seed=9)), 1)
    assert new_tokens(model, other, 8, memory)[0] == theirs(model, other, 8)[0].tolist() and read[1] == 3
    assert new_tokens(model, other, 300, memory)[0][:30] == theirs(model, other, 30)[0].tolist()
    assert len(generate.step_seconds(model, 4, 3)) == 3


def test_one_that_is_left_in_the_middle_gives_its_place_back(graphs: list[Fake]) -> None:
    model = build("llama")
    tokens = prompts(model, 1, 6)
    made = generate.new_tokens(model, tokens, 9, GenerationConfig())
    next(made), next(made)
    made.close()
    assert new_tokens(model, tokens, 9)[0] == theirs(model, tokens, 9)[0].tolist()
    assert len(graphs) == 1
