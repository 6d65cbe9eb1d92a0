"""Packed directories: exact, resumable, whole or not at all."""

import errno
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_model
from safetensors import safe_open

import alphaprune
from alphaprune import SparseLinear, checkpoint, shards
from alphaprune.model import open_source
from alphaprune.pruning import Recipe, prune_blocks

TOKENS = torch.randint(0, 257, (3, 32), generator=torch.Generator().manual_seed(5))


def make_plan(source, sparsity: float = 0.7):
    return alphaprune.plan(alphaprune.analyze(source, fit=None), sparsity, allocator="uniform")


def write(
    directory: Path,
    out: Path,
    stop_after: int | None = None,
    packed: bool = True,
    values: str | None = None,
    group: int | None = None,
    head: bool = False,
    **identity,
):
    source = open_source(directory)
    chosen = make_plan(directory)

    def run(restore, finish):
        blocks = prune_blocks(source, chosen, Recipe("wanda"), TOKENS, restore=restore, finish=finish)
        for count, block in enumerate(blocks):
            if count == stop_after:
                raise KeyboardInterrupt
            yield block

    identity = {"seed": 0, **identity}
    return checkpoint.write_pruned(
        source, out, identity, {"made": "here"}, run, checkpoint.Storage(packed, values, group, head)
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir())}


def twin(directory: Path):
    """The dense model with the zeros that `write` makes."""
    model = make_model(1)
    alphaprune.prune(model, make_plan(model), method="wanda", tokens=TOKENS)
    return model


def test_written_directory_loads_and_equals_its_dense_twin(directory: Path, tmp_path: Path) -> None:
    written = write(directory, tmp_path / "out")
    model, dense = alphaprune.load(tmp_path / "out"), twin(directory)
    assert sum(isinstance(m, SparseLinear) for m in model.modules()) == written.packed_layers == 21
    x = torch.arange(30)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(x).logits, dense(x).logits, rtol=1e-4, atol=1e-4)
    for name, module in model.dequantize().named_modules():
        if name.startswith("model.layers") and isinstance(module, torch.nn.Linear):
            assert torch.equal(module.weight, dense.get_submodule(name).weight)
    assert written.stored_bytes < written.dense_bytes
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (directory / "tokenizer.json").read_bytes()
    assert not (tmp_path / "out.part").exists() and not (tmp_path / "out" / "journal.json").exists()
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert settings == {"quant_method": "alphaprune", "format": "sbt", "format_version": 1}


def test_dense_format_is_plain(directory: Path, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    write(directory, tmp_path / "out", packed=False)
    plain, dense = LlamaForCausalLM.from_pretrained(tmp_path / "out"), twin(directory)
    assert all(torch.equal(plain.state_dict()[n], t) for n, t in dense.state_dict().items())


@pytest.mark.parametrize("stop_after", [0, 1, 2])
@pytest.mark.parametrize("values", [None, "int8"])
def test_an_interrupted_run_continues_to_identical_bytes(
    directory: Path, tmp_path: Path, stop_after: int, values: str | None
) -> None:
    write(directory, tmp_path / "whole", values=values)
    with pytest.raises(KeyboardInterrupt):
        write(directory, tmp_path / "out", stop_after=stop_after, values=values)
    assert not (tmp_path / "out").exists()
    part = tmp_path / "out.part"
    done = {f.name: f.stat().st_mtime_ns for f in part.glob("*.safetensors")}
    assert len(done) == stop_after
    write(directory, tmp_path / "out", values=values)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == when for name, when in done.items())  # not redone


