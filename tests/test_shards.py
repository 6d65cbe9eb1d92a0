"""Headers are checked, tensors are aligned, and stock safetensors reads what is written."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from alphaprune import shards

TENSORS = {
    "a.weight": torch.randn(33, dtype=torch.bfloat16),  # 66 bytes: shifts what comes after it
    "b.weight": torch.randn(16, 4),
    "c.mask": torch.arange(64, dtype=torch.int32).reshape(2, 32),
    "d.bias": torch.randn(7, dtype=torch.float16),
    "e.empty": torch.empty(0),
}


def test_round_trip_with_stock_reader_and_alignment(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    shards.write(file, TENSORS.items())
    read = load_file(file)
    assert set(read) == set(TENSORS)
    assert all(torch.equal(read[n].view(torch.uint8), t.view(torch.uint8)) for n, t in TENSORS.items() if t.numel())
    header = shards.read_header(file)
    data = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert data % 64 == 0
    for name in ("b.weight", "c.mask"):  # sizes in multiples of 64 bytes come first and stay aligned
        assert header[name]["data_offsets"][0] % 64 == 0
    assert not list(tmp_path.glob("*.part"))


@settings(max_examples=40, deadline=None)
@given(cut=st.integers(1, 5000))
def test_a_truncated_file_is_named(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    file = tmp_path_factory.mktemp("cut") / "x.safetensors"
    shards.write(file, TENSORS.items())
    data = file.read_bytes()
    file.write_bytes(data[: max(0, len(data) - cut)])
    with pytest.raises(ValueError, match=r"x\.safetensors.*copy"):
        shards.read_header(file)


@settings(max_examples=60, deadline=None)
@given(junk=st.binary(max_size=200))
def test_junk_is_no_header(tmp_path_factory: pytest.TempPathFactory, junk: bytes) -> None:
    file = tmp_path_factory.mktemp("junk") / "x.safetensors"
    file.write_bytes(junk)
    try:
        assert shards.read_header(file) == {}  # a legal empty file, should chance make one
    except ValueError as error:
        assert "x.safetensors" in str(error)


def test_rows_and_tensors_of_a_sharded_folder(directory: Path) -> None:
    found = shards.Shards(directory)
    assert len(shards.checkpoint_files(directory)) > 1
    name = "model.layers.1.mlp.up_proj.weight"
    whole = found.tensor(name)
    assert found.shape(name) == tuple(whole.shape) == (200, 96) and found.dtype(name) == "float32"
    assert torch.equal(found.rows(name, [0, 7, 199]), whole[[0, 7, 199]])
    with pytest.raises(ValueError, match="no tensor nothing"):
        found.tensor("nothing")


def test_missing_shard_twice_named_tensor_bad_index_and_pickles(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no safetensors file"):
        shards.Shards(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match="pickled"):
        shards.Shards(tmp_path)
    index = tmp_path / shards.INDEX
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    save_file({"a": torch.ones(2)}, tmp_path / "1.safetensors")
    with pytest.raises(ValueError, match=r"2\.safetensors: missing"):
        shards.Shards(tmp_path)
    save_file({"a": torch.ones(2)}, tmp_path / "2.safetensors")
    with pytest.raises(ValueError, match="a is in both"):
        shards.Shards(tmp_path)
    index.write_text("{")
    with pytest.raises(ValueError, match="no index"):
        shards.Shards(tmp_path)


def two_files(folder: Path) -> Path:
    """A folder of two files of one tensor each; returns its index."""
    for name in ("a", "b"):
        shards.write(folder / f"{name}.safetensors", [(name, torch.ones(4))])
    index = folder / shards.INDEX
    index.write_text(json.dumps({"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}))
    return index


def test_an_index_that_contradicts_itself_or_the_files(tmp_path: Path) -> None:
    index = two_files(tmp_path)
    assert shards.Shards(tmp_path).names() == ["a", "b"]
    index.write_text('{"weight_map": {"a": "a.safetensors", "b": "b.safetensors", "a": "b.safetensors"}}')
    with pytest.raises(ValueError, match=r"index\.json: names a twice"):
        shards.Shards(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "b.safetensors", "b": "a.safetensors"}}))
    with pytest.raises(ValueError, match=r"says that a is in b\.safetensors, it is in a\.safetensors"):
        shards.Shards(tmp_path)


HEADERS = {
    "twice": '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": '
    '{"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
    "hole": '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
    "overlap": '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "b": '
    '{"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
    "shape": '{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}',
}


@pytest.mark.parametrize("kind", HEADERS)
def test_headers_that_cannot_be_meant(tmp_path: Path, kind: str) -> None:
    text = HEADERS[kind].encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    message = "names a twice" if kind == "twice" else "tensors with holes between or other sizes"
    with pytest.raises(ValueError, match=rf"x\.safetensors: .*{message}.*copy"):
        shards.read_header(tmp_path / "x.safetensors")


def test_what_is_loaded_is_what_is_mapped(tmp_path: Path) -> None:
    more = {"f8": torch.randn(3, 5).to(torch.float8_e5m2), "none": torch.empty(0, 7), "one": torch.tensor(3.0)}
    tensors = {**TENSORS, **more, "yes": torch.tensor([[True, False]])}
    shards.write(tmp_path / shards.SINGLE, tensors.items())
    found = shards.Shards(tmp_path)
    for name, tensor in tensors.items():
        loaded = found.loaded(name)
        assert loaded.dtype == tensor.dtype == found.tensor(name).dtype and loaded.shape == tensor.shape
        assert bytes(loaded.reshape(-1).view(torch.uint8)) == bytes(tensor.reshape(-1).view(torch.uint8)), name
    os.truncate(tmp_path / shards.SINGLE, 700)
    with pytest.raises(ValueError, match=r"model\.safetensors: was cut off while it was read"):
        [found.loaded(name) for name in tensors]


def test_an_index_may_name_files_in_folders(tmp_path: Path) -> None:
    index = two_files(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.safetensors").rename(tmp_path / "sub" / "b.safetensors")
    index.write_text(json.dumps({"weight_map": {"a": "sub/b.safetensors", "b": "b.safetensors"}}))
    found = shards.Shards(tmp_path)
    assert torch.equal(found.tensor("a"), torch.ones(4)) and torch.equal(found.loaded("a"), torch.ones(4))


def test_a_file_that_changes_or_goes_away_is_noticed(tmp_path: Path) -> None:
    two_files(tmp_path)
    found = shards.Shards(tmp_path)
    found.check_unchanged()
    shards.write(tmp_path / "b.safetensors", [("b", torch.zeros(4))])  # of the same size
    with pytest.raises(ValueError, match=r"b\.safetensors: was changed while it was read"):
        found.check_unchanged()
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(ValueError, match=r"b\.safetensors: was removed while it was read"):
        found.check_unchanged()


def test_a_full_disk_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        shards.write(tmp_path / "x.safetensors", TENSORS.items())
    assert not list(tmp_path.iterdir())
