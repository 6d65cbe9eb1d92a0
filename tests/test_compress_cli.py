"""`alphaprune compress` as a person types it, and its plans as the settings of other tools."""

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from compressed import planned, with_alphas
from conftest import make_model
from guides import DOCS, blocks

import alphaprune
from alphaprune import hf, recovery, shards, unfinished
from alphaprune.compressions import export

PAGE = DOCS / "compressions.md"


@pytest.fixture(scope="module")
def analysis() -> alphaprune.Analysis:
    return with_alphas(alphaprune.analyze(make_model(1)))


def test_the_command(run, directory: Path, text_file: Path) -> None:
    text = ("--calibration", text_file, "--samples", 3, "--length", 32)
    assert run("analyze", directory, "-o", "a.json")[0] == 0
    given = ("--analysis", "a.json", "--epsilon", 0.2)
    for number, options in enumerate((("--bits", 4), ("--rank-ratio", 0.6), ("--structured", 0.3, "--refit"))):
        assert run("compress", directory, *options[:2], *given, "--save-plan", f"{number}.json")[0] == 0
        status, out, err = run("compress", directory, "-o", f"out{number}", *options, *given, *text, "--json")
        assert status == 0, err
        found = json.loads(out)
        assert found["stored_bytes"] < found["dense_bytes"] and found["budget"] == options[1]
        planned_one = ("--plan", f"{number}.json", *options[2:], *text)
        assert run("compress", directory, "-o", f"again{number}", *planned_one)[0] == 0
        for file in Path(f"out{number}").glob("*.safetensors"):
            assert file.read_bytes() == Path(f"again{number}", file.name).read_bytes()
        assert run("eval", f"out{number}", "--text", text_file, "--length", 64, "--windows", 2, "--json")[0] == 0
        assert run("generate", f"out{number}", "--prompt", "the ", "--max-new", 4)[0] == 0
        assert run("info", f"out{number}")[0] == 0


@pytest.mark.parametrize("kind", ["structured", "plain"])
def test_info_says_which_sizes_contradict_the_files(run, directory: Path, analysis, kind: str) -> None:
    if kind == "structured":
        alphaprune.save(alphaprune.compress(make_model(1), planned(analysis, "structured")), "folder")
    else:
        shutil.copytree(directory, "folder")
    assert run("info", "folder")[0] == 0
    file = Path("folder/config.json")
    config = json.loads(file.read_text())
    if kind == "structured":
        config["quantization_config"]["channels"][1] -= 1
    else:
        config["intermediate_size"] -= 1
    file.write_text(json.dumps(config))
    block = 1 if kind == "structured" else 0
    status, out, err = run("info", "folder")
    sentence = rf"model\.layers\.{block}\.mlp\.gate_proj\.weight has shape \((\d+), 96\) in the file, but config\.json"
    found = re.search(rf"{sentence} describes \((\d+), 96\)", err)
    assert status == 2 and not out and len(err.splitlines()) == 1 and int(found[1]) == int(found[2]) + 1


def matched(patterns: list[str], name: str) -> str | None:
    """The first pattern that a name begins with, as the other tools look for it."""
    return next((p for p in patterns if re.match(p, name)), None)


@pytest.mark.parametrize("granularity", ["block", "matrix"])
def test_other_tools_give_every_layer_its_bits(analysis, granularity: str, tmp_path: Path) -> None:
    plan = planned(analysis, "bits", 7, choices=(2, 4, 8, 16))
    for place, name in enumerate(plan.parts):
        amount = (16, 4, 2)[int(name.split(".")[2]) if granularity == "block" else place % 3]
        plan.parts[name] = replace(plan.parts[name], amount=amount)
    made = export.write(plan, tmp_path / "gptq.json")
    assert made == json.loads((tmp_path / "gptq.json").read_text())
    dynamic = {pattern[2:]: 16 if pattern[0] == "-" else own["bits"] for pattern, own in made["dynamic"].items()}
    recipe = export.write(plan, tmp_path / "r.yaml")
    assert recipe == yaml.safe_load((tmp_path / "r.yaml").read_text())
    settings = recipe["quant_stage"]["quant_modifiers"]["GPTQModifier"]
    groups = {t[3:]: g["weights"]["num_bits"] for g in settings["config_groups"].values() for t in g["targets"]}
    ignored = [entry[3:] for entry in settings["ignore"] if entry.startswith("re:")]
    for name, kept in plan.parts.items():
        assert dynamic.get(matched(list(dynamic), name), made["bits"]) == kept.amount
        assert groups.get(matched(list(groups), name), 16) == kept.amount
        assert (matched(ignored, name) is not None) == (kept.amount == 16)
    for method in ("rank", "structured"):
        with pytest.raises(ValueError, match="plans of bits only"):
            export.write(planned(analysis, method), tmp_path / "x.json")
    with pytest.raises(ValueError, match=r"\.json for GPTQModel"):
        export.write(plan, tmp_path / "x.txt")


