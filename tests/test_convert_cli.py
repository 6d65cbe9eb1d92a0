"""`alphaprune convert` as a person types it: what it prints, and one line that leaves nothing behind for bad input."""

import json
import re
import shutil
from pathlib import Path

import legacy
import pytest
import torch
from conftest import make_model
from test_convert import dense_folder, expanded, same_bits

from alphaprune import shards


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`zeros`, `bitmask`, `packed` and `full`, a checkpoint without zeros. Do not change them."""
    from alphaprune import convert

    root = tmp_path_factory.mktemp("checkpoints")
    dense_folder(root / "zeros")
    legacy.write(root / "zeros", root / "bitmask")
    convert.convert(root / "zeros", root / "packed")
    make_model(4).save_pretrained(root / "full")
    return root


def test_there_and_back(run, folders: Path) -> None:
    status, out, _ = run("convert", folders / "bitmask", "new")
    assert status == 0 and "21 sparse-bitmask → 21 of 21 layers packed" in out
    status, out, _ = run("convert", "new", "plain", "--format", "dense", "--json")
    found = json.loads(out)
    assert found["layouts"] == {"sbt": 21} and found["stored_bytes"] == found["dense_bytes"]
    assert same_bits(legacy.tensors_of(Path("plain")), legacy.tensors_of(folders / "zeros"))
    info = json.loads(run("info", "new", "--json")[1])
    assert 0.65 < info["sparsity"] < 0.75
    status, out, _ = run("convert", "new", "small", "--values", "int8", "--group", "128", "--json")
    assert status == 0 and len(json.loads(out)["quantization_error"]) == 21
    status, out, _ = run("convert", folders / "zeros", "rounded", "--values", "int8")
    assert "int8 values: relative error" in out


def test_negative_zeros_are_counted(run, tmp_path: Path) -> None:
    folder = dense_folder(tmp_path / "dense", negative=True)
    out = run("convert", folder, "kept")[1]
    assert "weights are -0 and were kept; --negative-zeros drop" in out
    out = run("convert", folder, "dropped", "--negative-zeros", "drop")[1]
    assert "are -0" not in out and "packed" in out
    before, after = legacy.tensors_of(folder), expanded(Path("dropped"))
    assert all(torch.equal(after[n], t) for n, t in before.items())


BAD = {
    "no folder": (("nothing", "o"), "no such folder"),
    "no config": ((".", "o"), "no config.json"),
    "target exists": (("zeros", "taken"), "not empty"),
    "target is a file": (("zeros", "plan.json"), "is a file"),
    "dense already": (("zeros", "o", "--format", "dense"), "dense already"),
    "packed already": (("packed", "o"), "packed already"),
    "nothing to gain": (("full", "o"), "no layer of it would get smaller"),
    "int8 dense": (("zeros", "o", "--values", "int8", "--format", "dense"), "leave out --format dense"),
    "group alone": (("zeros", "o", "--group", "128"), "--values int8"),
    "negative zeros": (("packed", "o", "--format", "dense", "--negative-zeros", "drop"), "--format dense"),
    "modifier": (("zeros", "o", "--modifier", "wanda"), "--modifier"),
    "not a plan": (("plan.json", "recipe.yaml"), "is no plan file"),
    "options of a plan": (("plan.json", "recipe.yaml", "--values", "int8"), "--values"),
    "newer": (("newer", "o"), "format_version 99"),
    "hand-edited": (("edited", "o"), "model.layers.0.mlp.gate_proj: weight_mask should be"),
    "no tensor": (("hole", "o"), "model.layers.1.mlp.up_proj"),
    "no norm": (("no norm", "o"), "no tensor model.norm.weight"),
    "damaged bits": (("damaged", "o"), "model.layers.2.self_attn.q_proj: its bitmask keeps"),
    "truncated": (("truncated", "o"), "copy it again"),
    "float8": (("float8", "o"), "model.layers.0.mlp.up_proj: its weights are float8_e4m3fn, .* wanted float32"),
    "another family": (("family", "o"), "gpt2"),
    "fewer blocks": (("fewer", "o"), r"tensor model\.layers\.2\..* no place for it"),
    "no such activation": (("activation", "o"), "config.json cannot be used: .*gellu"),
    "damaged packing": (("crooked", "o", "--format", "dense"), "model.layers.1.mlp.gate_proj"),
}


def edit(folder: Path, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def bad_folders(folders: Path) -> None:
    for name, of in {
        "newer": "packed", "edited": "packed", "hole": "bitmask", "no norm": "zeros", "damaged": "bitmask",
        "truncated": "bitmask", "float8": "zeros", "family": "zeros", "crooked": "packed",
        "fewer": "bitmask", "activation": "zeros",
    }.items():  # fmt: skip
        shutil.copytree(folders / of, name)
    edit(Path("newer"), lambda c: c["quantization_config"].update(format_version=99))
    edit(Path("edited"), lambda c: c.update(intermediate_size=264))
    edit(Path("fewer"), lambda c: c.update(num_hidden_layers=2))
    edit(Path("activation"), lambda c: c.update(hidden_act="gellu"))
    edit(Path("family"), lambda c: c.update(model_type="gpt2"))
    change("hole", lambda t: t.pop("model.layers.1.mlp.up_proj.compressed"))
    change("no norm", lambda t: t.pop("model.norm.weight"))
    change("damaged", lambda t: t["model.layers.2.self_attn.q_proj.bitmask"][3].bitwise_xor_(1))
    change("crooked", lambda t: t["model.layers.1.mlp.gate_proj.weight_offsets"].add_(8))
    name = "model.layers.0.mlp.up_proj.weight"
    change("float8", lambda t: t.update({name: t[name].to(torch.float8_e4m3fn)}))
    file = sorted(Path("truncated").glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-9])


def change(folder: str, how) -> None:
    tensors = legacy.tensors_of(Path(folder))
    how(tensors)
    for file in shards.checkpoint_files(Path(folder)):
        file.unlink()
    legacy.save(Path(folder), tensors)


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(run, folders: Path, kind: str) -> None:
    for name in ("zeros", "bitmask", "packed", "full"):
        Path(name).symlink_to(folders / name)
    bad_folders(folders)
    Path("taken").mkdir()
    Path("taken", "mine").write_text("x")
    Path("plan.json").write_text('{"kind": "diary"}')
    before = sorted(p.as_posix() for p in Path().rglob("*"))
    arguments, message = BAD[kind]
    status, out, err = run("convert", *arguments)
    lines = err.strip().splitlines()
    assert status == 2 and out == "" and len(lines) == 1 and re.search(message, lines[0]), err
    assert sorted(p.as_posix() for p in Path().rglob("*")) == before


def test_nan_has_no_int8(run, tmp_path: Path) -> None:
    folder = dense_folder(tmp_path / "dense", special=True)
    status, _, err = run("convert", folder, "o", "--values", "int8")
    assert status == 2 and "model.layers.0.self_attn.q_proj: the weights hold NaN or infinity" in err
    assert not list(Path().glob("o*"))


REFUSED = {
    "convert": ("late", "o", "--values", "int8"),
    "analyze": ("late", "-o", "o.json"),
    "prune": ("late", "-o", "o", "--sparsity", "0.5", "--method", "magnitude", "--analysis", "a.json"),
    "compress": ("late", "-o", "o", "--bits", "5", "--analysis", "a.json"),
}


@pytest.mark.parametrize("command", REFUSED)
def test_what_is_refused_in_its_last_block_leaves_nothing(run, folders: Path, command: str) -> None:
    """The blocks before it had been finished."""
    shutil.copytree(folders / "zeros", "late")
    name = "model.layers.2.mlp.up_proj"
    change("late", lambda t: t[f"{name}.weight"][1].fill_(float("nan")))  # a row that no fingerprint reads
    if "a.json" in REFUSED[command]:
        assert run("analyze", folders / "zeros", "-o", "a.json")[0] == 0
    before = sorted(p.as_posix() for p in Path().rglob("*"))
    status, _, err = run(command, *REFUSED[command])
    assert status == 2 and f"{name}: the weights hold NaN or infinity" in err
    assert sorted(p.as_posix() for p in Path().rglob("*")) == before
