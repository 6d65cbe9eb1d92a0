"""The report: every number drawn where it belongs, every name escaped, other models refused."""

import json
import math
import re
import shutil
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alphaprune import alpha, metrics, planning, sketches
from alphaprune.analysis import Analysis, LayerStat
from alphaprune.curves import BlockCurve, Curves
from alphaprune.report import chart, inputs, make, page, plans, png, spectra, svg
from alphaprune.report.chart import Chart, Series

KINDS = {"self_attn.q_proj": (64, 48), "mlp.up_proj": (160, 48)}
EVIL = "<script>alert('x')</script>\"&"
PRINT = "ab" * 32


def made_up(blocks: int = 3, model: str = "small", print_: str = PRINT, seed: int = 0) -> Analysis:
    """An analysis with spectra that have a tail."""
    generator, layers = torch.Generator().manual_seed(seed), {}
    for block in range(blocks):
        for kind, shape in KINDS.items():
            values = torch.rand(48, generator=generator, dtype=torch.float64).pow(-1.0 / (1 + block)).sort().values
            law = alpha.fit(values)
            columns = {**law.columns(), **metrics.columns(values, law, shape, 1e-6), "unstable": float(block == 1)}
            series = {sketches.SPECTRUM: sketches.eigenvalues(values)}
            layers[f"model.layers.{block}.{kind}"] = LayerStat(block, shape, columns, series)
    return Analysis(model, print_, "float32", "robust", "gram float32", layers, {"alphaprune": "0"})


def comparison(stats: Analysis, windows: bool = True) -> dict:
    """What `compare` writes, of two allocators and two methods at two sparsities."""

    def row(loss: float) -> dict:
        series = {"window_losses": [loss, loss + 0.5], "window_divergences": [0.0, 0.0]} if windows else {}
        return {
            "loss": loss + 0.25,
            "stderr": 0.1,
            "perplexity": math.exp(loss),
            "bits_per_byte": None,
            "kl": 0.1,
            **series,
        }

    rows, chosen = {}, []
    for sparsity in (0.5, 0.7):
        for place, (allocator, method) in enumerate((a, m) for a in ("uniform", "owl") for m in ("wanda", "alps")):
            about = {
                "sparsity": sparsity,
                "allocator": allocator,
                "method": method,
                "epsilon": 0.0,
                "realized": sparsity,
            }
            rows[f"{sparsity:.2f}-{allocator}-{method}"] = {**about, **row(2 + sparsity + 0.1 * place)}
        chosen.append({"sparsity": sparsity, "id": f"{sparsity:.2f}-uniform-wanda", "plan": "p.json", "versus": {}})
    identity = {
        "model": stats.fingerprint,
        "sparsities": [0.5, 0.7],
        "allocators": ["uniform", "owl"],
        "methods": ["wanda"],
    }
    identity |= {"epsilons": ["auto"], "pattern": "unstructured", "refit": False, "samples": 8, "length": 64, "seed": 0}
    found = {"kind": "comparison", "version": 1, "identity": identity, "recommended": chosen}
    return {**found, "validation": {"sha256": "0", "dense": row(2.0), "rows": rows}}


def info(stats: Analysis) -> dict:
    layers = []
    for place, (name, stat) in enumerate(stats.layers.items()):
        weights = stat.shape[0] * stat.shape[1]
        layers.append(
            {
                **{
                    "name": name,
                    "shape": list(stat.shape),
                    "weights": weights,
                    "zeros": weights // 2,
                    "why": "first choice",
                },
                **{
                    "bytes": weights,
                    "dense_bytes": 2 * weights,
                    "kernel": ("avx2", "torch")[place % 2],
                    "stored": "sbt bfloat16",
                },
                **{"seconds": None, "dense_seconds": None},
            }
        )
    totals = {
        "prunable_weights": 1,
        "sparsity": 0.5,
        "whole_model_sparsity": 0.4,
        "linears_bytes": 10,
        "linears_dense_bytes": 20,
    }
    about = {"model": "pruned", "model_type": "llama", "tokens": 1, "device": "cpu", "times": "none", "file_bytes": 30}
    return {"kind": "info", "command": "alphaprune info pruned --json", **about, **totals, "layers": layers}


