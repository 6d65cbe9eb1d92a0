"""Comparisons against models pruned and judged one by one; choice and report; interruptions; what is refused."""

import copy
import json
import math
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import make_model
from hypothesis import given
from hypothesis import strategies as st
from test_evaluate import direct

from alphaprune import compare, data, evaluate, picture, pruning
from alphaprune.candidates import Settings
from alphaprune.compare import Comparison
from alphaprune.evaluate import Judged
from alphaprune.model import DirectorySource, LiveSource
from alphaprune.plan_file import Plan
from alphaprune.states import Room

SETTINGS = Settings((0.5, 0.7), ("uniform", "ramp", "alpha"), ("magnitude", "wanda"), samples=4, length=32, windows=6)


def text(seed: int, count: int = 300) -> data.Text:
    tokens = torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed))
    return data.Text(f"text {seed}", f"sha {seed}", count, tokens, torch.arange(1, count + 1))


class Bars:
    """Counts what progress bars are told, and interrupts at a step."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.steps, self.totals, self.stop_at = 0, 0, stop_at

    @contextmanager
    def __call__(self, total: int, description: str, unit: str):
        self.totals += total
        yield self.tick

    def tick(self, step: str) -> None:
        self.steps += 1
        if self.steps == self.stop_at:
            raise KeyboardInterrupt


def comparison(folder: Path, bars: Bars | None = None, model=None, **changes) -> Comparison:
    arguments = {"source": LiveSource(model or make_model(1)), "settings": SETTINGS, "calibration": text(0)}
    return Comparison(**{**arguments, "text": text(1), "folder": folder, "bar": bars or Bars(), **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A comparison with its test, in a folder that must not be changed."""
    folder = tmp_path_factory.mktemp("compare") / "out"
    bars = Bars()
    made = comparison(folder, bars)
    made.run()
    results = made.test(lambda: text(2))
    made.close()
    assert bars.steps == bars.totals
    return folder, results


@pytest.mark.parametrize("split", ["validation", "test"])
def test_figures_are_those_of_models_made_one_by_one(finished, split: str) -> None:
    folder, results = finished
    dense, tokens = make_model(1), text({"validation": 1, "test": 2}[split]).tokens[:192].reshape(6, 32)
    rows = results[split]["rows"]
    assert len(rows) == 12 and list(rows) == list(results["validation"]["rows"])
    calibration = data.sample_windows(text(0), 4, 32, 0)
    for name, row in rows.items():
        pruned, plan = copy.deepcopy(dense), Plan.load(folder / row["plan"])
        assert (plan.allocator, plan.sparsity, plan.epsilon) == (row["allocator"], row["sparsity"], row["epsilon"])
        assert row["realized"] == plan.realized == pytest.approx(row["sparsity"], abs=1e-5)
        pruning.prune(pruned, plan, row["method"], calibration, prefix="dense")
        losses, divergences = direct(dense, pruned, tokens)
        assert row["window_losses"] == pytest.approx(losses.tolist(), rel=1e-4), name
        assert row["window_divergences"] == pytest.approx(divergences.tolist(), rel=1e-3), name
        assert row["loss"] == pytest.approx(losses.mean().item(), rel=1e-4)
        assert row["kl"] == pytest.approx(divergences.mean().item(), rel=1e-3)
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
        assert row["stderr"] == pytest.approx(losses.std().item() / math.sqrt(6), rel=1e-3)
        assert row["bits_per_byte"] == pytest.approx(row["loss"] / math.log(2))  # a byte per token
    losses = direct(dense, dense, tokens)[0]
    assert results[split]["dense"]["window_losses"] == pytest.approx(losses.tolist(), rel=1e-4)
    assert results[split]["dense"]["kl"] == 0


