"""Hidden states in memory and in a file are the same list, and the file is never seen."""

from pathlib import Path

import pytest
import torch
from conftest import make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import alphaprune
from alphaprune import calibrate, hardware, pruning, states
from alphaprune.model import open_source
from alphaprune.states import Room, States

STEPS = st.lists(st.tuples(st.sampled_from(("append", "set", "delete")), st.integers(0, 9), st.integers(1, 7)))


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@settings(max_examples=25, deadline=None)
@given(steps=STEPS, limit=st.integers(0, 400), dtype=st.sampled_from((torch.float32, torch.bfloat16)))
def test_whatever_is_done_to_it_it_is_a_list(steps, limit: int, dtype: torch.dtype) -> None:
    found, wanted = States(Room(limit)), []
    for place, (what, index, rows) in enumerate(steps):
        tensor = torch.randn(rows, 3, 4, generator=torch.Generator().manual_seed(place)).to(dtype)
        if what == "append" or not wanted:
            found.append(tensor), wanted.append(tensor)
        elif what == "set":
            found[index % len(wanted)] = wanted[index % len(wanted)] = tensor
        else:
            del found[index % len(wanted)], wanted[index % len(wanted)]
        assert [bits(t) for t in found] == [bits(t) for t in wanted]
        assert [t.shape for t in found.copy()[1:]] == [t.shape for t in wanted[1:]]


def test_what_exceeds_the_limit_is_in_a_file_that_no_folder_lists(tmp_path: Path) -> None:
    parts = [torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    found = States(Room(2 * parts[0].nbytes, tmp_path))
    found.extend(parts)
    assert found.spilled == 2 * parts[0].nbytes and not list(tmp_path.iterdir())
    found[3] = parts[0] + 1  # in its place
    assert found.spilled == 2 * parts[0].nbytes and torch.equal(found[3], parts[0] + 1)
    with pytest.raises(ValueError, match="no such folder"):
        Room(0, tmp_path / "nothing")
    with pytest.raises(ValueError, match="0 bytes or more"):
        Room(-1)


def test_available_memory_is_that_of_the_machine_or_less() -> None:
    total = hardware.memory().get("MemTotal", states.MODEST)
    assert 0 < states.available() <= total


def test_pruning_with_states_in_a_file_is_pruning(directory: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(calibrate, "TOKENS_AT_ONCE", 64)
    tokens = torch.randint(0, 257, (5, 32), generator=torch.Generator().manual_seed(3))
    plan = alphaprune.plan(alphaprune.analyze(directory, fit=None), 0.6, allocator="uniform")
    masks = []
    for room in (Room(1 << 30), Room(0, tmp_path)):
        blocks = pruning.prune_blocks(open_source(directory), plan, pruning.Recipe(), tokens, room=room)
        masks.append({name: mask for block in blocks for name, mask in block.masks.items()})
    assert all(torch.equal(mask, masks[1][name]) for name, mask in masks[0].items())
    live = alphaprune.prune(make_model(1), plan, tokens=tokens)
    assert all(torch.equal(mask, masks[1][name]) for name, mask in live.items())
