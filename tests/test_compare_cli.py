"""`alphaprune compare` as a person types it: results that the printed command repeats, one line for bad input."""

import json
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import make_model, write_tokenizer

from alphaprune import allocators

WORDS = ["the", "sparse", "wéight", "of", "a", "heävy", "tail", "→", "and", "so", "on\n"]


def write_texts(folder: Path) -> None:
    for seed, name in enumerate(("calibration.txt", "text.txt", "test.txt")):
        picks = torch.randint(0, len(WORDS), (200,), generator=torch.Generator().manual_seed(seed)).tolist()
        (folder / name).write_text(" ".join(WORDS[i] for i in picks), encoding="utf-8")
    (folder / "short.txt").write_text("too short")


@pytest.fixture(autouse=True)
def texts(tmp_path: Path) -> None:
    write_texts(tmp_path)


def command(model: Path, *changes) -> list:
    """A small comparison; what comes last on a command line counts."""
    files = ["--calibration", "calibration.txt", "--text", "text.txt", "-o", "out"]
    few = ["--allocators", "alpha", "--methods", "wanda", "--samples", 4, "--length", 48, "--windows", 5]
    return ["compare", model, *files, "--sparsity", "0.6", *few, *changes]


def test_what_is_printed_can_be_repeated(run, directory: Path) -> None:
    """The command it prints makes the model that it recommends, whose figures `eval` finds again."""
    status, out, err = run(*command(directory, "--methods", "wanda,sparsegpt", "--test", "test.txt", "--json"))
    assert status == 0 and err == ""
    found = json.loads(out)
    chosen = found["recommended"][0]
    words = shlex.split(chosen["command"])
    assert words[:2] == ["alphaprune", "prune"]
    assert run(*words[1:])[0] == 0
    pruned = words[words.index("-o") + 1]
    for split in ("text", "test"):
        evaluated = ("eval", pruned, "--text", f"{split}.txt", "--length", 48, "--windows", 5, "--json")
        quality = json.loads(run(*evaluated)[1])
        row = found["test" if split == "test" else "validation"]["rows"][chosen["id"]]
        for name in ("perplexity", "bits_per_byte", "stderr"):
            assert quality[name] == pytest.approx(row[name], rel=1e-4)
    assert Path(found["picture"]).is_file()


def test_tables_for_a_person(run, directory: Path) -> None:
    status, out, _ = run(*command(directory, "--sparsity", "0.5,0.6"))
    assert status == 0 and "not read before the choice" not in out
    assert out.count("recommended:") == 2 and out.count("alphaprune prune") == 2
    assert out.count("same plan as uniform") == 2  # ramp and alpha at 0.5, where epsilon auto is 0
    assert "standard errors of no difference" in out or "recommended: uniform" in out
    status, out, _ = run(*command(directory, "--sparsity", "0.5,0.6", "--test", "test.txt"))
    assert status == 0 and out.count("not read before the choice") == 2


def test_every_allocator_on_a_small_model(run, directory: Path) -> None:
    status, out, err = run(*command(directory, "--allocators", "all,metrics", "--methods", "magnitude", "--json"))
    assert status == 0, err
    rows = json.loads(out)["validation"]["rows"].values()
    assert {row["allocator"] for row in rows} == {*allocators.MEMBERS, *allocators.METRICS}
    assert all(row["realized"] == pytest.approx(0.6, abs=1e-4) for row in rows)
    for name, options in (("owl", ()), ("measured", ("--curves", "out/curves.json"))):
        arguments = ("out/analysis.json", "--sparsity", 0.6, "--allocator", name, *options, "-o", "p.json")
        assert run("plan", *arguments)[0] == 0  # from what compare has left behind
        assert Path("p.json").read_text() == Path(f"out/plans/0.60-{name}.json").read_text()


def test_a_pattern_implies_its_sparsity(run, directory: Path) -> None:
    arguments = command(directory, "--pattern", "2:4", "--json")
    del arguments[arguments.index("--sparsity") : arguments.index("--sparsity") + 2]
    status, out, _ = run(*arguments)
    found = json.loads(out)
    assert status == 0 and found["recommended"][0]["sparsity"] == 0.5
    assert [row["allocator"] for row in found["validation"]["rows"].values()] == ["uniform", "ramp", "alpha"]
    assert run(*json.loads(out)["recommended"][0]["command"].split()[1:])[0] == 0


def test_a_packed_model_is_expanded(run, directory: Path) -> None:
    assert run("prune", directory, "-o", "packed", "--sparsity", 0.3, "--method", "magnitude")[0] == 0
    status, out, err = run(*command(Path("packed"), "--methods", "magnitude", "--json"))
    assert status == 0, err
    dense = json.loads(run("eval", "packed", "--text", "text.txt", "--length", 48, "--windows", 5, "--json")[1])
    assert json.loads(out)["validation"]["dense"]["perplexity"] == pytest.approx(dense["perplexity"], rel=1e-4)