def test_the_best_on_the_validation_text_is_recommended(finished) -> None:
    folder, results = finished
    rows = results["validation"]["rows"]
    assert [chosen["sparsity"] for chosen in results["recommended"]] == [0.5, 0.7]
    for chosen in results["recommended"]:
        alike = {n: row for n, row in rows.items() if row["sparsity"] == chosen["sparsity"]}
        best = alike[chosen["id"]]
        assert best["loss"] == min(row["loss"] for row in alike.values()) and best["same_as"] is None
        assert Plan.load(folder / chosen["plan"]) == Plan.load(folder / best["plan"])
        for baseline, versus in chosen["versus"].items():
            other = alike[f"{chosen['sparsity']:.2f}-{baseline}-{best['method']}"]
            differences = [a - b for a, b in zip(best["window_losses"], other["window_losses"], strict=True)]
            assert versus["difference"] == pytest.approx(sum(differences) / 6)
        assert list(chosen["versus"]) == ["uniform", "ramp"]
    assert chosen["plan"] == "plan-0.70.json"


def test_test_rows_are_held_against_the_best_of_them(finished) -> None:
    _, results = finished
    rows = results["test"]["rows"]
    for name, row in rows.items():
        alike = {n: r for n, r in rows.items() if r["sparsity"] == row["sparsity"]}
        best = row["versus_best"]["id"]
        assert alike[best]["loss"] == min(r["loss"] for r in alike.values())
        assert row["versus_best"]["difference"] == pytest.approx(row["loss"] - alike[best]["loss"], abs=1e-12)
        assert name != best or row["versus_best"]["stderr"] == 0


def test_one_model_is_judged_once(finished, tmp_path: Path, monkeypatch) -> None:
    _, results = finished
    rows = results["validation"]["rows"]
    twins = {name: row["same_as"] for name, row in rows.items() if row["same_as"]}
    assert twins == {f"0.50-{a}-{m}": f"0.50-uniform-{m}" for a in ("ramp", "alpha") for m in SETTINGS.methods}
    for name, first in twins.items():
        assert all(rows[name][figure] == rows[first][figure] for figure in compare.FIGURES)
    judged, original = [], Comparison._measure
    monkeypatch.setattr(Comparison, "_measure", lambda self, c, *a: judged.append(c.id) or original(self, c, *a))
    assert comparison(tmp_path / "out").run()["validation"] == results["validation"]
    assert judged == [name for name in rows if name not in twins]


def test_the_test_text_is_read_after_the_choice_and_has_no_part_in_it(finished, tmp_path: Path) -> None:
    folder, results = finished
    made = comparison(tmp_path / "out")
    with pytest.raises(ValueError, match=r"call run\(\) first"):
        made.test(lambda: pytest.fail("read before the choice"))
    made.run()
    before = (tmp_path / "out/results.json").read_text()
    assert "test" not in json.loads(before)

    def read() -> data.Text:
        assert (tmp_path / "out/results.json").read_text() == before
        assert json.loads(before)["recommended"] == results["recommended"]
        return text(3)

    other = made.test(read)
    assert other["recommended"] == results["recommended"] and other["validation"] == results["validation"]
    assert other["test"]["sha256"] == "sha 3" and other["test"]["rows"] != results["test"]["rows"]
    assert made.test(lambda: text(2)) == results  # another one replaces it
    assert (tmp_path / "out/results.json").read_bytes() == (folder / "results.json").read_bytes()


def test_the_model_is_dense_again(tmp_path: Path) -> None:
    model, wanted = make_model(1), make_model(1).state_dict()
    comparison(tmp_path / "whole", model=model).run()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(KeyboardInterrupt):
        comparison(tmp_path / "part", Bars(stop_at=30), model=model).run()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())


