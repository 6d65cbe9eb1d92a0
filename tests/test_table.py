"""Time tables: what they predict, which one is found, and who asks them. No test measures or asserts a time."""

import json
import logging
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tables import HERE, TOKENS, curve, linear, made

import alphaprune
from alphaprune.formats import native, sbt
from alphaprune.kernels import base, spmm, table
from alphaprune.kernels.table import Machine, Table

BF16, FP32, INT8 = torch.bfloat16, torch.float32, torch.int8


def test_what_was_measured_is_predicted_and_the_rest_lies_between() -> None:
    found = made(
        curve("a", 0.0, (4, 8, 16, 32)),
        curve("a", 0.5, (2, 4, 8, 16)),
        curve("a", 0.5, (20, 40, 80, 160), shape=(640, 640)),
        curve("dense", 0.0, (1, 1, 1, 1)),
    )

    def at(density: float, tokens: int, shape=(64, 64), dtype=FP32) -> float | None:
        return found.predict("a", shape, density, tokens, dtype, dtype)

    assert [at(1, t) for t in TOKENS] == [4, 8, 16, 32] and [at(0.5, t) for t in TOKENS] == [2, 4, 8, 16]
    assert at(0.75, 4) == pytest.approx(6)  # linear in density
    assert at(0.1, 4) == at(0.5, 4)  # past the sparsest that was measured
    assert at(1.2, 4) == at(1, 4)  # padding of tiny weights
    assert at(1, 8) == pytest.approx(8 * 2**0.5)  # a power law between 4 and 16 tokens
    assert at(1, 640) == pytest.approx(320)  # in proportion past the last
    assert at(0.5, 1, (640, 640)) == 20 and at(0.5, 1, (1280, 640)) == pytest.approx(40)
    assert at(0.5, 1, (32, 64)) == pytest.approx(1)
    middle = at(0.5, 1, (64, 640))  # ten times the weights of one, a tenth of the other
    assert middle == pytest.approx(math.sqrt(2 * 20))
    assert at(0.5, 1, dtype=BF16) is None and found.predict("b", (64, 64), 1, 1, FP32, FP32) is None
    assert found.dense((64, 64), 3, INT8, FP32) == 1 and found.dense((64, 64), 3, INT8, BF16) is None


def test_of_shapes_of_one_size_the_likest_counts() -> None:
    tall, wide = curve("a", 0, [1] * 4, shape=(400, 100)), curve("a", 0, [2] * 4, shape=(100, 400))
    found = made(tall, wide)
    predictions = [found.predict("a", shape, 1, 1, FP32, FP32) for shape in ((400, 100), (100, 400), (500, 80))]
    assert predictions == [1, 2, 1]


def test_a_kernel_that_was_given_up_has_no_seconds_for_more_tokens() -> None:
    found = made(curve("a", 0, (1, 2), tokens=(1, 4)), curve("b", 0, (5, 6, 7, 8)))
    assert found.predict("a", (64, 64), 1, 4, FP32, FP32) == 2
    assert found.predict("a", (64, 64), 1, 5, FP32, FP32) is None
    assert found.best((64, 64), 1, 4, FP32, FP32) == ("a", 2) and found.best((64, 64), 1, 16, FP32, FP32) == ("b", 7)
    assert found.best((64, 64), 1, 16, FP32, FP32, ["a"]) is None


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(1e-6, 1.0), min_size=8, max_size=8), st.floats(0, 1), st.integers(1, 64))
def test_predictions_stay_within_their_neighbours(seconds: list[float], density: float, tokens: int) -> None:
    found = made(curve("a", 0.0, seconds[:4]), curve("a", 0.9, seconds[4:]))
    predicted = found.predict("a", (64, 64), density, tokens, FP32, FP32)
    i = max(k for k in range(4) if TOKENS[k] <= tokens)
    around = [s for k in {i, min(i + 1, 3)} for s in (seconds[k], seconds[4 + k])]
    assert min(around) * (1 - 1e-9) <= predicted <= max(around) * (1 + 1e-9)