def bench() -> dict:
    rows = []
    for shape in ((64, 48), (160, 48)):
        for sparsity in (0.5, 0.7):
            row = {"shape": list(shape), "tokens": 1, "sparsity": sparsity, "values": "bfloat16", "kernel": "avx2"}
            row |= {
                "seconds": 1e-3,
                "dense_seconds": 2e-3,
                "ratio": 2.0 + sparsity,
                "bytes_per_second": 1e9,
                "of_bandwidth": 0.5,
            }
            rows.append(row)
    return {"kind": "bench", "machine": "a CPU", "threads": 2, "bandwidth": 1e10, "rows": rows}


def evaluation(model: str, perplexity: float) -> dict:
    return {"kind": "eval", "model": model, "perplexity": perplexity, "tokens": 9, "windows": 1, "data_sha256": "0"}


def write_files(tmp_path: Path) -> list[Path]:
    """One file of every kind, of one model."""
    stats = made_up()
    stats.save(tmp_path / "analysis.json")
    planning.plan(stats, 0.7, epsilon=0.2).save(tmp_path / "plan.json")
    curve = BlockCurve((0.0, 0.5, 0.7), (0.0, 0.1, 0.4))
    Curves("small", PRINT, "wanda", "kl", dict.fromkeys(range(3), curve)).save(tmp_path / "curves.json")
    others = {"results": comparison(stats), "info": info(stats), "bench": bench(), "a": evaluation("pruned", 9.0)}
    others |= {"b": evaluation("dense", 8.0)}
    for name, found in others.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    return sorted(tmp_path.glob("*.json"))


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return write_files(tmp_path)


class Checker(HTMLParser):
    """Elements must close in order; every id may be there once."""

    VOID = ("meta", "!doctype")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.seen: dict[str, int] = {}
        self.links: list[str] = []
        self.feed(text)
        assert self.open == [] and len(self.ids) == len(set(self.ids))

    def handle_starttag(self, tag: str, attributes: list) -> None:
        found = dict(attributes)
        self.seen[tag] = self.seen.get(tag, 0) + 1
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found[key] for key in ("href", "src") if key in found]
        assert not [key for key in found if key.startswith("on")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attributes: list) -> None:
        self.handle_starttag(tag, attributes)
        self.open.pop()


def test_a_page_of_every_kind_of_file(files: list[Path], run, tmp_path: Path) -> None:
    status, out, err = run("report", *files, "-o", "r.html", "--json")
    assert (status, err) == (0, "")
    about = json.loads(out)
    assert {i["kind"] for i in about["inputs"]} == {"analysis", "plan", "curves", "comparison", "info", "bench", "eval"}
    text = Path("r.html").read_text()
    checked = Checker(text)
    assert about["bytes"] == len(text.encode()) and checked.seen["svg"] > 10 and checked.seen["table"] > 6
    assert all(link.startswith("#") and link[1:] in checked.ids for link in checked.links)
    assert "http" not in text.replace("http-equiv", "") and "script" not in checked.seen and "img" not in checked.seen
    for drawing in re.findall(r"<svg.*?</svg>", text, re.S):
        root = ET.fromstring(drawing)
        assert root.find("title").text and root.find("desc").text
    for word in ("uniform", "ramp", "recommended", "avx2", "alphaprune info pruned --json", "a CPU", "perplexity"):
        assert word in text
    assert "unstable" in text and text.count("α ") >= 6
    assert run("report", *files, "-o", "again.html")[0] == 0 and Path("again.html").read_text() == text


