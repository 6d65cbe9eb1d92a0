"""Weights on huge pages: the same bits, ties and objects, and nothing where the system has no such pages."""

import copy
import os
import pickle
from pathlib import Path

import pytest
import torch
from packed import write_packed
from safetensors.torch import save_model
from torch import nn

import alphaprune
from alphaprune import memory, pages
from alphaprune.layer import SparseLinear

WITHOUT = not pages.offered()
needs_pages = pytest.mark.skipif(WITHOUT, reason="this system gives no huge pages to whoever asks for them")


class Model(nn.Module):
    """8 MB in a tied pair of tables, a packed layer, a dense one under two names and a norm."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(1500, 512)
        self.head = nn.Linear(512, 1500, bias=False)
        self.head.weight = self.embedding.weight
        self.dense = self.again = nn.Linear(512, 512)
        self.packed = SparseLinear.from_linear(nn.Linear(512, 4096), torch.rand(4096, 512) < 0.4)
        self.norm = nn.LayerNorm(512)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.norm(self.again(self.dense(self.embedding(ids))))
        return torch.cat((self.head(h), self.packed(h)), -1)


@pytest.fixture
def model() -> Model:
    return Model(int.from_bytes(os.urandom(4), "little")).eval()


def test_the_same_bits_ties_and_parameters(model: Model) -> None:
    ids = torch.randint(0, 1500, (3,))
    before, state = model(ids), {name: t.clone() for name, t in model.state_dict().items()}
    parameters = {name: id(p) for name, p in model.named_parameters()}
    assert pages.huge_pages(model) is model
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert model.head.weight.data_ptr() == model.embedding.weight.data_ptr()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]) and tensor.data_ptr() % pages.ALIGN == 0, name
    assert torch.equal(model(ids), before)  # the packed layer was bound to the old addresses


@needs_pages
def test_they_lie_on_huge_pages(model: Model) -> None:
    pages.huge_pages(model)
    for tensor in (model.embedding.weight, model.packed.weight, model.packed.weight_mask):
        assert pages.on_huge_pages(tensor.data_ptr()) >= pages.HUGE
    places = [t.data_ptr() for t in (model.embedding.weight, model.packed.weight, model.packed.weight_mask)]
    assert max(places) - min(places) < 16e6, "one mapping holds them"


@needs_pages
def test_what_lies_on_them_stays_and_page_tables_are_walked_once(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    mappings = pages.mappings
    monkeypatch.setattr(pages, "mappings", lambda told=pages.PAGES: read.append(told) or mappings(told))
    pages.huge_pages(model)
    assert read.count("/proc/self/smaps") == 1
    # Where Linux gives huge pages unasked, the heap may lie on them and a bias stay there, until the heap does no more.
    first = model.embedding.weight.data_ptr()
    block = next(one for one in mappings() if one.first <= first < one.last)
    before = [(i, place) for i, place in enumerate(places_of(model)) if block.first <= place < block.last]
    assert len(before) >= 4  # the embedding, the dense weight, the packed values and their mask at least
    pages.huge_pages(model)
    after = places_of(model)
    assert [(i, after[i]) for i, _ in before] == before and read.count("/proc/self/smaps") == 2


@needs_pages
def test_larger_models_take_several_mappings(monkeypatch: pytest.MonkeyPatch, model: Model) -> None:
    monkeypatch.setattr(pages, "TOGETHER", 1 << 20)
    ids = torch.randint(0, 1500, (2,))
    before = model(ids)
    pages.huge_pages(model)
    assert torch.equal(model(ids), before)
    assert model.head.weight.data_ptr() == model.embedding.weight.data_ptr()


def places_of(model: nn.Module) -> list[int]:
    return [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())]


@pytest.mark.parametrize("reason", ["never", "no file", "little memory", "no kind of module"])
def test_nothing_happens_without(reason: str, model: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before, kind = places_of(model), nn.Module
    if reason == "never":
        monkeypatch.setattr(pages, "SETTING", tmp_path / "enabled")
        (tmp_path / "enabled").write_text("always madvise [never]\n")
    elif reason == "no file":
        monkeypatch.setattr(pages, "SETTING", tmp_path / "enabled")
    elif reason == "little memory":
        monkeypatch.setattr(memory, "free", lambda _: 8_000_000)
        monkeypatch.setattr(memory, "anonymous", lambda: 0)
    else:
        kind = nn.Conv2d
    assert pages.huge_pages(model, kind) is model and places_of(model) == before


def test_a_system_that_refuses_the_mapping(monkeypatch: pytest.MonkeyPatch, model: Model) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    ids = torch.randint(0, 1500, (2,))
    before = model(ids)
    monkeypatch.setattr("mmap.mmap", refuse)
    assert torch.equal(pages.huge_pages(model)(ids), before)


def test_one_kind_of_module(model: Model) -> None:
    dense, packed = model.dense.weight.data_ptr(), model.packed.weight.data_ptr()
    pages.huge_pages(model, SparseLinear)
    assert model.dense.weight.data_ptr() == dense
    assert WITHOUT or model.packed.weight.data_ptr() != packed


def test_what_is_done_to_models_afterwards(model: Model, tmp_path: Path) -> None:
    ids = torch.randint(0, 1500, (2,))
    pages.huge_pages(model)
    expected = model(ids)
    assert torch.equal(copy.deepcopy(model)(ids), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(ids), expected)
    torch.save(model.state_dict(), tmp_path / "state")
    assert (tmp_path / "state").stat().st_size < 9e6
    save_model(model, str(tmp_path / "state.safetensors"))
    other = Model(1).eval()
    other.packed = copy.deepcopy(model.packed)
    pages.huge_pages(other).load_state_dict(torch.load(tmp_path / "state"))
    assert torch.equal(other(ids), expected)
    assert torch.equal(copy.deepcopy(model).share_memory()(ids), expected)
    for parameter in model.dense.parameters():
        parameter.requires_grad_()
    model(ids).sum().backward()
    assert model.dense.weight.grad is not None
    assert (model.bfloat16()(ids) - expected).norm() < 0.02 * expected.norm()


def test_the_mapping_lives_as_long_as_a_tensor_of_it(model: Model) -> None:
    pages.huge_pages(model)
    weight, expected = model.packed.weight, model.packed.weight.clone()
    del model
    for _ in range(3):
        pages.placed([torch.zeros(4 << 20, dtype=torch.uint8)])[0].fill_(7)
    assert torch.equal(weight, expected)


def test_copies_of_other_tensors() -> None:
    made = [torch.randn(1001), torch.randint(-9, 9, (7, 3), dtype=torch.int8), torch.empty(0), torch.randn(1 << 20)]
    for copied, tensor in zip(pages.placed(made), made, strict=True):
        assert torch.equal(copied, tensor) and copied.dtype == tensor.dtype and copied.shape == tensor.shape
        assert tensor.numel() == 0 or copied.data_ptr() != tensor.data_ptr()


def test_memory_for_keys_and_values() -> None:
    cpu, shape = torch.device("cpu"), (2, 3, 1 << 19)
    made = pages.empty(shape, torch.bfloat16, cpu)
    assert made.shape == shape and made.dtype == torch.bfloat16 and made.is_contiguous()
    made.fill_(1)
    assert made.sum(dtype=torch.float64) == made.numel()
    assert WITHOUT or pages.on_huge_pages(made.data_ptr()) >= pages.HUGE
    assert pages.empty((3, 5), torch.float32, cpu).shape == (3, 5)
    assert pages.empty((0, 5), torch.float32, cpu).shape == (0, 5)
    assert pages.empty(shape, torch.bfloat16, torch.device("meta")).device.type == "meta"


def test_sparsify_moves_what_it_packs() -> None:
    linear = nn.Sequential(nn.Linear(1024, 4096))
    alphaprune.sparsify(linear, {"0": torch.rand(4096, 1024) < 0.4})
    assert WITHOUT or pages.on_huge_pages(linear[0].weight.data_ptr()) >= pages.HUGE


@needs_pages
def test_load_maps_weights_or_moves_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = write_packed(tmp_path / "packed")
    monkeypatch.setattr(pages, "HUGE", 1 << 12)
    moved, mapped = alphaprune.load(folder, huge_pages=True), alphaprune.load(folder)
    files = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(".safetensors")]
    ranges = [[int(end, 16) for end in line.split(" ", 1)[0].split("-")] for line in files]

    def in_file(model: nn.Module) -> list[bool]:
        return [any(first <= place < last for first, last in ranges) for place in places_of(model)]

    assert any(in_file(mapped)) and not any(in_file(moved))
    del mapped
    assert str(folder) not in Path("/proc/self/maps").read_text(), "nothing holds the file"
    mapped = alphaprune.load(folder)
    moved.save_pretrained(tmp_path / "again")
    alphaprune.save(moved, tmp_path / "ours")
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(moved(ids).logits, mapped(ids).logits)
