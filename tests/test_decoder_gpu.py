"""Packed models in steps of a batch, each token given: on a GPU in graphs, where there is one, and on the CPU."""

from unittest import mock

import pytest
import torch
from test_decoder import assert_logits, build, dense_logits, dense_twin, pack, prompts
from torch import Tensor

from alphaprune.decoder import Decoder
from alphaprune.graphs import Steps
from alphaprune.kernels import cuda, group
from alphaprune.ragged import Ragged

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LENGTH, FIRST = 12, 7  # tokens of a sequence; of its prompt


def forced(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    """Logits [sequences, LENGTH − FIRST + 1, vocabulary] after the prompt and after each token that follows it."""
    batch = Ragged(Decoder(model), len(tokens), 40)
    steps, slots = Steps(batch, buckets=(len(tokens),)), [batch.open() for _ in tokens]
    found = [batch.prefill([(slot, row[:FIRST].tolist()) for slot, row in zip(slots, tokens, strict=True)]).cpu()]
    for place in range(FIRST, LENGTH):
        for slot, row in zip(slots, tokens, strict=True):
            batch.begin(slot, int(row[place]))
        found.append(steps(slots)[1].clone().cpu())
    return torch.stack(found, 1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sequences", [1, 2, 3, 8])
@pytest.mark.parametrize(
    ("kind", "dtype"), [("llama", torch.bfloat16), ("biases", torch.float16), ("qwen3", torch.bfloat16)]
)
def test_steps_are_as_exact_as_dense_ones(kind: str, dtype: torch.dtype, sequences: int, device: str) -> None:
    if device == "cuda" and (reason := cuda.missing()):
        pytest.skip(f"no CUDA kernels: {reason}")
    model = pack(build(kind, dtype))
    tokens = prompts(model, sequences, LENGTH)
    dense = dense_logits(dense_twin(model, dtype), tokens)[:, FIRST - 1 :]
    truth = dense_logits(dense_twin(model, torch.float64), tokens)[:, FIRST - 1 :]
    with mock.patch.object(group, "spmm_group", wraps=group.spmm_group) as called:
        assert_logits(forced(model.to(device), tokens), dense, truth)
    fused = any(call.kwargs.get("swiglu") or call.args[4:] == (True,) for call in called.call_args_list)
    assert fused == (device == "cuda"), "SwiGLU goes into the launch on a GPU, and there alone"