def test_names_are_escaped_everywhere(tmp_path: Path, run) -> None:
    stats = made_up(model=EVIL)
    stats = replace(stats, layers={f"{n}.{EVIL}": s for n, s in stats.layers.items()}, fit="robust")
    stats.save(tmp_path / "analysis.json")
    planning.plan(stats, 0.6, epsilon=0.1).save(tmp_path / "plan.json")
    found = json.loads(json.dumps({**info(stats), "model": EVIL, "times": EVIL}).replace("avx2", "<b>k</b>"))
    (tmp_path / "info.json").write_text(json.dumps(found))
    (tmp_path / "bench.json").write_text(json.dumps({**bench(), "machine": EVIL, "command": EVIL}))
    (tmp_path / "a.json").write_text(json.dumps(evaluation(EVIL, 8.0)))
    names = [tmp_path / f"{name}.json" for name in ("analysis", "plan", "info", "bench", "a")]
    assert run("report", *names)[0] == 0
    text = Path("report.html").read_text()
    checked = Checker(text)
    assert "script" not in checked.seen and "b" not in checked.seen
    assert "<script" not in text and "&lt;script&gt;" in text
    for drawing in re.findall(r"<svg.*?</svg>", text, re.S):
        ET.fromstring(drawing)


def test_other_models_are_refused(files: list[Path], run, tmp_path: Path) -> None:
    other = made_up(model="other", print_="cd" * 32)
    other.save(tmp_path / "other.json")
    status, _, err = run("report", tmp_path / "plan.json", tmp_path / "other.json")
    assert status == 2 and err.count("\n") == 1 and not Path("report.html").exists()
    for word in ("other.json is about another model than", "plan.json", "abababababab…", "cdcdcdcdcdcd…"):
        assert word in err
    (tmp_path / "info2.json").write_text(json.dumps(info(made_up(4))))
    status, _, err = run("report", tmp_path / "analysis.json", tmp_path / "info2.json")
    assert status == 2 and "layer model.layers.3.self_attn.q_proj has shape (64, 48) there and none here" in err
    assert run("report", tmp_path / "results.json", tmp_path / "other.json")[0] == 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("no json", "is no JSON"),
        ("[1]", "holds no object"),
        ('{"kind": "recipe book"}', "is none of analysis, plan"),
        ('{"some": 1}', "is none of analysis, plan"),
        ('{"kind": "comparison", "validation": {"rows": {}}}', "looks like the file of comparison, but"),
        ('{"kind": "analysis"}', "analysis version None"),
        ('{"kind": "bench", "rows": []}', "has no row"),
        ('{"kind": "info", "layers": [{"weights": "many"}]}', "weights: wanted a finite number"),
        ('{"kind": "eval", "perplexity": NaN, "tokens": 1}', "perplexity: wanted a finite number, got nan"),
    ],
)
def test_bad_files_get_one_sentence(content: str, said: str, run, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(content)
    status, _, err = run("report", "x.json")
    assert status == 2 and said in err and "x.json" in err and err.count("\n") == 1 and "Traceback" not in err


def test_bad_places_get_one_sentence(files: list[Path], run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "holds no comparison" in run("report", tmp_path / "empty")[2]
    assert "cannot be read: No such file" in run("report", "missing.json")[2]
    assert "there is no folder" in run("report", files[0], "-o", "nowhere/r.html")[2]
    assert "is a file; name a folder" in run("report", files[0], "--png", files[0])[2]


def test_folders_stand_for_their_files(files: list[Path], run, tmp_path: Path) -> None:
    folder = tmp_path / "comparison"
    folder.mkdir()
    for name in ("results", "analysis", "curves"):
        shutil.copy(tmp_path / f"{name}.json", folder)
    shutil.copy(tmp_path / "plan.json", folder / "plan-0.70.json")
    (tmp_path / "pruned").mkdir()
    plan = json.loads((tmp_path / "plan.json").read_text())
    recipe = {"alphaprune": "0", "source": "small", "method": "wanda", "model": PRINT, "plan": plan}
    (tmp_path / "pruned" / "alphaprune.json").write_text(json.dumps(recipe))
    status, out, _ = run("report", "comparison", "pruned", "--json")
    assert status == 0
    kinds = [one["kind"] for one in json.loads(out)["inputs"]]
    assert kinds == ["comparison", "analysis", "curves", "plan", "recipe"]
    assert "alphaprune prune small --plan plan.json --method wanda" in Path("report.html").read_text()


def test_marks_are_where_the_numbers_are() -> None:
    series = Series("s", (0.0, 1.0, 2.0), (10.0, 100.0, 1000.0), 1, "line", says=("a", "b", "c"))
    drawn = svg.draw(Chart("t", "d", "x", "y", (series,), y_log=True), "i")
    places = [
        tuple(map(float, p)) for p in re.findall(r'<path class="mark" d="M([\d.]+) ([\d.]+)L[^>]*><title>', drawn)
    ]
    (x0, y0), (x1, y1), (x2, y2) = places
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11) and y0 - y1 == pytest.approx(y1 - y2, abs=0.11)
    assert x0 < x1 < x2 and y0 > y1 > y2


def test_unstable_layers_are_crossed_and_bars_drawn() -> None:
    found = spectra._by_depth("q", {n: s for n, s in made_up().layers.items() if "q_proj" in n})
    assert found.series[0].flagged == (False, True, False) and found.series[0].error[0] > 0
    drawn = svg.draw(found, "i")
    assert drawn.count('class="hollow"') == 1 and drawn.count('class="bar"') == 1 and "unstable" in drawn


@given(st.integers(1, 5000))
def test_ranks_hold_both_ends_and_are_few(count: int) -> None:
    found = sketches.ranks(count)
    assert found == sorted(set(found)) and found[0] == 0 and found[-1] == count - 1 and len(found) <= 110
    assert found[:16] == list(range(min(16, count)))
    if count <= 60:
        assert len(found) == count


def test_the_histogram_of_a_sketch_is_that_of_the_spectrum() -> None:
    values = torch.randn(4096, generator=torch.Generator().manual_seed(1), dtype=torch.float64).exp().sort().values
    stat = LayerStat(0, (4096, 4096), {}, {sketches.SPECTRUM: sketches.eigenvalues(values)})
    low, high = 0.2, float(values[-1])
    found = spectra._histogram(stat, low, high, 0.25, 0)
    edges = sorted({round(x, 9) for x in found.x})
    for (left, right), height in zip(pairwise(edges), found.y[::2], strict=True):
        share = float(((values > left) & (values <= right)).sum()) / 4096 / math.log(right / left)
        assert height == pytest.approx(share, abs=0.015, rel=0.2)


def test_baselines_meet_the_budget_of_the_plan(files: list[Path], tmp_path: Path) -> None:
    found = inputs.read([tmp_path / "plan.json"])
    (section,) = plans.sections(found)
    by_block = section.charts[0]
    assert [s.name for s in by_block.series] == ["alpha", "uniform", "ramp"]
    weights = {b: 0 for b in found.layers.values()}
    for name, block in found.layers.items():
        shape = found.found[0].content.layers[name].shape
        weights[block] += shape[0] * shape[1]
    for series in by_block.series:
        total = sum(v * weights[int(b)] for b, v in zip(series.x, series.y, strict=True)) / sum(weights.values())
        assert total == pytest.approx(0.7, abs=1e-3)
    assert max(by_block.series[1].y) - min(by_block.series[1].y) < 1e-3
    assert by_block.series[2].y[0] < by_block.series[2].y[-1]
    (table,) = section.tables
    assert table.columns[:4] == ("block", "all", "uniform", "ramp")
    for column, series in enumerate(by_block.series, 1):
        assert [float(row[column]) for row in table.rows] == pytest.approx(list(series.y), abs=1e-4)


def test_the_table_behind_the_spectra_has_their_quantiles() -> None:
    values = torch.randn(3000, generator=torch.Generator().manual_seed(2), dtype=torch.float64).exp().sort().values
    fit = {"alpha": 3.0, "stderr": 0.1, "unstable": 0.0, "xmin": 2.0, "tail": 700.0, "ks": 0.05}
    series = {sketches.SPECTRUM: sketches.eigenvalues(values)}
    stats = replace(made_up(), layers={"model.layers.0.x": LayerStat(0, (3000, 4096), fit, series)})
    (row,) = spectra._quantiles(stats).rows
    assert row[:2] == ("model.layers.0.x", "3000") and len(row) == len(spectra._quantiles(stats).columns)
    for share, cell in zip(spectra.SHARES[:-1], row[2:-1], strict=True):
        assert float(cell) == pytest.approx(float(values.quantile(1 - share)), rel=0.02)
    assert float(row[-1]) == pytest.approx(float(values[0]), rel=0.01)


def test_ticks_are_round_and_inside() -> None:
    values, texts = zip(*chart.ticks(0.0, 1.0, False), strict=True)
    assert values == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1]) and texts == ("0.0", "0.2", "0.4", "0.6", "0.8", "1.0")
    assert [text for _, text in chart.ticks(-2.0, 3.0, True)] == ["0.01", "0.1", "1", "10", "100", "1000"]
    assert chart.ticks(-7.0, 7.0, True, 4)[0][1] == "10⁻⁷"
    for low, high in ((0.1, 0.1001), (-3e5, 2e7), (0.0, 3e-9)):
        found = chart.ticks(low, high, False)
        assert 2 <= len(found) <= 7 and all(low - 1e-12 <= v <= high + 1e-12 for v, _ in found)


