"""The commands as a person types them: results, exit status, one line for bad input, nothing half-written."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import make_model, shared, write_tokenizer

from alphaprune.kernels import base


def test_the_whole_line(run, directory: Path, text_file: Path) -> None:
    assert run("analyze", directory, "-o", "a.json")[0] == 0
    assert run("plan", "a.json", "--sparsity", 0.7, "--epsilon", 0.2, "-o", "p.json")[0] == 0
    status, out, _ = run(
        "prune", directory, "-o", "out", "--plan", "p.json", "--calibration", text_file,
        "--samples", 4, "--length", 32, "--json",
    )  # fmt: skip
    assert status == 0 and json.loads(out)["sparsity"] == pytest.approx(0.7, abs=1e-6)
    quality = {}
    for model in (directory, "out"):
        status, out, _ = run("eval", model, "--text", text_file, "--length", 64, "--json")
        quality[str(model)] = json.loads(out)
        wanted = {"perplexity", "bits_per_byte", "tokens", "windows", "length", "data_sha256", "dtype", "seconds"}
        assert status == 0 and wanted <= quality[str(model)].keys()
    assert quality["out"]["data_sha256"] == quality[str(directory)]["data_sha256"]
    status, out, err = run("generate", "out", "--prompt", "the ", "--max-new", 8)
    assert status == 0 and "tokens/s, decoder alphaprune" in err and len(err.strip().splitlines()) == 1
    status, again, _ = run("generate", "out", "--prompt", "the ", "--max-new", 8, "--json")
    assert json.loads(again)["new_tokens"] <= 8 and json.loads(again)["text"].strip() == out.strip()
    assert json.loads(again)["decoder"] == "alphaprune"
    sampling = ("--temperature", 1.5, "--top-k", 40, "--top-p", 0.9, "--repetition-penalty", 1.2, "--seed", 3)
    command = ("generate", "out", "--prompt", "the ", "--max-new", 30, "--json", *sampling)
    whole = json.loads(run(*command)[1])
    stop = whole["text"][5:8]
    cut = json.loads(run(*command, "--stop", "#never", f"--stop={stop}")[1])
    assert cut["text"] == whole["text"][: whole["text"].index(stop)] and cut["finished_reason"] == "stop"
    status, out, _ = run("info", "out", "--json")
    found = json.loads(out)
    assert status == 0 and found["sparsity"] == pytest.approx(0.7, abs=1e-6)
    assert {row["kernel"] for row in found["layers"]} <= set(base.MEMBERS)
    assert run("info", "out")[0] == 0


def test_prune_in_one_go_equals_the_steps(run, directory: Path) -> None:
    run("analyze", directory, "-o", "a.json")
    run("plan", "a.json", "--sparsity", 0.6, "-o", "p.json")
    magnitude = ("--method", "magnitude")
    assert run("prune", directory, "-o", "steps", "--plan", "p.json", *magnitude)[0] == 0
    assert run("prune", directory, "-o", "once", "--sparsity", 0.6, *magnitude)[0] == 0
    assert run("prune", directory, "-o", "given", "--sparsity", 0.6, "--analysis", "a.json", *magnitude)[0] == 0
    for other in ("once", "given"):
        for file in Path("steps").glob("*.safetensors"):
            assert file.read_bytes() == Path(other, file.name).read_bytes()


def test_patterns_and_dense_format(run, directory: Path) -> None:
    magnitude = ("--method", "magnitude")
    assert run("prune", directory, "-o", "nm", "--pattern", "2:4", *magnitude)[0] == 0
    assert json.loads(run("info", "nm", "--json")[1])["sparsity"] == 0.5
    dense = ("--format", "dense")
    assert (
        run("prune", directory, "-o", "dense", "--sparsity", 0.5, "--allocator", "uniform", *dense, *magnitude)[0] == 0
    )
    found = json.loads(run("info", "dense", "--json")[1])
    assert found["sparsity"] == pytest.approx(0.5, abs=1e-6) and {r["kernel"] for r in found["layers"]} == {"torch"}


def test_machine_info_and_help(run) -> None:
    status, out, _ = run("info")
    assert status == 0 and "kernel reference" in out and "built" in out
    for command in ((), ("prune",), ("demo",)):
        assert run(*command, "--help")[0] == 0
    assert run("--version")[1].startswith("alphaprune ")


def test_bench_prints_dense_beside(run) -> None:
    status, out, _ = run("bench", "--shape", "64x128", "--sparsity", "0.5,0.8", "--tokens", "1,3", "--json")
    rows = json.loads(out)["rows"]
    assert status == 0 and len(rows) == 4 and all(r["dense_seconds"] > 0 and r["seconds"] > 0 for r in rows)


def test_bench_decodes_whole_models(run) -> None:
    options = ("--shape", "tiny", "--sparsity", "0.5", "--decode", "--json")
    status, out, _ = run("bench", *options)
    rows = json.loads(out)["decoding"]
    assert status == 0 and [(r["sparsity"], r["decoder"]) for r in rows] == [
        (0.5, "alphaprune"),
        (None, "transformers"),
        (None, "alphaprune"),
    ]
    assert all(row["tokens_per_second"] > 0 for row in rows) and rows[0]["step_over_kernels"] > 0


BAD = {
    "no model": (("analyze", "nothing"), "no such folder"),
    "no config": (("analyze", "."), "no config.json"),
    "sparsity": (("prune", "MODEL", "-o", "o", "--sparsity", "1.5", "--method", "magnitude"), "1.5"),
    "negative": (("prune", "MODEL", "-o", "o", "--sparsity", "-0.1", "--method", "magnitude"), "-0.1"),
    "unreachable": (
        ("prune", "MODEL", "-o", "o", "--sparsity", "0.9", "--max-sparsity", "0.5", "--method", "magnitude"),
        "0.5",
    ),
    "pattern": (("prune", "MODEL", "-o", "o", "--pattern", "5:4", "--method", "magnitude"), "5:4"),
    "pattern k": (("prune", "MODEL", "-o", "o", "--pattern", "3:7", "--method", "magnitude"), "7"),
    "pattern text": (("prune", "MODEL", "-o", "o", "--pattern", "two:four", "--method", "magnitude"), "two:four"),
    "no method": (("prune", "MODEL", "-o", "o", "--sparsity", "0.5"), "--calibration FILE"),
    "wanda alone": (("prune", "MODEL", "-o", "o", "--sparsity", "0.5", "--method", "wanda"), "--calibration FILE"),
    "method": (("prune", "MODEL", "-o", "o", "--sparsity", "0.5", "--method", "magic"), "magic"),
    "allocator": (
        ("prune", "MODEL", "-o", "o", "--sparsity", "0.5", "--method", "magnitude", "--allocator", "magic"),
        "magic",
    ),
    "epsilon": (
        ("prune", "MODEL", "-o", "o", "--sparsity", "0.5", "--method", "magnitude", "--epsilon", "much"),
        "much",
    ),
    "nothing to do": (("prune", "MODEL", "-o", "o", "--method", "magnitude"), "--sparsity"),
    "no text": (("prune", "MODEL", "-o", "o", "--sparsity", "0.5", "--calibration", "nothing.txt"), "nothing.txt"),
    "short text": (("prune", "MODEL", "-o", "o", "--sparsity", "0.5", "--calibration", "short.txt"), "short.txt"),
    "full folder": (("prune", "MODEL", "-o", "full", "--sparsity", "0.5", "--method", "magnitude"), "not empty"),
    "no plan": (("prune", "MODEL", "-o", "o", "--plan", "nothing.json", "--method", "magnitude"), "nothing.json"),
    "plan and sparsity": (
        ("prune", "MODEL", "-o", "o", "--plan", "p.json", "--sparsity", "0.5", "--method", "magnitude"),
        "not both",
    ),
    "no analysis": (("plan", "nothing.json", "--sparsity", "0.5"), "nothing.json"),
    "broken analysis": (("plan", "broken.json", "--sparsity", "0.5"), "broken.json"),
    "eval short": (("eval", "MODEL", "--text", "short.txt"), "shorter than one window"),
    "eval length": (("eval", "MODEL", "--text", "short.txt", "--length", "1000"), "1000"),
    "prompt": (("generate", "MODEL", "--prompt", "x" * 60, "--max-new", "10"), "64 positions"),
    "max new": (("generate", "MODEL", "--prompt", "x", "--max-new", "0"), "--max-new 0"),
    "top k alone": (("generate", "MODEL", "--prompt", "x", "--top-k", "5"), "--top-k chooses among samples"),
    "top p": (("generate", "MODEL", "--prompt", "x", "--temperature", "1", "--top-p", "2"), "top_p 2.0"),
    "empty stop": (("generate", "MODEL", "--prompt", "x", "--max-new", "4", "--stop", ""), "not empty"),
    "bench": (("bench",), "--shape"),
    "bench shape": (("bench", "--shape", "11x"), "11x"),
    "bench tokens": (("bench", "--shape", "8x8", "--tokens", "one"), "one"),
    "bench decode": (("bench", "--shape", "8x8", "--decode"), "llama2-7b"),
    "bench decode model": (("bench", "MODEL", "--decode"), "--shape"),
    "bench kernel": (("bench", "--shape", "8x8", "--kernel", "magic"), "magic"),
    "demo folder": (("demo", "-o", "short.txt/x"), "short.txt"),
    "output folder": (("analyze", "MODEL", "-o", "nowhere/a.json"), "nowhere"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(run, directory: Path, kind: str) -> None:
    Path("short.txt").write_text("too short")
    Path("broken.json").write_text('{"layers": ')
    Path("full").mkdir()
    Path("full", "mine").write_text("x")
    before = sorted(p.as_posix() for p in Path().rglob("*"))
    arguments, message = BAD[kind]
    status, _, err = run(*(str(directory) if a == "MODEL" else a for a in arguments))
    assert status == 2
    lines = err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0] and "Traceback" not in err
    assert sorted(p.as_posix() for p in Path().rglob("*")) == before


def test_plan_of_another_model_is_refused(run, directory: Path, tmp_path: Path) -> None:
    make_model(9).save_pretrained(tmp_path / "other")
    write_tokenizer(tmp_path / "other")
    run("analyze", directory, "-o", "a.json")
    run("plan", "a.json", "--sparsity", 0.5, "-o", "p.json")
    for option in (("--plan", "p.json"), ("--analysis", "a.json", "--sparsity", "0.5")):
        status, _, err = run("prune", "other", "-o", "o", *option, "--method", "magnitude")
        assert status == 2 and "another model" in err and not Path("o").exists()


@pytest.mark.parametrize("damage", ["missing", "extra", "nan"])
def test_damaged_plans_and_analyses_are_refused(run, directory: Path, damage: str) -> None:
    run("analyze", directory, "-o", "a.json")
    run("plan", "a.json", "--sparsity", 0.5, "-o", "p.json")
    for file, column in (("a.json", "alpha"), ("p.json", "zeros")):
        content = json.loads(Path(file).read_text())
        layers = content["layers"]
        name = "model.layers.1.mlp.up_proj"
        if damage == "missing":
            del layers[name]
        elif damage == "extra":
            layers["model.layers.9.mlp.up_proj"] = layers[name]
        else:
            where = layers[name]["columns"] if "columns" in layers[name] else layers[name]
            where[column] = float("nan")
        Path(f"bad-{file}").write_text(json.dumps(content))
        option = ("--plan", "bad-p.json") if file == "p.json" else ("--analysis", "bad-a.json", "--sparsity", "0.5")
        status, _, err = run("prune", directory, "-o", "o", *option, "--method", "magnitude")
        assert status == 2 and len(err.strip().splitlines()) == 1 and not Path("o").exists(), (file, err)


def test_nan_weights_are_named(run, directory: Path, tmp_path: Path) -> None:
    model = make_model(1)
    model.model.layers[2].self_attn.o_proj.weight.data[1, 1] = float("nan")
    model.save_pretrained(tmp_path / "bad")
    for command in (("analyze", "bad"), ("prune", "bad", "-o", "o", "--sparsity", "0.5", "--method", "magnitude")):
        status, _, err = run(*command)
        assert status == 2 and "model.layers.2.self_attn.o_proj" in err
    assert not Path("o").exists()


def test_truncated_shards_are_named(run, directory: Path, tmp_path: Path) -> None:
    shutil.copytree(directory, tmp_path / "cut")
    file = sorted((tmp_path / "cut").glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-1])
    for command in (("analyze", "cut"), ("info", "cut"), ("generate", "cut", "--prompt", "x")):
        status, _, err = run(*command)
        assert status == 2 and file.name in err and len(err.strip().splitlines()) == 1


def test_somebody_elses_checkpoint_through_every_command(run) -> None:
    """A LLaMA that others trained on stories, with their tokenizer (sentencepiece style), float32."""
    model, stories = shared("models/stories260K_hf"), shared("data/tinystories")
    Path("calibration.txt").write_text((stories / "train.txt").read_text()[:60_000])
    Path("test.txt").write_text((stories / "test.txt").read_text()[:60_000])
    assert run("analyze", model, "-o", "a.json")[0] == 0
    assert run("plan", "a.json", "--sparsity", 0.3, "-o", "p.json")[0] == 0
    arguments = ("--plan", "p.json", "--calibration", "calibration.txt", "--samples", 8, "--length", 256)
    assert run("prune", model, "-o", "out", *arguments)[0] == 0
    found = {}
    for name in (model, "out"):
        status, out, _ = run("eval", name, "--text", "test.txt", "--length", 256, "--json")
        assert status == 0
        found[str(name)] = json.loads(out)["perplexity"]
    assert found[str(model)] < found["out"] < 2 * found[str(model)]
    status, out, _ = run("generate", "out", "--prompt", "Once upon a time", "--max-new", 24)
    assert status == 0 and len(out) > 20
    assert run("bench", "out", "--json")[0] == 0
    info = json.loads(run("info", "out", "--json")[1])
    assert info["linears_bytes"] < 0.8 * info["linears_dense_bytes"]
    packed = json.loads(Path("out/config.json").read_text())
    assert packed["dtype"] == "float32"
