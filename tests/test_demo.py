"""The embedded model, its corpus, and the demo that runs on them."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from alphaprune import analysis, data, evaluate, hf, planning
from alphaprune.demo import block, corpus, picture, run, train
from alphaprune.model import describe


def test_splits_are_disjoint_and_depend_on_the_path_alone() -> None:
    assert sum(len(share) for share in corpus.SPLITS.values()) == 100
    assert {corpus.split_of(f"x/{i}.py") for i in range(300)} == set(corpus.SPLITS)
    assert corpus.split_of("abc.py") == corpus.split_of("abc.py")
    held_out, calibration = corpus.load("held-out"), corpus.load("calibration")
    assert not {p for p, _ in held_out.documents} & {p for p, _ in calibration.documents}
    assert len(held_out.text) > 300_000 and "def " in held_out.text
    assert held_out.sha256 == corpus.load("held-out").sha256 != calibration.sha256
    with pytest.raises(ValueError, match="no split is called 'test'"):
        corpus.load("test")


def test_embedded_model_is_what_it_should_be() -> None:
    files = [f for f in run.MODEL.iterdir() if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 24_000_000
    config = json.loads((run.MODEL / "config.json").read_text())
    assert config["head_dim"] == 64 and config["num_key_value_heads"] >= 2 and config["num_hidden_layers"] >= 6
    assert config["hidden_size"] % 128 == config["intermediate_size"] % 128 == 0 and config["tie_word_embeddings"]
    model = hf.load(run.MODEL)
    assert 6e6 <= sum(p.numel() for p in model.parameters()) <= 12e6
    assert describe(run.MODEL).dtype == "bfloat16"


def test_embedded_model_has_learned() -> None:
    """It predicts held-out Python far better than its initialisation, and its spectra have grown heavy tails."""
    text = run.spread(run.encode(data.load_tokenizer(run.MODEL), "held-out"), 4)
    trained = evaluate.evaluate(hf.load(run.MODEL), text, run.LENGTH)
    assert trained.bits_per_byte < 1.6 < evaluate.evaluate(train.initial_model(), text, run.LENGTH).bits_per_byte
    after = [a["mean"] for a in run.alpha_of_blocks(analysis.analyze(run.MODEL))]
    before = [a["mean"] for a in run.alpha_of_blocks(analysis.analyze(train.initial_model()))]
    assert max(after) < min(before)


def test_spread_keeps_whole_windows() -> None:
    tokens = torch.arange(run.LENGTH * 10 + 7)
    text = data.Text("t", "", 0, tokens, tokens + 1)
    found = run.spread(text, 3)
    assert found.tokens.numel() == 3 * run.LENGTH
    assert found.tokens[:: run.LENGTH].tolist() == [0, 4 * run.LENGTH, 9 * run.LENGTH]


def test_equal_plans_are_run_once() -> None:
    stats = analysis.analyze(run.MODEL, fit=None)
    plans = {(a, s): planning.plan(stats, s, allocator="uniform") for a in run.ALLOCATORS for s in (0.5, 0.7)}
    assert run.distinct(plans) == [("uniform", 0.5), ("uniform", 0.7)]
    assert run.plan_of_blocks(plans["alpha", 0.7]) == pytest.approx([0.7] * 6, abs=1e-5)


def test_cut_mask_gives_every_part_its_sparsity() -> None:
    weight = torch.rand(600, 500).sub_(0.5)
    mask = block.cut_mask(weight, [0.2, 0.5, 0.9])
    for part, sparsity in zip(mask.split(200), (0.2, 0.5, 0.9), strict=True):
        assert part.float().mean().item() == pytest.approx(1 - sparsity, abs=0.01)


def test_picture_is_drawn_whole(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    row = {"bits_per_byte": 1.2, "block_speedup": 1.0, "sparsity": 0.0, "allocator": "dense"}
    rows = [row] + [
        {**row, "allocator": a, "sparsity": s, "block_speedup": 1 + s, "bits_per_byte": 1.2 + s}
        for a in run.ALLOCATORS
        for s in run.SPARSITIES
    ]
    alphas = [{"mean": 2 + i / 10, "lowest": 1.8, "highest": 2.9} for i in range(6)]
    result = {"alpha": alphas, "rows": rows, "plan": {"uniform": [0.7] * 6, "alpha": [0.6] * 6}, "plan_sparsity": 0.7}
    assert picture.draw(result, tmp_path / "demo.png") == str(tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes()[:4] == b"\x89PNG" and len(list(tmp_path.iterdir())) == 1


def test_learning_rate_rises_stays_and_falls() -> None:
    rates = [train.learning_rate(step, 1000, 1.0) for step in range(1000)]
    assert rates[0] < 0.01 and rates[199] == rates[699] == 1.0 and rates[-1] == pytest.approx(0.02, abs=0.02)
    assert all(a >= b for a, b in itertools.pairwise(rates[700:]))


@pytest.mark.slow
def test_the_demo_itself(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from alphaprune import cli

    assert cli.main(["demo", "-o", str(tmp_path / "out"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "out" / "demo.json").read_text()) == result
    rows = {(r["allocator"], r["sparsity"]): r for r in result["rows"]}
    assert len(rows) == 9 and all(math.isfinite(r["bits_per_byte"]) for r in rows.values())
    uniform = [rows["dense", 0.0], *(rows["uniform", s] for s in run.SPARSITIES)]
    for less, more in itertools.pairwise(uniform):
        assert more["linears_bytes"] < less["linears_bytes"] and more["disk_bytes"] < less["disk_bytes"]
        assert more["bits_per_byte"] > less["bits_per_byte"]