def test_another_dtype(run, directory: Path) -> None:
    """Rotary tables keep their precision, so that it is the model that `eval --dtype` judges."""
    status, out, err = run(*command(directory, "--methods", "magnitude", "--dtype", "bfloat16", "--json"))
    assert status == 0, err
    asked = ("--text", "text.txt", "--length", 48, "--windows", 5, "--dtype", "bfloat16", "--json")
    dense = json.loads(run("eval", directory, *asked)[1])
    assert json.loads(out)["identity"]["dtype"] == "bfloat16"
    assert json.loads(out)["validation"]["dense"]["perplexity"] == pytest.approx(dense["perplexity"], rel=2e-3)


BAD = {
    "allocator": (("--allocators", "alpha,magic"), "magic"),
    "no allocator": (("--allocators", "alpha,"), "--allocators alpha,"),
    "method": (("--methods", "wanda,magic"), "magic"),
    "sparsity": (("--sparsity", "0.5,much"), "0.5,much"),
    "sparsity 1": (("--sparsity", "1"), "sparsity 1"),
    "sparsity empty": (("--sparsity", ""), "--sparsity"),
    "sparsity -": (("--sparsity=-0.5",), "sparsity -0.5"),
    "epsilon": (("--epsilon", "auto,much"), "auto,much"),
    "epsilon 1": (("--epsilon", "1"), "epsilon 1"),
    "pattern": (("--pattern", "5:4"), "5:4"),
    "pattern k": (("--pattern", "N:7"), "7"),
    "no text": (("--text", "nothing.txt"), "nothing.txt"),
    "no calibration": (("--calibration", "nothing.txt"), "nothing.txt"),
    "no test": (("--test", "nothing.txt"), "nothing.txt"),
    "short text": (("--text", "short.txt"), "short.txt: 9 tokens, shorter than one window of 48"),
    "short calibration": (("--calibration", "short.txt"), "short.txt: 9 tokens, shorter than one window of 48"),
    "seen text": (("--text", "calibration.txt"), "--calibration"),
    "length": (("--length", "1000"), "1000"),
    "samples": (("--samples", "0"), "sample"),
    "windows": (("--windows", "0"), "windows 0"),
    "device": (("--device", "magic"), "--device magic"),
    "folder": (("-o", "full"), "holds no comparison"),
    "file": (("-o", "short.txt"), "is a file"),
    "below a file": (("-o", "short.txt/out"), "short.txt/out"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(run, directory: Path, kind: str) -> None:
    Path("full").mkdir()
    Path("full/mine").write_text("x")
    before = sorted(p.as_posix() for p in Path().rglob("*"))
    changes, message = BAD[kind]
    status, _, err = run(*command(directory, *changes))
    lines = err.strip().splitlines()
    assert status == 2 and len(lines) == 1 and message in lines[0] and "Traceback" not in err
    assert sorted(p.as_posix() for p in Path().rglob("*")) == before


def test_without_a_sparsity_it_asks_for_one(run, directory: Path) -> None:
    arguments = command(directory)
    del arguments[arguments.index("--sparsity") : arguments.index("--sparsity") + 2]
    status, _, err = run(*arguments)
    assert status == 2 and "give --sparsity" in err and not Path("out").exists()


def test_a_test_text_that_is_too_short_costs_no_results(run, directory: Path) -> None:
    status, _, err = run(*command(directory, "--test", "short.txt"))
    assert status == 2 and "shorter than one window" in err and Path("out/plan-0.60.json").is_file()
    assert run(*command(directory, "--test", "test.txt"))[0] == 0


def test_another_seed_in_the_same_folder_is_refused(run, directory: Path) -> None:
    assert run(*command(directory))[0] == 0
    before = {f: f.read_bytes() for f in Path("out").rglob("*") if f.is_file()}
    status, _, err = run(*command(directory, "--seed", 1))
    assert status == 2 and "another seed lies here (0, now 1)" in err and len(err.strip().splitlines()) == 1
    assert {f: f.read_bytes() for f in Path("out").rglob("*") if f.is_file()} == before


def rows(file: Path) -> int:
    return len(json.loads(file.read_text()).get("validation", {"rows": {}})["rows"]) if file.is_file() else 0


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path: Path) -> None:
    """kill -9, five times over, and the results have the same bytes as those of a run in one go."""
    write_texts(tmp_path)
    make_model(3, num_hidden_layers=8).save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    options = ("--sparsity", "0.5,0.6,0.7", "--methods", "magnitude,wanda,sparsegpt", "--allocators", "alpha,measured")
    line = [sys.executable, "-m", "alphaprune", *map(str, command(Path("model"), *options, "--test", "test.txt"))]
    subprocess.run([*line, "-o", "whole"], cwd=tmp_path, check=True, capture_output=True)
    generator, left = random.Random(0), []
    for goal in sorted(generator.sample(range(1, 24), 5)):
        process = subprocess.Popen(line, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and rows(tmp_path / "out/results.json") < goal:
            time.sleep(0.001)
        time.sleep(generator.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.wait()
        left.append(rows(tmp_path / "out/results.json"))
    assert left == sorted(left) and 0 < left[0] < left[-1] < 36, "no run was killed in the middle"
    subprocess.run(line, cwd=tmp_path, check=True, capture_output=True)
    wanted = {f.relative_to(tmp_path / "whole"): f.read_bytes() for f in (tmp_path / "whole").rglob("*.json")}
    assert {f.relative_to(tmp_path / "out"): f.read_bytes() for f in (tmp_path / "out").rglob("*.json")} == wanted