def test_break_even() -> None:
    dense = curve("dense", 0, [1.0] * 4)
    assert made(*linear("a", 1.5, 0.5), dense).break_even((64, 64), 1, FP32, FP32) == 0.51
    assert made(*linear("a", 0.9, 0.1), dense).break_even((64, 64), 1, FP32, FP32) == 0
    assert made(*linear("a", 3, 2), dense).break_even((64, 64), 1, FP32, FP32) == table.NEVER
    both = made(*linear("a", 3, 2), *linear("b", 1.2, 0.2), dense)
    assert both.break_even((64, 64), 1, FP32, FP32) == 0.21  # the better kernel counts
    assert made(*linear("a", 3, 2)).break_even((64, 64), 1, FP32, FP32) is None
    assert made(*linear("a", 3, 2), dense).break_even((64, 64), 1, BF16, BF16) is None


def test_a_file_holds_all_and_appears_whole(tmp_path: Path) -> None:
    found = made(*linear("a", 3, 2), curve("dense", 0, [1e-4] * 4))
    found.save(tmp_path / "t.json")
    loaded = Table.load(tmp_path / "t.json")
    assert (loaded.machine, loaded.threads, loaded.curves) == (found.machine, found.threads, found.curves)
    assert (loaded.bandwidth, loaded.versions, loaded.path) == (1e9, found.versions, str(tmp_path / "t.json"))
    assert list(tmp_path.iterdir()) == [tmp_path / "t.json"]
    lines = (tmp_path / "t.json").read_text().splitlines()
    assert sum('"kernel"' in line for line in lines) == 3


def damaged(change) -> str:
    content = {
        "kind": "times",
        "version": table.VERSION,
        "machine": {"cpu": "x", "model": "y", "isas": [], "cores": 1},
        "threads": 1,
        "bandwidth": 1.0,
        "versions": {},
        "curves": [
            {
                "kernel": "a",
                "weight": "float32",
                "x": "float32",
                "shape": [1, 1],
                "sparsity": 0.5,
                "tokens": [1, 2],
                "seconds": [1.0, 2.0],
            }
        ],
    }
    change(content)
    return json.dumps(content)


