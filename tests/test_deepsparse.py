"""Every line of docs/deepsparse.md, as it stands there."""

import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from conftest import ROOT
from guides import DOCS, TEMPLATE, write_task

import alphaprune
from alphaprune import affinity

sys.path.insert(0, str(ROOT / "bench"))
import served

PAGE = (DOCS / "deepsparse.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\|.*\|(.*)\|$", PAGE, re.MULTILINE)[2:]  # of the right column, without its head
LINES = [code for row in ROWS for code in re.findall(r"`([^`]+)`", row)]
IN_PROCESS = [line for line in LINES if line.startswith("alphaprune ") and not re.search("serve|--pin|--tasks", line)]
BRIEF = "--time 0 --warmup 0 --prompt 8 --new 4"  # in place of the seconds that are measured
# What a line prints, and what the test adds to make it brief.
SAYS = {
    "alphaprune chat pruned": ("", "--max-new 8"),
    "alphaprune chat pruned --plain": ("", "--max-new 8"),
    "alphaprune bench pruned --per-layer": ("mlp.down_proj", BRIEF),
    "alphaprune info pruned": ("mlp.down_proj", ""),
    "alphaprune info": ("scalar", ""),
    "alphaprune eval pruned --text held-out.txt": ("perplexity", "--length 64"),
}


@pytest.fixture(scope="module")
def pruned(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed folder with a chat template."""
    from alphaprune import cli

    found = tmp_path_factory.mktemp("models") / "pruned"
    options = ["--sparsity", "0.6", "--method", "magnitude", "--allocator", "uniform"]
    assert cli.main(["prune", str(directory), "-o", str(found), *options]) == 0
    (found / "chat_template.jinja").write_text(TEMPLATE)
    return found


@pytest.fixture
def room(run, pruned: Path, text_file: Path, tmp_path: Path) -> Path:
    """The current folder, with what the lines read."""
    (tmp_path / "pruned").symlink_to(pruned)
    shutil.copy(text_file, tmp_path / "held-out.txt")
    return tmp_path


def line_with(words: str) -> str:
    (line,) = [line for line in LINES if words in line]
    return line


def test_every_line_is_run_here() -> None:
    others = [line_with(words) for words in ("TextGeneration", "serve", "--pin", "--tasks")]
    assert sorted([*SAYS, *others]) == sorted(LINES) and len(ROWS) == 7


@pytest.mark.parametrize("line", IN_PROCESS)
def test_commands(line: str, run, room: Path, monkeypatch: pytest.MonkeyPatch, one_thread) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    says, brief = SAYS[line]
    status, out, err = run(*shlex.split(f"{line} {brief}")[1:])
    assert status == 0 and says in out and out.strip(), err


def test_the_pipeline(room: Path, one_thread) -> None:
    pieces = list(eval(line_with("TextGeneration"), {"alphaprune": alphaprune}))
    assert len(pieces) == 8 and pieces[-1].generations[0].finished_reason == "max_new_tokens"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not bind threads to cores")
def test_the_benchmark(room: Path) -> None:
    """For as short a time as it takes, on as many cores as there are, up to the four of the page."""
    line = line_with("--pin").replace("--time 10", "--time 0").replace("--warmup 2", "--warmup 0")
    line = line.replace("--threads 4", f"--threads {min(4, len(affinity.cpus()))}") + " --prompt 8 --new 4 --json"
    command = [sys.executable, "-m", *shlex.split(line)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["generation"] and ("pinned" in found) == (len(affinity.cpus()) > 1)  # one CPU: nothing to bind


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_the_tasks(run, room: Path) -> None:
    write_task(room)
    status, out, err = run(*shlex.split(line_with("--tasks"))[1:])
    assert status == 0 and "acc" in out, err


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("uvicorn") is None, reason="uvicorn is not installed")
def test_the_server(room: Path) -> None:
    """On a free port in place of the usual one."""
    program, command, model = shlex.split(line_with("serve"))
    assert (program, command) == ("alphaprune", "serve")
    with served.serve(Path(model), room / "log") as server:
        body = json.dumps({"prompt": "Once upon a time", "max_tokens": 4}).encode()
        request = urllib.request.Request(f"{server.url}/v1/completions", body, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] == 4
