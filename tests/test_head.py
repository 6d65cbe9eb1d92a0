"""The output layer with int8 values: in memory, in directories, tied or not, and in everything that reads them."""

import importlib
import json
import sys
from pathlib import Path

import family_models
import pytest
import torch
from conftest import ROOT, make_model, write_tokenizer
from family_models import KINDS, WHOLES
from packed import DENSE, logits, write_packed, zeros_model
from test_checkpoint import contents, write
from transformers import AutoModelForCausalLM

import alphaprune
from alphaprune import AlphaPruneConfig, SparseLinear, convert, evaluate, generate, inspection, shards
from alphaprune.formats import quantize, sbt
from alphaprune.model import open_source

HEAD = "lm_head"
PARTS = tuple(f"{HEAD}.{suffix}" for suffix in ("weight", "weight_mask", "weight_offsets", "weight_scale"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Dense directories by whether the output layer is the matrix of embeddings. Do not change them."""
    found = {}
    for tied in (False, True):
        found[tied] = tmp_path_factory.mktemp("models") / f"tied-{tied}"
        make_model(1, tie_word_embeddings=tied).save_pretrained(found[tied], max_shard_size="300KB")
        write_tokenizer(found[tied])
    return found


def values_of(weight: torch.Tensor, group: int | None = None) -> torch.Tensor:
    integers, scale, _ = quantize.quantize(weight.detach(), None, group)
    return quantize.dequantize(integers, scale, weight.dtype)


def settings(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("group", [None, 128])
@pytest.mark.parametrize("tied", [False, True])
def test_a_live_model(tied: bool, group: int | None) -> None:
    model, dense = (make_model(1, tie_word_embeddings=tied) for _ in range(2))
    weight = values_of(dense.lm_head.weight, group)
    assert alphaprune.round_head(model, group) is model
    layer = model.lm_head
    assert isinstance(layer, SparseLinear) and layer.weight.dtype == torch.int8 and layer.name == HEAD
    assert torch.equal(layer.to_linear().weight, weight) and 0 < layer.quantization_error.relative < 0.01
    assert torch.equal(model.get_input_embeddings().weight, dense.get_input_embeddings().weight)
    assert not model.config.tie_word_embeddings and model.get_output_embeddings() is layer
    model.tie_weights()
    dense.lm_head.weight = torch.nn.Parameter(weight)
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-5)
    alphaprune.round_head(model, group)
    assert model.lm_head is layer  # once is enough


@pytest.mark.parametrize("values", [None, "int8"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_pruned_directory(folders: dict[bool, Path], tmp_path: Path, tied: bool, values: str | None) -> None:
    written = write(folders[tied], tmp_path / "out", values=values, head=True)
    write(folders[tied], tmp_path / "dense", values=values)
    assert written.packed_layers == 21 and HEAD in written.errors and len(written.errors) == (22 if values else 1)
    config = settings(tmp_path / "out")
    assert config["quantization_config"]["head"] == "int8" and config["tie_word_embeddings"] is False
    assert config["quantization_config"].get("values") == values
    assert HEAD in json.loads((tmp_path / "out" / "alphaprune.json").read_text())["quantization_error"]
    names = set(shards.Shards(tmp_path / "out").names())
    assert names >= {*PARTS, "model.embed_tokens.weight"}
    model, twin = alphaprune.load(tmp_path / "out"), alphaprune.load(tmp_path / "dense")
    assert torch.equal(model.lm_head.to_linear().weight, values_of(twin.lm_head.weight))
    alphaprune.round_head(twin)
    assert torch.equal(logits(model), logits(twin))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, twin.state_dict()[name]), name


@pytest.mark.parametrize("tied", [False, True])
def test_saved_and_converted(folders: dict[bool, Path], tmp_path: Path, tied: bool) -> None:
    """Packed stays packed, dense takes the values that it has, and nothing is rounded twice."""
    write(folders[tied], tmp_path / "out", head=True)
    model = alphaprune.load(tmp_path / "out")
    wanted = logits(model)
    alphaprune.save(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    write(tmp_path / "out", tmp_path / "again")  # pruned once more: its head is what it was
    for folder in ("ours", "theirs", "again"):
        stored = shards.Shards(tmp_path / folder)
        for name in PARTS:
            assert torch.equal(stored.tensor(name), model.state_dict()[name]), (folder, name)
        found = settings(tmp_path / folder)
        assert found["quantization_config"]["head"] == "int8" and found["tie_word_embeddings"] is False, folder
    for folder in ("ours", "theirs"):
        assert torch.equal(logits(alphaprune.load(tmp_path / folder)), wanted)
    convert.convert(tmp_path / "out", tmp_path / "plain", packed=False)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert "quantization_config" not in settings(tmp_path / "plain")
    assert torch.equal(plain.lm_head.weight, model.lm_head.to_linear().weight)
    torch.testing.assert_close(logits(plain), wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="the values of its output layer lm_head are int8 already"):
        convert.convert(tmp_path / "out", tmp_path / "more", rounded_head=True)
    with pytest.raises(ValueError, match="packed already"):
        convert.convert(tmp_path / "out", tmp_path / "more")
    convert.convert(tmp_path / "out", tmp_path / "more", values="int8")
    assert torch.equal(shards.Shards(tmp_path / "more").tensor(PARTS[0]), model.lm_head.weight)


@pytest.mark.parametrize("group", [None, 128])
@pytest.mark.parametrize("kind", ["packed", "dense"])
def test_converted_to_int8(tmp_path: Path, kind: str, group: int | None) -> None:
    """Also where it is the only layer that changes: blocks without a zero stay dense."""
    if kind == "packed":
        write_packed(tmp_path / "old")
    else:
        make_model(1).save_pretrained(tmp_path / "old")
        write_tokenizer(tmp_path / "old")
    done = convert.convert(tmp_path / "old", tmp_path / "new", group=group, rounded_head=True)
    assert list(done.written.errors) == [HEAD] and done.written.packed_layers == (20 if kind == "packed" else 0)
    old, new = (alphaprune.load(tmp_path / name) for name in ("old", "new"))
    assert torch.equal(new.lm_head.to_linear().weight, values_of(old.lm_head.weight, group))
    assert new.lm_head.weight_scale.dim() == (1 if group is None else 2)


def test_int8_layers_of_blocks_stay_as_they_are(tmp_path: Path) -> None:
    write_packed(tmp_path / "old", values="int8", group=128)
    convert.convert(tmp_path / "old", tmp_path / "new", rounded_head=True)
    old, new = (shards.Shards(tmp_path / name) for name in ("old", "new"))
    assert set(new.names()) == {*old.names(), *PARTS}
    for name in set(old.names()) - {*PARTS}:
        assert torch.equal(old.tensor(name), new.tensor(name)), name
    found = settings(tmp_path / "new")["quantization_config"]
    assert (found["values"], found["head"]) == ("int8", "int8")


def test_a_run_that_was_stopped_ends_as_if_nothing_had_been(folders: dict[bool, Path], tmp_path: Path) -> None:
    write(folders[True], tmp_path / "whole", head=True)
    with pytest.raises(KeyboardInterrupt):
        write(folders[True], tmp_path / "out", stop_after=2, head=True)
    write(folders[True], tmp_path / "out", head=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_packs_it_while_loading(folders: dict[bool, Path], tied: bool) -> None:
    asked = AlphaPruneConfig(values="int8", head="int8")
    model = AutoModelForCausalLM.from_pretrained(folders[tied], quantization_config=asked)
    twin = alphaprune.round_head(alphaprune.sparsify(alphaprune.load(folders[tied]), values="int8"))
    assert isinstance(model.lm_head, SparseLinear) and torch.equal(logits(model), logits(twin))
    with pytest.raises(ValueError, match="head 'int4': wanted int8, or none"):
        AlphaPruneConfig(head="int4")


def test_models_without_such_a_layer() -> None:
    inner = make_model(1).model
    with pytest.raises(ValueError, match="LlamaModel has no linear layer as its output"):
        alphaprune.round_head(inner)
    broken = make_model(1)
    broken.lm_head.weight.data[3, 2] = torch.nan
    with pytest.raises(ValueError, match="lm_head: NaN and infinity have no place among int8 values"):
        alphaprune.round_head(broken)
    assert isinstance(broken.lm_head, torch.nn.Linear)


def test_nan_in_a_directory_leaves_nothing(tmp_path: Path) -> None:
    model = zeros_model()
    model.lm_head.weight.data[3, 2] = torch.nan
    model.save_pretrained(tmp_path / "old")
    write_tokenizer(tmp_path / "old")
    seen: list[str] = []
    with pytest.raises(ValueError, match="lm_head: NaN and infinity have no place among int8 values"):
        convert.convert(tmp_path / "old", tmp_path / "new", rounded_head=True, progress=seen.append)
    assert not seen  # before the first block
    assert {path.name for path in tmp_path.iterdir()} == {"old"}


def test_a_damaged_one_is_named(folders: dict[bool, Path], tmp_path: Path) -> None:
    write(folders[False], tmp_path / "out", head=True)
    file = tmp_path / "out" / json.loads((tmp_path / "out" / shards.INDEX).read_text())["weight_map"][PARTS[0]]
    with shards.open_file(file) as old:
        tensors = {name: old.get_tensor(name) for name in old.keys()}  # noqa: SIM118 - it is no dict
    shards.write(file, [(name, tensor) for name, tensor in tensors.items() if name != PARTS[3]])
    for read in (alphaprune.load, open_source, inspection.describe_model):
        with pytest.raises(ValueError, match=r"lm_head.*weight_scale.* missing"):
            read(tmp_path / "out")


@pytest.mark.parametrize("tied", [False, True])
def test_what_reads_it(folders: dict[bool, Path], tmp_path: Path, tied: bool) -> None:
    """Our decoder, transformers, evaluation, analysis and info."""
    write(folders[tied], tmp_path / "out", head=True)
    model = alphaprune.load(tmp_path / "out")
    prompt = torch.arange(3, 12)[None]
    wanted = model.generate(prompt, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(prompt))
    assert generate.why_not(model.config, model) is None
    made = generate.GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=None)
    tokens = [int(token) for token in generate.new_tokens(model, prompt, 12, made)]
    assert tokens == wanted[0, prompt.shape[1] :].tolist()
    plain = alphaprune.load(tmp_path / "out").dequantize()
    text = torch.randint(0, 257, (2, 40), generator=torch.Generator().manual_seed(3))
    states = [m.model(text).last_hidden_state for m in (model, plain)]
    found, exact = (evaluate.judge(m, text, s) for m, s in zip((model, plain), states, strict=True))
    torch.testing.assert_close(found.losses, exact.losses, rtol=1e-4, atol=1e-5)
    assert alphaprune.analyze(tmp_path / "out", fit=None).layers
    info = inspection.describe_model(tmp_path / "out")
    packed = model.lm_head.packed
    assert info["head"]["stored"] == "sbt int8" and info["head"]["bytes"] == packed.nbytes
    assert info["head"]["dense_bytes"] == 4 * packed.shape[0] * packed.shape[1]
    assert len(info["layers"]) == 21 and f"{HEAD} sbt int8" in inspection.model_summary(info)
    dense = inspection.describe_model(folders[tied])
    assert (dense["head"] is None) is tied  # then it is no layer of its own
    weights = sum(parameter.numel() for parameter in plain.parameters())
    assert info["whole_model_sparsity"] == pytest.approx(info["sparsity"] * info["prunable_weights"] / weights)
    assert sbt.kept(packed) == packed.shape[0] * packed.shape[1]


def test_commands(run, own_copy: Path, tmp_path: Path) -> None:
    status, said, _ = run("prune", "m", "-o", "out", "--sparsity", "0.5", "--method", "magnitude", "--head", "int8")
    assert status == 0 and "over 1 layers" in said and HEAD in said
    recipe = json.loads((tmp_path / "out" / "alphaprune.json").read_text())
    assert recipe["head"] == "int8" and recipe["format"] == "sbt" and recipe["values"] is None
    status, said, _ = run("info", "out")
    assert status == 0 and f"{HEAD} sbt int8" in said
    status, _, error = run("generate", "out", "--prompt", "a heavy", "--max-new", "4")
    assert status == 0, error
    status, said, _ = run("eval", "out", "--text", "text", "--length", "32", "--json")
    assert status == 0 and json.loads(said)["perplexity"] > 1
    status, _, error = run("info", "out", "--activations", "int8")
    assert status == 0, error
    status, said, _ = run("convert", "m", "new", "--head", "int8", "--group", "128", "--json")
    assert status == 0 and list(json.loads(said)["quantization_error"]) == [HEAD]
    for wrong, sentence in {
        ("convert", "m", "x", "--head", "int8", "--format", "dense"): "--head int8 is a way to pack weights",
        (
            "prune",
            "m",
            "-o",
            "x",
            "--sparsity",
            "0.5",
            "--method",
            "magnitude",
            "--group",
            "128",
        ): "--group 128 belongs to",
        ("convert", "out", "x", "--head", "int8"): "the values of its output layer lm_head are int8 already",
    }.items():
        status, _, error = run(*wrong)
        assert status == 2 and sentence in error and not (tmp_path / "x").exists()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, *WHOLES])
def test_every_family(kind: str, tied: bool, tmp_path: Path) -> None:
    """From a directory and in memory it is the same model; what files call the layer is up to the family."""
    family_models.skip_older(kind)
    model = family_models.make(kind, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "old")
    convert.convert(tmp_path / "old", tmp_path / "new", rounded_head=True)
    made = alphaprune.load(tmp_path / "new")
    alphaprune.round_head(model)
    layer, other = model.get_output_embeddings(), made.get_output_embeddings()
    assert isinstance(layer, SparseLinear) and isinstance(other, SparseLinear)
    assert torch.equal(layer.weight, other.weight) and torch.equal(layer.weight_scale, other.weight_scale)
    found, wanted = family_models.logits(made), family_models.logits(model)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    convert.convert(tmp_path / "new", tmp_path / "plain", packed=False)
    torch.testing.assert_close(family_models.logits(alphaprune.load(tmp_path / "plain")), wanted, rtol=1e-4, atol=1e-4)


def test_recovery_leaves_it_alone(run, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="PEFT is not installed: pip install 'alphaprune[peft]'")
    write_packed(tmp_path / "p", head=True)
    (tmp_path / "text").write_text("a heavy tail, and so on. " * 60)
    few = ("--steps", "2", "--batch", "2", "--rank", "4", "--windows", "2", "--length", "32", "--calibration", "text")
    for form in ("sbt", "dense"):
        status, _, error = run("recover", "p", "-o", form, *few, "--format", form)
        assert status == 0, error
    old, new, plain = (shards.Shards(tmp_path / name) for name in ("p", "sbt", "dense"))
    assert all(torch.equal(old.tensor(name), new.tensor(name)) for name in PARTS)
    assert settings(tmp_path / "sbt")["quantization_config"]["head"] == "int8"
    wanted = alphaprune.load(tmp_path / "p").lm_head.to_linear().weight
    assert torch.equal(plain.tensor(f"{HEAD}.weight"), wanted) and "quantization_config" not in settings(
        tmp_path / "dense"
    )
    moved = f"{DENSE.replace('k_proj', 'q_proj')}.weight"
    assert not torch.equal(old.tensor(moved), new.tensor(moved))


def test_the_benchmark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    monkeypatch.syspath_prepend(ROOT / "bench")
    script = importlib.import_module("head")
    try:
        loss = {"model": "embedded", "sparsity": 0.0, "values": "bfloat16", "dense_loss": 2.0, "loss": 2.1}
        monkeypatch.setattr(script, "judge", lambda: iter([loss]))
        monkeypatch.setattr(script.by_turns, "here", lambda: {"machine": "here"})
        given = ["--models=tiny", "--sparsity=0.5", "--values=int8", "--rounds=2", f"--out={tmp_path / 'rows'}"]
        assert script.main(given) == 0
    finally:
        sys.modules.pop("head")
    row, judged = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert judged == {"machine": "here", **loss}
    assert row["seconds"] > 0 and row["ratio"] > 0 and row["tokens"] == 64
    assert row["head_bytes"] < 0.7 * row["dense_head_bytes"] == 0.7 * 2 * 64 * 64
    assert len((tmp_path / "rows").read_text().splitlines()) == 2