BAD = {
    "no JSON": ("{", "is no time table"),
    "bytes": ("\x00", "is no time table"),
    "a list": ("[]", "says of itself"),
    "a plan": ('{"kind": "plan"}', "says of itself"),
    "another version": (damaged(lambda d: d.update(version=99)), "version 99"),
    "no curves": (damaged(lambda d: d.update(curves=[])), "no curves"),
    "no machine": (damaged(lambda d: d.pop("machine")), "'machine' is missing"),
    "machine": (damaged(lambda d: d.update(machine=3)), "is no time table"),
    "no seconds": (damaged(lambda d: d["curves"][0].pop("seconds")), "'seconds' is missing"),
    "negative": (damaged(lambda d: d["curves"][0].update(seconds=[1.0, -2.0])), r"curve of a at \(1, 1\)"),
    "not a number": (damaged(lambda d: d["curves"][0].update(seconds=[1.0, float("nan")])), "is damaged"),
    "too few": (damaged(lambda d: d["curves"][0].update(seconds=[1.0])), "is damaged"),
    "falling": (damaged(lambda d: d["curves"][0].update(tokens=[2, 1])), "is damaged"),
    "nothing": (damaged(lambda d: d["curves"][0].update(tokens=[], seconds=[])), "is damaged"),
    "shape": (damaged(lambda d: d["curves"][0].update(shape=[0, 4])), "is damaged"),
    "sparsity": (damaged(lambda d: d["curves"][0].update(sparsity=1.0)), "is damaged"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_damaged_file_is_one_sentence_and_is_passed_by(kind, tmp_path, monkeypatch, caplog) -> None:
    text, message = BAD[kind]
    folder = tmp_path / "alphaprune" / "tables"
    folder.mkdir(parents=True)
    (folder / "bad.json").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        Table.load(folder / "bad.json")
    assert "\n" not in str(caught.value) and "bad.json" in str(caught.value)
    good = made(curve("a", 0, [1] * 4), machine=Machine.here(), threads=torch.get_num_threads())
    good.save(folder / "good.json")
    monkeypatch.delenv("ALPHAPRUNE_TIMES")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    table.forget()
    with caplog.at_level(logging.WARNING, "alphaprune"):
        assert table.current().path == str(folder / "good.json")
    assert sum("bad.json" in record.getMessage() for record in caplog.records) == 1
    table.forget()


def test_the_table_of_this_machine_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, threads, one = Machine.here(), torch.get_num_threads(), curve("a", 0, [1] * 4)
    shipped, own = tmp_path / "shipped", tmp_path / "cache" / "alphaprune" / "tables"
    shipped.mkdir(), own.mkdir(parents=True)
    monkeypatch.setattr(table, "SHIPPED", shipped)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("ALPHAPRUNE_TIMES")

    def found() -> str | None:
        table.forget()
        return table.current() and Path(table.current().path).relative_to(tmp_path).as_posix()

    assert found() is None
    made(one, machine=replace(here, cpu="another")).save(shipped / "another.json")
    made(one, machine=replace(here, isas=("magic",)), threads=threads).save(shipped / "isas.json")
    assert found() is None
    made(one, machine=replace(here, cores=64), threads=64).save(shipped / "large.json")
    assert found() == "shipped/large.json"
    made(one, machine=here, threads=threads, version="0.0.1").save(shipped / "small.json")
    assert found() == "shipped/small.json"
    made(one, machine=here, threads=threads, version="0.0.1").save(own / "old.json")
    assert found() == "shipped/small.json"  # the user's are of this release or none
    made(one, machine=here, threads=threads).save(own / "mine.json")
    assert found() == "cache/alphaprune/tables/mine.json"
    monkeypatch.setenv("ALPHAPRUNE_TIMES", "off")
    assert found() is None
    monkeypatch.setenv("ALPHAPRUNE_TIMES", str(shipped / "another.json"))
    assert found() == "shipped/another.json"
    monkeypatch.setenv("ALPHAPRUNE_TIMES", str(tmp_path / "nothing.json"))
    with pytest.raises(ValueError, match=r"nothing\.json: cannot be read"):
        found()
    table.forget()


def test_machines_and_threads_have_files_of_their_own() -> None:
    names = {table.file_name(m, t) for m in (HERE, replace(HERE, model="family 2")) for t in (1, 2)}
    assert len(names) == 4 and all(name.startswith("a-cpu-2-cores-") for name in names)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from([1.0, 2.0, 3.0]), min_size=8, max_size=8))