def test_interrupted_anywhere_the_results_are_the_same(finished, tmp_path: Path, monkeypatch) -> None:
    """At a step of every kind: calibration, analysis, pruning, judging, of either text; on disk and in memory."""
    folder, _ = finished
    wanted = {f.relative_to(folder): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    from alphaprune import candidates

    gather = candidates.gather
    for in_memory in (0, 2**30):
        out = tmp_path / str(in_memory)
        monkeypatch.setattr(candidates, "gather", lambda *a, most=in_memory, **more: gather(*a, most, **more))
        runs, stop_at = 0, 2
        while True:
            made = comparison(out, Bars(stop_at=stop_at))
            try:
                made.run()
                made.test(lambda: text(2))
                made.close()
                break
            except KeyboardInterrupt:
                runs, stop_at = runs + 1, stop_at * 2 + 3
        assert runs >= 4
        assert {f.relative_to(out): f.read_bytes() for f in out.rglob("*") if f.is_file()} == wanted


def test_finished_candidates_are_not_judged_again(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        comparison(tmp_path / "out", Bars(stop_at=45)).run()
    done = list(json.loads((tmp_path / "out/results.json").read_text())["validation"]["rows"])
    assert 0 < len(done) < 12
    judged, original = [], Comparison._measure
    monkeypatch.setattr(Comparison, "_measure", lambda self, c, *a: judged.append(c.id) or original(self, c, *a))
    comparison(tmp_path / "out").run()
    assert judged and not set(judged) & set(done)


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("model", {"model": make_model(2)}),
        ("calibration", {"calibration": text(5)}),
        ("text", {"text": text(5)}),
        ("seed", {"seed": 1}),
        ("samples", {"samples": 5}),
        ("length", {"length": 31}),
        ("windows", {"windows": 5}),
        ("methods", {"methods": ("wanda",)}),
        ("allocators", {"allocators": ("uniform", "ramp")}),
        ("sparsities", {"sparsities": (0.5,)}),
        ("epsilons", {"epsilons": (0.1,)}),
        ("refit", {"refit": True}),
        ("pattern", {"pattern": "N:8"}),
    ],
)
def test_another_comparison_is_refused_and_says_what_differs(finished, key: str, changes: dict) -> None:
    folder, _ = finished
    before = (folder / "results.json").read_bytes()
    if key in vars(SETTINGS):
        changes = {"settings": Settings(**{**vars(SETTINGS), **changes})}
    with pytest.raises(ValueError, match=f"a comparison with another {key} lies here") as error:
        comparison(folder, **changes)
    assert "\n" not in str(error.value) and (folder / "results.json").read_bytes() == before


def test_folders_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes").write_text("x")
    (tmp_path / "file").write_text("x")
    for folder, message in (("mine", "holds no comparison"), ("file", "is a file"), ("file/x", "file/x")):
        with pytest.raises(ValueError, match=message):
            comparison(tmp_path / folder)
    for content in ("", "[]", "{}", '{"kind": "plan", "version": 1, "identity": {}}'):
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other/results.json").write_text(content)
        with pytest.raises(ValueError, match=r"results\.json"):
            comparison(tmp_path / "other")
        assert (tmp_path / "other/results.json").read_text() == content
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed/results.json.part").write_text("{")  # of a run that was killed in its first moment
    comparison(tmp_path / "killed")


def test_texts_that_will_not_do(tmp_path: Path) -> None:
    for changes, message in (
        ({"text": text(1, 31)}, "31 tokens, shorter than one window of 32"),
        ({"calibration": text(0, 31)}, "31 tokens, shorter than one window of 32"),
        ({"text": text(0)}, "the same text was given with --calibration"),
    ):
        with pytest.raises(ValueError, match=message):
            comparison(tmp_path / "out", **changes)
        assert not (tmp_path / "out").exists()
    made = comparison(tmp_path / "out", settings=Settings((0.6,), ("uniform", "ramp"), ("magnitude",), length=32))
    made.run()
    for other, message in ((text(1), "--text"), (text(0), "--calibration"), (text(9, 20), "shorter than one window")):
        with pytest.raises(ValueError, match=message):
            made.test(lambda other=other: other)
    assert made.test(lambda: text(2))["test"]["rows"]


def test_what_is_not_finite_comes_last_and_is_valid_json() -> None:
    good = compare.figures(Judged(torch.tensor([9.0, 11.0]).double(), torch.tensor([1.0, 1.0]).double()), 33, 64)
    assert good["loss"] == 10 and good["stderr"] == pytest.approx(1) and good["kl"] == 1
    assert good["bits_per_byte"] == pytest.approx(10 / math.log(2))
    for value in (math.nan, math.inf):
        bad = compare.figures(Judged(torch.tensor([1.0, value]).double(), torch.tensor([1.0, value]).double()), 33, 64)
        json.dumps(bad, allow_nan=False)
        assert bad["loss"] is bad["perplexity"] is bad["kl"] is bad["bits_per_byte"] is None
        assert compare.rank(bad) > compare.rank(good)
        assert compare.paired(bad, good) == {"difference": None, "stderr": None}
        assert not compare.clear(compare.paired(bad, good))
    alone = compare.figures(Judged(torch.tensor([800.0]).double(), torch.tensor([1.0]).double()), 33, None)
    assert alone["stderr"] is alone["bits_per_byte"] is alone["perplexity"] is None and alone["loss"] == 800


@given(st.lists(st.tuples(st.floats(0, 20), st.floats(0, 20)), min_size=2, max_size=30))
def test_paired_differences(pairs: list[tuple[float, float]]) -> None:
    row, other = ({"window_losses": list(side)} for side in zip(*pairs, strict=True))
    found = compare.paired(row, other)
    differences = [a - b for a, b in pairs]
    mean = math.fsum(differences) / len(pairs)
    error = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (len(pairs) - 1) / len(pairs))
    assert found["difference"] == pytest.approx(mean, abs=1e-9) and found["stderr"] == pytest.approx(error, abs=1e-9)
    if abs(abs(mean) - 2 * error) > 1e-6:
        assert compare.clear(found) == (abs(mean) > 2 * error)


