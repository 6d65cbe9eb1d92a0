"""How the next token of each request is chosen, whatever its neighbours in the batch asked for."""

from typing import Any

import torch
from torch import Tensor

from alphaprune.sampling import Sampling, sound

LARGEST_SEED = 2**63 - 1


def adjust(logits: Tensor, sampling: Sampling, prompt: list[int], new: list[int]) -> Tensor:
    """Scores [vocabulary] whose argmax is the next token: logits [vocabulary] float32 after `prompt` and `new` tokens.

    Sampling is by exponential races: argmax(log p − log e) with e ~ Exp(1) draws from p (Gumbel-max). The draws depend
    on the seed and the position alone, so a request gives the same tokens in every batch.
    """
    scores = logits.clone()
    if sampling.repetition != 1:
        seen = torch.tensor(sorted({*prompt, *new}), device=scores.device)
        values = scores[seen]
        scores[seen] = torch.where(values > 0, values / sampling.repetition, values * sampling.repetition)
    if new and (sampling.presence or sampling.frequency):
        seen, counts = (part.to(scores.device) for part in torch.tensor(new).unique(return_counts=True))
        scores[seen] -= sampling.presence + sampling.frequency * counts
    for token, added in sampling.bias.items():
        scores[token] += added
    if sampling.temperature == 0:
        return scores
    scores = _truncate(scores / sampling.temperature, sampling)
    generator = torch.Generator(scores.device).manual_seed((sampling.seed * 1_000_003 + len(new)) % LARGEST_SEED)
    race = torch.ones_like(scores).exponential_(generator=generator)
    return scores.log_softmax(-1) - race.log()


def _truncate(scores: Tensor, sampling: Sampling) -> Tensor:
    """Scores with −inf for the tokens that top_k, top_p and min_p exclude; the likeliest one always stays."""
    if 0 < sampling.top_k < len(scores):
        scores = scores.masked_fill(scores < scores.topk(sampling.top_k).values[-1], -torch.inf)
    if sampling.min_p > 0:
        probabilities = scores.softmax(-1)
        scores = scores.masked_fill(probabilities < sampling.min_p * probabilities.max(), -torch.inf)
    if sampling.top_p < 1:
        ordered, order = scores.softmax(-1).sort(descending=True)
        before = ordered.cumsum(-1) - ordered
        beyond = before >= sampling.top_p
        beyond[0] = False
        scores = scores.index_fill(0, order[beyond], -torch.inf)
    return scores


class Sampler:
    """What transformers' batching takes for its list of logits processors: each request has its own `Sampling`.

    Its own list knows one temperature for all requests, that of the first. The batch is sampled greedily afterwards.
    `broken` says for which requests of the last step scores were not finite, and how many tokens they had before.
    """

    do_processing = True
    tensors_required = 0  # of its int32 storage: Sampling objects travel with the requests

    def __init__(self) -> None:
        self._states: list[Any] = []
        self._sound: Tensor | None = None  # bool [states]

    def check_kwargs(self, keywords: dict[str, Any]) -> None: ...

    def fill_defaults(self, storage: Tensor) -> None: ...

    def prepare_tensor_args(self, requests_in_batch: list[Any], arg_storage: Tensor) -> Tensor:
        self._states = [request.state for request in requests_in_batch if request.has_new_token]
        return arg_storage

    def __call__(self, tokens: Tensor, scores: Tensor, arguments: Tensor) -> Tensor:
        """scores [rows, vocabulary]; the first rows belong to the requests that get a token in this step, in order."""
        self._sound = sound(scores[: len(self._states)])
        for row, state in enumerate(self._states):
            sampling = state.logit_processor_kwargs["sampling"]
            if not sampling.plain:
                scores[row] = adjust(scores[row], sampling, *_prompt_and_new(state))
        return scores

    def broken(self) -> dict[str, int]:
        if self._sound is None:
            return {}
        rows = zip(self._states, self._sound.tolist(), strict=True)
        return {state.request_id: len(_prompt_and_new(state)[1]) for state, fine in rows if not fine}


def _prompt_and_new(state: Any) -> tuple[list[int], list[int]]:
    """A request that lost its cache starts anew with what it had generated as part of its prompt."""
    length = state._true_initial_tokens or len(state.initial_tokens)
    return state.initial_tokens[:length], state.initial_tokens[length:] + state.generated_tokens