def test_the_choice_changes_at_the_limits_only(seconds: list[float]) -> None:
    if native.load() is None:
        pytest.skip(native.status())
    found = made(curve("scalar", 0, seconds[:4]), curve("expand", 0, seconds[4:]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "current", lambda device: found)
        limits = base.limits((64, 64), FP32, FP32, density=0.5)
        names = [base.choose((64, 64), t, FP32, FP32, density=0.5)[0].name for t in range(1, 100)]
        changes = [t for t in range(1, 99) if names[t - 1] != names[t]]
        assert list(limits) == changes and set(limits) <= set(found.borders)
        for t, scalar, expand in zip(TOKENS, seconds[:4], seconds[4:], strict=True):
            assert names[t - 1] == ("scalar" if scalar <= expand else "expand")  # of equal ones the preferred
    assert base.limits((64, 64), FP32, FP32, density=0.5) == base.limits((64, 64), FP32, FP32)


def test_a_prepared_weight_follows_the_table(use_table, native_only) -> None:
    use_table(made(curve("scalar", 0, (1, 3, 1, 3)), curve("expand", 0, (2, 2, 2, 2))))
    torch.manual_seed(0)
    packed = sbt.pack(torch.randn(64, 64) * (torch.rand(64, 64) < 0.5))
    prepared = spmm.prepare(packed)
    for tokens in (*range(1, 40), 64, 1000, 16, 2, 1):
        name = {1: "scalar", 4: "expand", 16: "scalar", 64: "expand"}[table.current().step(tokens)]
        kernel, why = prepared.choice(tokens, FP32)
        assert kernel.name == name and "by the time table" in why
        x = torch.randn(tokens, 64)
        assert torch.equal(prepared(x), spmm.spmm(x, packed, kernel=name)), tokens
    assert spmm.prepare(packed, kernel="scalar").choice(4, FP32)[0].name == "scalar"  # asked for
    assert prepared.choice(4, BF16)[0].name != "reference"  # the table does not know it: the order of preference


def test_kernels_that_cannot_run_are_not_taken_from_a_table(use_table, native_only, monkeypatch) -> None:
    best = next(name for name, reason in spmm.back_ends() if reason is None)
    use_table(made(curve(best, 0, [1] * 4), curve("scalar", 0, [2] * 4), curve("tensor-cores", 0, [0.1] * 4)))
    assert base.choose((64, 64), 1, FP32, FP32, density=0.5)[0].name == best
    monkeypatch.setenv("ALPHAPRUNE_ISA", "scalar")
    assert base.choose((64, 64), 1, FP32, FP32, density=0.5)[0].name == "scalar"


@pytest.fixture
def losing(use_table, native_only) -> None:
    """A table by which packed layers gain from a sparsity of 0.6 on."""
    use_table(made(*linear("scalar", 1.6, 0.6), curve("dense", 0, [1] * 4)))


SHARES = {"model.layers.0.mlp.up_proj": 0.5, "model.layers.1.mlp.up_proj": 0.7}


def masks() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.rand(200, 96, generator=generator) >= share for name, share in SHARES.items()}


def kinds(model) -> list[str]:
    return [type(model.get_submodule(name)).__name__ for name in SHARES]


def test_layers_that_lose_are_dense_in_memory_and_packed_on_disk(losing, tmp_path: Path) -> None:
    x = torch.arange(20)[None]
    with torch.no_grad():
        packed = alphaprune.sparsify(make_model(), masks(), tokens=None)
        mixed = alphaprune.sparsify(make_model(), masks())
        assert kinds(packed) == ["SparseLinear"] * 2 and kinds(mixed) == ["Linear", "SparseLinear"]
        assert (
            not mixed.get_submodule("model.layers.0.mlp.up_proj").weight[~masks()["model.layers.0.mlp.up_proj"]].any()
        )
        torch.testing.assert_close(mixed(x).logits, packed(x).logits, rtol=1e-4, atol=1e-4)
        for name, model in (("packed", packed), ("mixed", mixed)):
            alphaprune.save(model, tmp_path / name)
        for file in sorted((tmp_path / "packed").glob("*.safetensors")):
            wanted, got = load_file(file), load_file(tmp_path / "mixed" / file.name)
            assert wanted.keys() == got.keys() and all(torch.equal(got[name], wanted[name]) for name in wanted)
        assert kinds(alphaprune.load(tmp_path / "mixed")) == ["Linear", "SparseLinear"]
        again = alphaprune.load(tmp_path / "mixed", tokens=None)
        assert kinds(again) == ["SparseLinear"] * 2 and torch.equal(again(x).logits, packed(x).logits)


def test_without_a_table_nothing_is_expanded_and_integers_never_are(losing, monkeypatch) -> None:
    rounded = alphaprune.sparsify(make_model(), masks(), values="int8")
    assert kinds(rounded) == ["SparseLinear"] * 2
    monkeypatch.setenv("ALPHAPRUNE_TIMES", "off")
    assert kinds(alphaprune.sparsify(make_model(), masks())) == ["SparseLinear"] * 2


def test_tokens_are_counted(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tokens 0: wanted a whole number from 1"):
        alphaprune.sparsify(make_model(), masks(), tokens=0)
    with pytest.raises(ValueError, match="tokens -1: wanted"):
        alphaprune.load(tmp_path, tokens=-1)
