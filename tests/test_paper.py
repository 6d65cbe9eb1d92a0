"""bench/paper.py on a small model and made-up texts: published sampling, counts and ratios, rows that continue."""

import gzip
import importlib.util
import json
import math
import random
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import make_model, shared

import alphaprune
from alphaprune import data
from alphaprune.analysis import Analysis, LayerStat
from alphaprune.evaluate import evaluate
from alphaprune.pattern import Unstructured
from alphaprune.planning import LayerPlan, Plan

pytestmark = pytest.mark.usefixtures("one_thread")
SCRIPT = Path(__file__).parent.parent / "bench" / "paper.py"
TRIAL = ["--size", "7b", "--dtype", "float32", "--samples", "5", "--length", "32", "--device", "cpu"]


@pytest.fixture(scope="module")
def paper() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_paper", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def documents() -> list[str]:
    draw = random.Random(7)
    words = ["the", "sparse", "weight", "of", "a", "tail", "→"]
    return [" ".join(draw.choices(words, k=draw.choice((2, 5, 20, 60)))) for _ in range(30)]


@pytest.fixture(scope="module")
def c4(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> Path:
    file = tmp_path_factory.mktemp("c4") / "c4-train.json.gz"
    with gzip.open(file, "wt", encoding="utf-8") as out:
        out.writelines(json.dumps({"text": text, "url": "none"}) + "\n" for text in documents)
    return file


def published_windows(tokenizer, documents: list[str], samples: int, length: int) -> torch.Tensor:
    """locuslab/wanda, lib/data.py, get_c4, by its rule: the global generator, and no memory of what was too short."""
    random.seed(0)
    found = []
    for _ in range(samples):
        tokens: list[int] = []
        while len(tokens) <= length:
            tokens = tokenizer(documents[random.randint(0, len(documents) - 1)])["input_ids"]
        start = random.randint(0, len(tokens) - length - 1)
        found.append(tokens[start : start + length])
    return torch.tensor(found)


def test_calibration_is_drawn_as_published(paper, directory: Path, documents: list[str], c4: Path, tmp_path) -> None:
    tokenizer = data.load_tokenizer(directory)
    assert paper.read_documents(str(c4)) == documents
    (tmp_path / "list.json").write_text(json.dumps([{"text": text} for text in documents]))
    assert paper.read_documents(str(tmp_path / "list.json")) == documents
    found = paper.draw_windows(tokenizer, documents, 40, 64, 0)
    assert torch.equal(found, published_windows(tokenizer, documents, 40, 64)) and found.shape == (40, 64)
    assert not torch.equal(found, paper.draw_windows(tokenizer, documents, 40, 64, 1))
    with pytest.raises(ValueError, match="none of 30 documents has more than 4000 tokens"):
        paper.draw_windows(tokenizer, documents, 1, 4000, 0)


def test_sizes_and_epsilons(paper) -> None:
    from transformers import LlamaConfig

    def guess(hidden: int, blocks: int, positions: int) -> str:
        config = LlamaConfig(hidden_size=hidden, num_hidden_layers=blocks, max_position_embeddings=positions)
        return paper.size_of(config)

    assert [guess(4096, 32, 2048), guess(4096, 32, 4096), guess(5120, 40, 2048)] == ["7b", "llama2-7b", "13b"]
    assert [guess(8192, 80, 2048), guess(8192, 80, 4096), guess(6656, 60, 2048)] == ["65b", "llama2-70b", "30b"]
    with pytest.raises(ValueError, match=r"\(4096, 31, 2048\): give --size"):
        guess(4096, 31, 2048)
    protocol = paper.Protocol(None, "13b", 0.7, None, None, None, "", 0)
    found = {cell: paper.epsilon_of(cell, protocol) for cell in paper.CELLS}
    assert found["magnitude/alpha"] == 0.5 and found["wanda/alpha"] == found["sparsegpt/alpha"] == 0.3
    assert found["dense"] is found["wanda/uniform"] is None and found["wanda/owl"] == 0.08 / 0.7
    with pytest.raises(ValueError, match=r"ε is published for sparsity 0\.7 only"):
        paper.epsilon_of("wanda/alpha", protocol._replace(sparsity=0.8))
    assert paper.epsilon_of("wanda/alpha", protocol._replace(sparsity=0.8, epsilon=0.2)) == 0.2


def test_published_ratios_and_counts_on_the_published_alphas(paper) -> None:
    """The ratios of the released formula, those above 1 among them, and the released code's counts."""
    found = json.loads((shared("data/alphas") / "llama-7b.json").read_text())
    layers = {e["name"]: LayerStat(e["block"], tuple(e["shape"]), {"alpha": e["alpha"]}) for e in found["layers"]}
    known, above = Analysis("llama-7b", "0" * 64, "float16", "reference", None, layers), []
    for case in found["reference_allocation_uncapped"]:
        protocol = paper.Protocol(None, "7b", case["sparsity"], case["epsilon"], None, None, "", 0)
        ratios = paper.ratios_of("wanda/alpha", protocol, known)
        wanted = {name: case["block_sparsity"][stat.block] for name, stat in layers.items()}
        assert max(abs(ratios[name] - wanted[name]) for name in wanted) < 1e-8
        plan, more = paper.plan_of("wanda/alpha", protocol, known)
        above.append(more)
        assert more == sum(r > 1 for r in wanted.values())
        for name, planned in plan.layers.items():
            n, k = planned.shape
            assert planned.zeros == n * min(k, int(k * ratios[name]))
    assert max(above) > 0  # one of them does not fit


def test_ratios_above_one_stay(paper) -> None:
    """s = η·r, η = S·ΣN / ΣN·r: with one size of layers and mean r of 1, 0.8·1.4 in the block of the largest alpha."""
    layers = {
        f"model.layers.{b}.q": LayerStat(b, (8, 40), {"alpha": float(alpha)}) for b, alpha in enumerate((2, 4, 3))
    }
    known = Analysis("toy", "0" * 64, "float16", "reference", None, layers)
    protocol = paper.Protocol(None, "7b", 0.8, 0.4, None, None, "", 0)
    assert list(paper.ratios_of("wanda/alpha", protocol, known).values()) == pytest.approx([0.48, 1.12, 0.8])
    plan, above = paper.plan_of("wanda/alpha", protocol, known)
    assert above == 1 and [p.zeros for p in plan.layers.values()] == [8 * 19, 8 * 40, 8 * 32]


def test_counts_by_the_released_rules(paper) -> None:
    generator = torch.Generator().manual_seed(0)
    for ratio in (0.0, 0.31, 0.7, 0.95):
        weight = torch.rand(24, 200, generator=generator)  # float32, no ties
        threshold = weight.flatten().sort().values[int(weight.numel() * ratio)]
        assert paper.zeros_of("magnitude", (24, 200), ratio) == int((weight <= threshold).sum())
        halves = [part for part in weight.split(128, 1)]
        wanted = sum(int((p <= p.flatten().sort().values[int(p.numel() * ratio)]).sum()) for p in halves)
        assert paper.zeros_of("sparsegpt", (24, 200), ratio) == wanted
        assert paper.zeros_of("wanda", (24, 200), ratio) == 24 * int(200 * ratio)
    assert paper.zeros_of("wanda", (24, 200), 1.2) == 4800
    assert paper.zeros_of("magnitude", (24, 200), 1.2) == paper.zeros_of("magnitude", (24, 200), 0.99999) <= 4800


def rows_of(paper, capsys, *arguments) -> list[dict]:
    assert paper.main([str(a) for a in arguments]) == 0, capsys.readouterr().err
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_every_cell_runs_and_is_not_run_again(paper, directory, text_file, c4, tmp_path, capsys, monkeypatch) -> None:
    start = [directory, "--wikitext", text_file, "--c4", c4, "-o", tmp_path / "rows.jsonl", *TRIAL]
    first = rows_of(paper, capsys, *start, "--cells", "dense,wanda/uniform")
    rows = rows_of(paper, capsys, *start)
    assert [row["cell"] for row in rows] == list(paper.CELLS) and rows[:1] == first[:1]
    by_cell = {row["cell"]: row for row in rows}
    assert by_cell["wanda/uniform"] == first[1]  # with its seconds: taken from the file
    assert all(math.isfinite(row["perplexity"]) and row["length"] == 32 for row in rows)
    assert by_cell["wanda/uniform"]["published"] == 85.77 and by_cell["sparsegpt/alpha"]["published"] is None
    assert by_cell["magnitude/uniform"]["calibration"] is None and by_cell["wanda/owl"]["samples"] == 5
    assert len({row["perplexity"] for row in rows}) == len(rows)
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == len(paper.CELLS)
    monkeypatch.setattr(paper, "run_cell", None)
    monkeypatch.setattr(paper, "analyze", None)
    assert rows_of(paper, capsys, *start) == rows
    with pytest.raises(TypeError):  # another seed is another run
        paper.main([str(a) for a in (*start, "--seed", 1, "--cells", "wanda/uniform")])


def test_a_cell_is_what_the_library_does(paper, directory, text_file, c4, documents, tmp_path, capsys) -> None:
    """Perplexities of the streamed passes against `prune` and `evaluate` on a whole model."""
    start = [directory, "--wikitext", text_file, "--c4", c4, "-o", tmp_path / "rows.jsonl", *TRIAL]
    dense, pruned = rows_of(paper, capsys, *start, "--cells", "dense,wanda/uniform")
    tokenizer, model = data.load_tokenizer(directory), make_model(1)
    text = data.encode(tokenizer, data.read_text(text_file, wikitext=True))
    wanted = evaluate(model, text, 32)
    assert dense["perplexity"] == pytest.approx(wanted.perplexity, rel=1e-5) and dense["windows"] == wanted.windows
    known = alphaprune.analyze(model, fit=None)
    shapes = {name: stat.shape for name, stat in known.layers.items()}
    layers = {name: LayerPlan((n, k), n * int(k * 0.7), Unstructured()) for name, (n, k) in shapes.items()}
    plan = Plan(known.model, known.fingerprint, 0.7, "uniform", 0.0, "unstructured", layers)
    alphaprune.prune(model, plan, "wanda", published_windows(tokenizer, documents, 5, 32))
    assert pruned["perplexity"] == pytest.approx(evaluate(model, text, 32).perplexity, rel=1e-4)
    assert pruned["realized"] == plan.realized and pruned["ratios_above_1"] == 0


def test_float16_and_alphas(paper, directory, text_file, tmp_path, capsys) -> None:
    start = [directory, "--wikitext", text_file, "-o", tmp_path / "rows.jsonl", "--cells", "dense,magnitude/alpha"]
    stats = alphaprune.analyze(make_model(1).half(), fit="reference").layers
    found = {name: stat.columns["alpha"] for name, stat in stats.items()}
    alphas = [{"name": name, "alpha": alpha + 0.015 * (i % 3)} for i, (name, alpha) in enumerate(found.items())]
    (tmp_path / "alphas.json").write_text(json.dumps({"layers": alphas}))
    trial = ["--size", "7b", "--length", "32", "--device", "cpu", "--alphas", tmp_path / "alphas.json"]
    compared, dense, _ = rows_of(paper, capsys, *start, *trial)
    assert compared["median_difference"] == pytest.approx(0.015, abs=1e-6) and compared["alphas"] == len(alphas)
    assert compared["within_0.02"] == pytest.approx(2 / 3) and dense["dtype"] == "float16"
    text = data.encode(data.load_tokenizer(directory), data.read_text(text_file, wikitext=True))
    assert dense["perplexity"] == pytest.approx(evaluate(make_model(1).half(), text, 32).perplexity, rel=1e-2)
    (tmp_path / "alphas.json").write_text(json.dumps({"layers": alphas[1:]}))
    assert paper.main([str(a) for a in (*start, *trial)]) == 2
    assert "1 layers are not in both" in capsys.readouterr().err


BAD = {
    "cell": (["--cells", "wanda/magic"], "no cell is called 'wanda/magic'"),
    "sparsity": (["--sparsity", "1.5"], "sparsity 1.5"),
    "calibration": (["--cells", "wanda/uniform"], "give --c4 FILE"),
    "length": (["--cells", "dense", "--length", "4096"], "--length 4096"),
    "c4": (["--cells", "dense", "--c4", __file__], "cannot be read as JSON lines"),
    "missing": (["--cells", "dense", "--c4", "nothing.json"], "nothing.json: cannot be read"),
    "epsilon": (["--cells", "magnitude/alpha", "--sparsity", "0.5"], "give --epsilon"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_line(paper, directory: Path, text_file: Path, tmp_path: Path, capsys, kind: str) -> None:
    more, wanted = BAD[kind]
    start = [str(directory), "--wikitext", str(text_file), "-o", str(tmp_path / "rows.jsonl"), *TRIAL]
    assert paper.main([*start, *more]) == 2
    error = capsys.readouterr().err
    assert wanted in error and len(error.splitlines()) == 1 and not (tmp_path / "rows.jsonl").exists()