def test_the_summary_has_no_windows(finished) -> None:
    _, results = finished
    short = compare.summary(results)
    assert "window_losses" not in json.dumps(short) and short["recommended"] == results["recommended"]
    assert short["test"]["rows"].keys() == results["test"]["rows"].keys()
    assert "window_losses" in json.dumps(results)


def test_the_picture_shows_every_candidate(finished, tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    _, results = finished
    points, original = [], Axes.errorbar
    monkeypatch.setattr(Axes, "errorbar", lambda self, x, y, **o: points.append((x, o)) or original(self, x, y, **o))
    assert picture.draw(results, tmp_path / "p.png") == str(tmp_path / "p.png")
    part = results["validation"]
    losses = [row["loss"] - part["dense"]["loss"] for row in part["rows"].values()]
    assert sorted(x for x, _ in points) == pytest.approx(sorted(losses))
    hollow = [o["markerfacecolor"] == "white" for _, o in points]
    assert sum(hollow) == 8  # uniform and ramp, two methods, two sparsities
    assert {f.name for f in tmp_path.iterdir()} == {"p.png"}


def test_a_picture_without_matplotlib(finished, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert picture.draw(finished[1], tmp_path / "p.png") is None and not list(tmp_path.iterdir())


def test_windows_are_the_first_of_the_text(tmp_path: Path) -> None:
    use = Settings((0.6,), ("uniform", "ramp"), ("magnitude",), length=32, windows=2)
    found = comparison(tmp_path / "out", settings=use).run()
    every = comparison(tmp_path / "all", settings=Settings(**{**vars(use), "windows": None})).run()
    for name, row in found["validation"]["rows"].items():
        assert row["window_losses"] == pytest.approx(every["validation"]["rows"][name]["window_losses"][:2], rel=1e-6)
    assert len(every["validation"]["dense"]["window_losses"]) == 300 // 32
    assert evaluate.window_count(text(1), 32, 2) == 2


@pytest.mark.parametrize("tied", [True, False])
def test_a_directory_is_compared_as_the_model_in_memory_is(tmp_path: Path, tied: bool) -> None:
    """Block by block, hidden states in a file: the same figures, and no weight is left in memory."""
    make_model(1, tie_word_embeddings=tied).save_pretrained(tmp_path / "model")
    known = comparison(tmp_path / "live", model=make_model(1, tie_word_embeddings=tied)).run()
    source = DirectorySource(tmp_path / "model")
    found = comparison(tmp_path / "lazy", source=source, room=Room(0, tmp_path)).run()
    assert found["recommended"][0]["id"] == known["recommended"][0]["id"]
    for name, row in known["validation"]["rows"].items():
        other = found["validation"]["rows"][name]
        assert other["loss"] == pytest.approx(row["loss"], rel=1e-6) and other["kl"] == pytest.approx(
            row["kl"], rel=1e-4
        )
    assert all(parameter.is_meta for parameter in source.skeleton.parameters())