def test_convert_and_prune_know_these_plans(run, directory: Path, tmp_path: Path) -> None:
    assert run("compress", directory, "--bits", 5, "--save-plan", "p.json")[0] == 0
    status, out, _ = run("convert", "p.json", "q.json")
    assert status == 0 and "for GPTQModel" in out and json.loads(Path("q.json").read_text())["group_size"] == 128
    assert "for llm-compressor" in run("convert", "p.json", "q.yaml")[1]
    status, _, err = run("prune", directory, "-o", "x", "--plan", "p.json", "--method", "magnitude")
    assert status == 2 and "compress --plan" in err
    status, _, err = run("convert", "p.json", "y.yaml", "--modifier", "wanda")
    assert status == 2 and "is about pruning" in err
    run("analyze", directory, "-o", "a.json")
    run("plan", "a.json", "--sparsity", 0.5, "-o", "s.json")
    status, _, err = run("compress", directory, "-o", "x", "--plan", "s.json")
    assert status == 2 and "is no compression file" in err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--bits", 4), "give -o OUT"),
        (("--bits", 9, "-o", "x"), "mean from 2 to 8"),
        (("--bits", 4, "-o", "x", "--refit"), "--refit belongs to --structured"),
        (("--bits", 4, "-o", "x", "--choices", "a"), "--choices a"),
        (("--rank-ratio", 0, "-o", "x"), "share between 0 and 1"),
        (("--structured", 0.3, "-o", "x", "--refit"), "--refit needs --calibration"),
        (("--structured", 0.3, "-o", "x", "--score", "wanda"), "calibration text"),
        (("--plan", "missing.json", "-o", "x"), "missing.json: cannot be read"),
        (("--structured", 0.3, "-o", "x", "--epsilon", "much"), "--epsilon much"),
    ],
)
def test_the_command_refuses_in_one_sentence(run, directory: Path, arguments: tuple, sentence: str) -> None:
    status, _, err = run("compress", directory, *arguments)
    assert status == 2 and sentence in err and len(err.strip().splitlines()) == 1
    assert not Path("x").exists()


def test_packed_input_is_refused(run, directory: Path) -> None:
    assert run("compress", directory, "--bits", 4, "-o", "packed")[0] == 0
    status, _, err = run("compress", "packed", "--bits", 4, "-o", "x")
    assert status == 2 and "is packed already" in err


def test_the_page_as_written(run, directory: Path, text_file: Path, tmp_path: Path) -> None:
    """Every command of docs/compressions.md, on a small model; then its Python."""
    (tmp_path / "MODEL").symlink_to(directory)
    for name in ("text.txt", "held-out.txt"):
        (tmp_path / name).write_bytes(text_file.read_bytes())
    lines = [line.partition(" #")[0] for block in blocks(PAGE, "bash") for line in block.splitlines()]
    assert len(lines) == 7
    for line in lines:
        words = shlex.split(line.replace("--calibration", "--samples 3 --length 32 --calibration"))
        if words[3:5] == ["-o", "small"]:
            shutil.rmtree("small", ignore_errors=True)
        assert words[0] == "alphaprune" and run(*words[1:])[0] == 0, line
    exec(blocks(PAGE, "python")[0], {})
    assert alphaprune.load("by-hand").config.quantization_config.format == "dense"


BUDGETS = {"bits": ("--bits", 4), "rank": ("--rank-ratio", 0.6), "structured": ("--structured", 0.3, "--parts", "both")}


@pytest.mark.parametrize("method", BUDGETS)
@pytest.mark.parametrize("cut", ["between blocks", "before it has its name", "after it has its name"])
def test_cut_off_and_gone_on_with(run, directory: Path, tmp_path: Path, monkeypatch, method: str, cut: str) -> None:
    command = ("compress", directory, "-o", "out", *BUDGETS[method], "--allocator", "uniform", "--json")
    wanted = run(*command)
    content = {file.name: file.read_bytes() for file in Path("out").iterdir()}
    shutil.rmtree("out")
    replace_file = unfinished.os.replace

    def cut_off(source, target) -> None:
        replace_file(source, target)
        if Path(target) == Path("out"):
            raise KeyboardInterrupt

    def stop(*_) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if cut == "after it has its name":
            patch.setattr(unfinished.os, "replace", cut_off)
        elif cut == "before it has its name":
            text = unfinished.atomic_write_text
            patch.setattr(
                unfinished, "atomic_write_text", lambda p, t: stop() if p.name == shards.INDEX else text(p, t)
            )
        else:
            write = unfinished.Writer.write
            patch.setattr(unfinished.Writer, "write", lambda self, i, *given: stop() if i else write(self, i, *given))
        assert run(*command)[0] == 130
    assert run(*command) == wanted
    assert {file.name: file.read_bytes() for file in Path("out").iterdir()} == content
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    alphaprune.load("out")


def test_factors_are_recovered_as_factors(run, directory: Path, text_file: Path) -> None:
    pytest.importorskip("peft")
    assert run("compress", directory, "-o", "low", "--rank-ratio", 0.6, "--allocator", "uniform")[0] == 0
    options = ("--sparsity", 0.5, "--method", "magnitude", "--allocator", "uniform")
    assert run("prune", "low", "-o", "pruned", *options)[0] == 0
    few = ("--steps", 4, "--batch", 4, "--rank", 2, "--length", 32, "--windows", 8)
    status, out, err = run("recover", "pruned", "-o", "o", "--calibration", text_file, *few, "--json")
    assert status == 0, err
    before, after = (recovery.masks_of(hf.load(name, tokens=None)) for name in ("pruned", "o"))
    assert before.keys() == after.keys() and any(name.endswith(".first") for name in before)
    assert all(torch.equal(mask, before[name]) for name, mask in after.items())
    assert json.loads(out)["loss"]["after"] < json.loads(out)["loss"]["before"]