def test_another_run_does_not_continue_this_one(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write(directory, tmp_path / "out", stop_after=1)
    before = contents(tmp_path / "out.part")
    with pytest.raises(ValueError, match=r"another seed lies here \(0, now 1\)"):
        write(directory, tmp_path / "out", seed=1)
    assert contents(tmp_path / "out.part") == before


def test_a_folder_that_is_not_empty_is_left_alone(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "diary.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        write(directory, tmp_path / "out")
    assert contents(tmp_path / "out") == {"diary.txt": b"mine"} and not (tmp_path / "out.part").exists()
    (tmp_path / "empty").mkdir()
    write(directory, tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").exists()
    with pytest.raises(ValueError, match="is a file"):
        write(directory, tmp_path / "out" / "diary.txt")


def test_a_full_disk_keeps_finished_blocks_and_shows_no_output(directory: Path, tmp_path: Path, monkeypatch) -> None:
    original, calls = shards.write, []

    def filling(file: Path, tensors):
        calls.append(file)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(file, tensors)

    monkeypatch.setattr(shards, "write", filling)
    with pytest.raises(ValueError, match="the disk is full"):
        write(directory, tmp_path / "out")
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    assert len(list((tmp_path / "out.part").glob("*.safetensors"))) == 2
    write(directory, tmp_path / "out")
    assert alphaprune.load(tmp_path / "out") is not None


def test_save_and_load_a_live_model(directory: Path, tmp_path: Path) -> None:
    model = alphaprune.load(directory)
    masks = alphaprune.prune(model, make_plan(model), method="magnitude")
    alphaprune.sparsify(model, masks)
    alphaprune.save(model, tmp_path / "saved")
    again = alphaprune.load(tmp_path / "saved")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert (tmp_path / "saved" / "tokenizer.json").exists()
    alphaprune.save(make_model(4), tmp_path / "dense")  # nothing sparse in it: a plain directory
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def test_a_packed_directory_can_be_analyzed_and_pruned_again(directory: Path, tmp_path: Path) -> None:
    write(directory, tmp_path / "out")
    source = open_source(tmp_path / "out")
    more = alphaprune.plan(alphaprune.analyze(source, fit=None), 0.8, allocator="uniform")
    masks = {n: m for b in prune_blocks(source, more, Recipe("magnitude")) for n, m in b.masks.items()}
    zeros = sum(int((~m).sum()) for m in masks.values())
    assert zeros == sum(p.zeros for p in more.layers.values())


def test_values_are_mapped_from_the_file_and_aligned(directory: Path, tmp_path: Path) -> None:
    write(directory, tmp_path / "out")
    for file in (tmp_path / "out").glob("*.safetensors"):
        start = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        for name, entry in shards.read_header(file).items():
            if name.endswith("weight") and len(entry["shape"]) == 1 and "norm" not in name:
                assert (start + entry["data_offsets"][0]) % 64 == 0, name


CORRUPTIONS = {
    "offsets": (lambda t: t + 8, "weight_offsets", "offsets"),
    "bits": (lambda t: t ^ 1, "weight_mask", "mask|bits|count"),
    "short": (lambda t: t[:64].clone(), "weight", "values|offset|weight"),
}


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_packed_files_that_disagree_are_refused_by_layer(directory: Path, tmp_path: Path, kind: str) -> None:
    write(directory, tmp_path / "out")
    change, suffix, message = CORRUPTIONS[kind]
    layer = "model.layers.1.mlp.gate_proj"
    index = json.loads((tmp_path / "out" / shards.INDEX).read_text())["weight_map"]
    file = tmp_path / "out" / index[f"{layer}.weight"]
    with safe_open(file, "pt") as stored:
        tensors = {n: stored.get_tensor(n) for n in stored.keys()}  # noqa: SIM118 - it is no dict
    tensors[f"{layer}.{suffix}"] = change(tensors[f"{layer}.{suffix}"])
    shards.write(file, tensors.items())
    with pytest.raises(ValueError, match=rf"{layer}.*({message})"), torch.no_grad():
        alphaprune.load(tmp_path / "out")(torch.arange(4)[None])


@pytest.mark.parametrize("seed", range(24))
def test_damaged_bytes_never_reach_a_kernel(directory: Path, tmp_path: Path, seed: int) -> None:
    """Bytes flipped anywhere in a packed file: a sentence, or other values, but no crash."""
    write(directory, tmp_path / "out")
    generator = random.Random(seed)
    file = generator.choice(sorted((tmp_path / "out").glob("*.safetensors")))
    content = bytearray(file.read_bytes())
    head = 8 + int.from_bytes(content[:8], "little")
    for _ in range(generator.choice((1, 3, 30))):
        place = generator.randrange(head) if seed % 4 == 0 else generator.randrange(len(content))
        content[place] ^= 1 << generator.randrange(8)
    file.write_bytes(content)
    try:
        model = alphaprune.load(tmp_path / "out")
        with torch.no_grad():
            model(torch.arange(12)[None])
    except ValueError as error:
        assert len(str(error).splitlines()) == 1


def test_headers_that_disagree_are_refused_on_loading(directory: Path, tmp_path: Path) -> None:
    write(directory, tmp_path / "out")
    config = tmp_path / "out" / "config.json"
    settings = json.loads(config.read_text())
    newer = {**settings, "quantization_config": {**settings["quantization_config"], "format_version": 2}}
    config.write_text(json.dumps(newer))
    with pytest.raises(ValueError, match="format_version 2"):
        alphaprune.load(tmp_path / "out")
    config.write_text(json.dumps({**settings, "intermediate_size": 256}))
    with pytest.raises(ValueError, match=r"mlp\.(gate|up|down)_proj"):
        alphaprune.load(tmp_path / "out")


def test_without_the_package_a_packed_directory_fails_loudly(directory: Path, tmp_path: Path) -> None:
    import subprocess
    import sys

    write(directory, tmp_path / "out")
    code = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(tmp_path / 'out')!r})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode != 0 and "mismatch" in found.stderr
    for order in ("import alphaprune, transformers", "import transformers.quantizers.auto, alphaprune"):
        found = subprocess.run([sys.executable, "-c", f"{order}; {code}"], capture_output=True, text=True)
        assert found.returncode == 0, found.stderr


def test_a_truncated_shard_is_named(directory: Path, tmp_path: Path) -> None:
    shutil.copytree(directory, tmp_path / "m")
    file = shards.checkpoint_files(tmp_path / "m")[0]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{file.name}.*copy it again"):
        alphaprune.load(tmp_path / "m")


def test_loading_never_holds_the_dense_weights(tmp_path: Path) -> None:
    """Peak memory of a process that loads 90 % pruned weights grows by far less than the dense weights would need."""
    import subprocess
    import sys

    changes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 2, "head_dim": 64}
    model = make_model(0, **changes, num_attention_heads=16)
    dense = sum(p.nbytes for p in model.model.layers.parameters())
    plan = alphaprune.plan(alphaprune.analyze(model, fit=None), 0.9, allocator="uniform")
    alphaprune.sparsify(model, alphaprune.prune(model, plan, method="magnitude"))
    alphaprune.save(model, tmp_path / "out")
    code = f"""
import alphaprune, torch, transformers
from transformers import LlamaForCausalLM

def peak():
    return 1024 * int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])

before = peak()
model = alphaprune.load({str(tmp_path / "out")!r})
with torch.no_grad():
    model(torch.tensor([[1]]))
print(peak() - before)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(found.stdout) < 0.6 * dense, (int(found.stdout), dense)
