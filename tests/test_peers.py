"""bench/peers.py with a made-up engine in place of the real ones: rows, ratios, checks and sentences; never a time."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
FAKE = """
import numpy as np
import worker

class Engine:
    version = "1.0"
    variants = [
        worker.Variant("bfloat16", "bfloat16", "made up", True),
        worker.Variant("int8", "int8", "made up", True),
        worker.Variant("dense", "float32", "made up"),
        worker.Variant("wrong", "float32", "made up"),
    ]

    def __init__(self, threads):
        assert threads == 3

    def load(self, name, made, x, target):
        y = x @ made.T * (1.1 if name == "wrong" else 1)
        weights = list(worker.copies(made, 3))
        return worker.Job(lambda: [x @ w.T for w in weights], lambda: y, 3, made.nbytes, "a note")

print("what a library says is no answer")
worker.serve(Engine)
"""


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """bench/peers.py whose engines are all the made-up one, except `openvino`, which is not set up."""
    for folder in (ROOT / "bench", ROOT / "bench" / "engines"):
        monkeypatch.syspath_prepend(str(folder))
    for name in ("peers", "rounds", "setups", "worker"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import peers
    import rounds

    for name in ("alphaprune", "torch"):
        (tmp_path / f"run_{name}.py").write_text(FAKE)
    monkeypatch.setattr(rounds, "HERE", tmp_path)
    popen = rounds.subprocess.Popen

    def with_path(*arguments, env, **options):
        return popen(*arguments, env=env | {"PYTHONPATH": str(ROOT / "bench" / "engines")}, **options)

    monkeypatch.setattr(rounds.subprocess, "Popen", with_path)
    yield peers
    for name in ("peers", "rounds", "setups", "worker"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def run(peers, out: Path, *more: str) -> int:
    small = ["--shapes", "80x130", "--tokens", "2", "--sparsity", "0.5,0.9", "--threads", "3", "--seconds", "0"]
    return peers.main([*small, "--peers", "torch,openvino,alphaprune", "--out", str(out), *more])


def test_rows_of_one_chunk(peers, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(peers, tmp_path / "rows.jsonl", "--json") == 0
    printed = capsys.readouterr()
    found = [json.loads(text) for text in printed.out.splitlines()]
    assert found == [json.loads(text) for text in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert "openvino: say --envs DIR" in printed.err
    assert "torch, wrong, 2 tokens: ValueError: its output is off by 1.0e-01" in printed.err
    jobs = {(row["engine"], row["variant"], row["sparsity"]): row for row in found}
    sparse = [(variant, sparsity) for variant in ("bfloat16", "int8") for sparsity in (0.5, 0.9)]
    assert set(jobs) == {(e, *job) for e in ("torch", "alphaprune") for job in [*sparse, ("dense", None)]}
    ours = {sparsity: jobs["alphaprune", "bfloat16", sparsity]["seconds"] for sparsity in (0.5, 0.9)}
    for (_, _, sparsity), row in jobs.items():
        assert row["rounds"] >= 5 and row["fastest"] <= row["quartiles"][0] <= row["seconds"] <= row["quartiles"][1]
        assert row["weights_per_second"] == pytest.approx(80 * 130 / row["seconds"])
        assert (row["shape"], row["tokens"], row["threads"], row["layers"]) == ([80, 130], 2, 3, 3)
        assert (row["config"], row["version"], row["nbytes"]) == ("made up; a note", "1.0", 80 * 130 * 4)
        expected = {str(s): row["seconds"] / seconds for s, seconds in ours.items() if sparsity in (None, s)}
        assert row["ratio"] == pytest.approx(expected)
        assert row["error"] < 1e-6


def test_a_part_replaces_its_rows(peers, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    out.write_text(json.dumps(dict.fromkeys(peers.IDENTITY, "another")) + "\n")
    run(peers, out)
    first = out.read_text().splitlines()
    run(peers, out)
    second = out.read_text().splitlines()
    assert len(first) == len(second) == 11
    assert first[0] == second[0] and set(first[1:]).isdisjoint(second[1:])


def test_the_table_has_a_line_per_row(peers, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run(peers, tmp_path / "rows.jsonl")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 11 and all("80x130" in text for text in lines[1:])


def test_an_engine_that_dies_costs_its_chunk_only(peers, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    dying = FAKE.replace(
        "lambda: [x @ w.T for w in weights]", "lambda: len(x) == 2 and not new and die() or new.clear()"
    )
    dying = dying.replace("weights = ", "die, new = (lambda: __import__('os')._exit(7)), [1]; weights = ")
    (tmp_path / "run_torch.py").write_text(dying)
    assert run(peers, tmp_path / "rows.jsonl", "--tokens", "2,3") == 1
    said = capsys.readouterr().err
    assert "80x130, 2 tokens: no rows, torch, " in said and "its process ended with 7" in said
    found = [json.loads(text) for text in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {(row["engine"], row["tokens"]) for row in found} == {("alphaprune", 3)}


def test_unknown_peers_are_refused(peers, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        peers.main(["--peers", "nobody"])
    assert stop.value.code == 2
    assert "--peers nobody: there are torch, openvino" in capsys.readouterr().err


def test_the_error_sees_a_wrong_row_and_a_wrong_shape(peers) -> None:
    import worker

    generator = np.random.default_rng(0)
    x, made = generator.standard_normal((3, 20)), generator.standard_normal((10, 20))
    y = x @ made.T
    assert worker.error(y, x, made) < 1e-12
    y[:, 4] = 0
    assert worker.error(y, x, made) > 0.05
    with pytest.raises(ValueError, match="shape"):
        worker.error(y.T, x, made)


def test_setups_say_what_failed(peers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import setups

    monkeypatch.setattr(setups, "interpreter", lambda name: sys.executable)
    monkeypatch.setitem(setups.NEEDS, "openvino", ["--no-such-option"])
    said: list[str] = []
    assert setups.make(tmp_path, ["openvino"], said.append) == 1
    assert said[-1].startswith("openvino: pip install --no-such-option failed: ")
    assert setups.python("openvino", tmp_path) == (
        f"openvino: not set up in {tmp_path}; run bench/peers.py --setup {tmp_path}"
    )
