"""Packed directories shared by ranks: slices and gloo by hand, and transformers under torchrun."""

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import parallel_rank
import pytest
import torch
import torch.distributed
import transformers
from guides import DOCS, blocks
from packaging.version import Version
from packed import DENSE, sparse_layers, write_packed, zeros_model
from parallel_rank import NEW, TOKENS
from torch import nn
from transformers import AutoModelForCausalLM

from alphaprune import hf_parallel
from alphaprune.formats import slices
from alphaprune.kernels import spmm
from alphaprune.layer import SparseLinear

# 128 columns of o_proj are cut at 64, a tile's edge; 192 of down_proj at 96, inside a tile.
SIZES = {
    "vocab_size": 258,
    "hidden_size": 128,
    "intermediate_size": 192,
    "head_dim": 32,
    "attention_bias": True,
    "mlp_bias": True,
}
KINDS = {
    "float": {},
    "int8": {"values": "int8"},
    "head": {"head": True, "tie_word_embeddings": True},
    "int8/128": {"values": "int8", "group": 128, "intermediate_size": 256, "head_dim": 64},
}
BAD = {
    "heads": {"num_key_value_heads": 1},
    "rows": {"intermediate_size": 201},
    "group": {"values": "int8", "group": 128, "head_dim": 64},
}
WRONG = {
    "heads": "1 key value heads cannot be shared by 2 ranks; use 1 ranks",
    "rows": "model.layers.0.mlp.gate_proj: 201 rows cannot be shared by 2 ranks; use 3, 67 or 201 ranks",
    "group": "model.layers.0.mlp.down_proj: columns from 96 on start inside a group of 128 that shares a scale",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Packed directories by kind, and those that two ranks cannot share. Do not change them."""
    root = tmp_path_factory.mktemp("folders")
    return {name: write_packed(root / name.replace("/", "-"), **SIZES | own) for name, own in (KINDS | BAD).items()}


def on_one_rank(folder: Path) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The packed model, its dense twin, and that in float64."""
    packed, dense, exact = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(3))
    return packed, dense.dequantize(), exact.dequantize().double()


@torch.no_grad()
def assert_same_model(logits: torch.Tensor, folder: Path, tokens: torch.Tensor) -> None:
    """Greedy tokens equal those of one rank; logits [1, T, V] are as near to float64 as dense torch's, times two."""
    packed, dense, exact = on_one_rank(folder)
    assert torch.equal(tokens, greedy(packed))
    truth = exact(TOKENS).logits
    allowed = 2 * (dense(TOKENS).logits.double() - truth).abs().max()
    assert (logits.double() - truth).abs().max() <= allowed