def test_without_spectra_or_alphas_the_page_says_so(tmp_path: Path) -> None:
    stats = made_up()
    bare = replace(stats, layers={n: replace(s, series={}) for n, s in stats.layers.items()})
    bare.save(tmp_path / "old.json")
    words = [section.words for section in make.sections(make.read([tmp_path / "old.json"]))]
    assert any("`alphaprune analyze` again shows them" in w for w in words)
    empty = replace(stats, fit=None, layers={n: LayerStat(s.block, s.shape) for n, s in stats.layers.items()})
    empty.save(tmp_path / "empty.json")
    assert "without a fit" in make.sections(make.read([tmp_path / "empty.json"]))[0].words


def test_a_summary_without_windows_is_drawn_too(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps(comparison(made_up(), windows=False)))
    section = make.sections(make.read([tmp_path / "r.json"]))[0]
    baseline = next(series for series in section.charts[1].series if series.hollow)
    assert len(section.charts) == 3 and baseline.x == pytest.approx([0.5]) and baseline.error == (0.0,)


def test_pictures_are_one_for_each_chart_and_kind(files: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    sections = make.sections(make.read([tmp_path / "analysis.json", tmp_path / "results.json"]))
    wanted = png.pictures(sections)
    assert len({name for name, _ in wanted}) == len(wanted)
    few = [wanted[0], next(w for w in wanted if w[1][0].across), next(w for w in wanted if w[1][0].small)]
    for name, charts in few:
        png.draw(charts, tmp_path / name)
        assert (tmp_path / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not list(tmp_path.glob("*.part.png"))


def test_colours_differ_between_light_and_dark() -> None:
    style = (Path(page.__file__).parent / "style.css").read_text()
    light, dark = style.split("@media (prefers-color-scheme:dark)", 1)
    for place in range(svg.COLOURS):
        assert f"--c{place}:" in light and f"--c{place}:" in dark
        assert f".c{place}{{color:var(--c{place})}}" in style
    assert len({svg.mark(0, 0, place) for place in range(svg.COLOURS)}) == svg.COLOURS == len(set(svg.DASHES))