def greedy(model: nn.Module) -> torch.Tensor:
    prompt = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}
    found = model.generate(**prompt, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    return found[0, TOKENS.shape[1] :]


class Part(nn.Module):
    """A rank's slice of a packed layer, and gloo to add up what rows of the input give."""

    def __init__(self, layer: SparseLinear, by_rows: bool, group: "torch.distributed.ProcessGroupGloo") -> None:
        super().__init__()
        (n, k), share = layer.packed.shape, (group.size(), group.rank())
        self.group, self.by_rows = group, by_rows
        cut = slices.rows(layer.packed, *slices.share(n, *share))
        if not by_rows:
            cut = slices.columns(layer.packed, *slices.share(k, *share, "columns"))
        self.prepared = spmm.prepare(cut)
        self.bias = layer.bias if not by_rows or layer.bias is None else layer.bias[slice(*slices.share(n, *share))]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.prepared(x, self.bias if self.by_rows else None)
        if self.by_rows:
            return y
        self.group.allreduce([y]).wait()
        return y if self.bias is None else y + self.bias


def run_rank(model: nn.Module, group: "torch.distributed.ProcessGroupGloo", found: dict) -> None:
    torch.set_num_threads(1)
    for name, layer in sparse_layers(model).items():
        if name == "lm_head":  # whose rows would have to be gathered
            continue
        model.set_submodule(name, Part(layer, not name.endswith(("o_proj", "down_proj")), group))
    with torch.no_grad():
        found[group.rank()] = model(TOKENS).logits, greedy(model)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_with_gloo_are_one_model(folders: dict[str, Path], kind: str, ranks: int) -> None:
    """Each rank is a thread with a process group of its own: packed layers are sliced, sums go over gloo."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    folder, store, found = folders[kind], torch.distributed.HashStore(), {}
    models = [AutoModelForCausalLM.from_pretrained(folder) for _ in range(ranks)]
    if kind in ("float", "head"):  # k_proj of block 2 is dense there: cut nothing of a block that has all its heads
        for model in models:
            model.set_submodule(DENSE, SparseLinear.from_linear(model.get_submodule(DENSE)))

    def start(rank: int) -> None:
        run_rank(models[rank], torch.distributed.ProcessGroupGloo(store, rank, ranks), found)

    threads = [threading.Thread(target=start, args=(rank,), daemon=True) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=40)
    assert found.keys() == {*range(ranks)}
    for logits, tokens in found.values():
        assert torch.equal(logits, found[0][0])  # a sum over gloo is the same on every rank
        assert_same_model(logits, folder, tokens)


def torchrun(out: Path, ranks: int, folders: list[Path]) -> list[dict]:
    """What each rank of tests/parallel_rank.py left."""
    script = str(Path(__file__).with_name("parallel_rank.py"))
    options = ["--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, "-m", "torch.distributed.run", *options, script, str(out), *map(str, folders)]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(out / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


@pytest.mark.slow
@pytest.mark.skipif(Version(transformers.__version__) < Version(hf_parallel.OLDEST), reason="transformers is older")
def test_transformers_shares_a_packed_directory(folders: dict[str, Path], tmp_path: Path) -> None:
    """torchrun, two ranks, tp_plan="auto": the same model, half of every packed layer on each, bad counts refused."""
    found = torchrun(tmp_path, 2, list(folders.values()))
    for kind in KINDS:
        own, other = (rank[str(folders[kind])] for rank in found)
        for rank in (own, other):
            assert_same_model(rank["logits"], folders[kind], rank["tokens"])
            assert torch.equal(rank["decoder"].argmax(-1)[0], rank["tokens"])
            assert_halves(rank["held"], folders[kind])
            assert "not serializable" in rank["said"][0] and "load the model on one rank" in rank["said"][1]
        assert torch.equal(own["logits"], other["logits"])
        dense = on_one_rank(folders[kind])[1]
        wanted = parallel_rank.gradient(dense)
        assert (own["grad"] - wanted).abs().max() <= 1e-4 * wanted.abs().max()
        assert (own["body"] - dense.model(TOKENS).last_hidden_state).abs().max() < 1e-4
    for name, sentence in WRONG.items():
        for rank in found:
            assert sentence in rank[str(folders[name])]["refused"]


def assert_halves(held: dict[str, tuple[tuple[int, int], int]], folder: Path) -> None:
    """Every packed layer is held by half, in shape and bytes; a half has its own padding, and columns all scales."""
    whole = sparse_layers(AutoModelForCausalLM.from_pretrained(folder))
    assert held.keys() == whole.keys()
    for name, (shape, nbytes) in held.items():
        n, k = whole[name].packed.shape
        assert shape == ((n, k // 2) if name.endswith(("o_proj", "down_proj")) else (n // 2, k))
        assert nbytes < 0.62 * whole[name].packed.nbytes + 512
    assert sum(b for _, b in held.values()) < 0.6 * sum(layer.packed.nbytes for layer in whole.values())


@pytest.mark.slow
@pytest.mark.skipif(Version(transformers.__version__) < Version(hf_parallel.OLDEST), reason="transformers is older")
def test_one_rank_under_torchrun_is_the_whole_model(folders: dict[str, Path], tmp_path: Path) -> None:
    (found,) = torchrun(tmp_path, 1, [folders["float"]])
    own = found[str(folders["float"])]
    assert not own["held"]
    assert_same_model(own["logits"], folders["float"], own["tokens"])


@pytest.mark.slow
@pytest.mark.skipif(Version(transformers.__version__) < Version(hf_parallel.OLDEST), reason="transformers is older")
def test_the_guide_as_written(folders: dict[str, Path], tmp_path: Path) -> None:
    page = DOCS / "many_machines.md"
    (script,) = blocks(page, "python")
    (command,) = re.findall(r"^torchrun --standalone (.*)$", page.read_text(encoding="utf-8"), re.M)
    assert script.startswith("# shared.py\n")
    (tmp_path / "shared.py").write_text(script)
    (tmp_path / "pruned").symlink_to(folders["float"])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", *command.split()]
    settings = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(torchrun, cwd=tmp_path, env=settings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.startswith("def read"), done.stderr[-4000:]


def test_older_versions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zeros_model(**SIZES)
    assert hf_parallel.ranks_of(model) is None
    model.config.distributed_config = {"tp_size": 2, "tp_plan": {}}  # transformers then cuts nothing
    assert hf_parallel.ranks_of(model) is None
    model.config.distributed_config = {"tp_size": 2, "tp_plan": "auto"}
    monkeypatch.setattr(hf_parallel.transformers, "__version__", "5.8.1")  # other tests import it anew
    with pytest.raises(ValueError, match=r"transformers 5\.8\.1 cannot share .*: install transformers 5\.16 or newer"):
        hf_parallel.ranks_of(model)


def test_styles_that_packed_layers_do_not_have() -> None:
    layer = SparseLinear.from_linear(nn.Linear(64, 32))
    assert hf_parallel.empty_slice("a.0.b", layer, hf_parallel.Ranks(2, 0, {"a.*.c": "colwise"})) is layer
    part = hf_parallel.empty_slice("a.0.b", layer, hf_parallel.Ranks(2, 0, {"a.*.b": "colwise"}))
    assert part.held == (16, 64) and (part.out_features, part.in_features) == (32, 64)
    with pytest.raises(ValueError, match=r"a\.0\.b: packed layers cannot be shared in the style packed_colwise"):
        hf_parallel.empty_slice("a.0.b", layer, hf_parallel.Ranks(2, 0, {"a.*.b": "packed_colwise"}))
