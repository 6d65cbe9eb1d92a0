"""What GPUs are predicted to take: from the counted rows, without surprises, and told apart from what was measured."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tables import curve, made

from alphaprune import inspection
from alphaprune.kernels import base, cuda, cuda_layouts, predicted, table
from alphaprune.kernels.table import DENSE, Gpu

ROOT = Path(__file__).parent.parent
A100, H100, H200 = (Gpu(name, "") for name in ("NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3", "NVIDIA H200"))
GPUS = (A100, H100, H200)
SHAPE = (28672, 4096)


def test_counts_are_those_of_the_machine_code() -> None:
    found: dict[str, dict[tuple[str, int], tuple[float, float]]] = {}
    for line in (ROOT / "bench" / "results" / "cubins.jsonl").read_text().splitlines():
        row = json.loads(line)
        of_arch, key = found.setdefault(row["arch"], {}), (row["kernel"].partition("<")[0], row["m"])
        of_arch[key] = max(of_arch.get(key, (0, 0)), (row["instr"], row["wavefronts"] or row["lsu"]))
    assert found == predicted.COUNTS


def test_more_work_never_takes_less_time() -> None:
    kernels = (*predicted.MOST, *predicted.EXPANDED, "nm_cusparselt", DENSE)
    for gpu, kernel, size in itertools.product(GPUS, kernels, (2, 1)):
        if predicted.seconds(kernel, gpu, SHAPE, 0.5, 1, size) is None:
            assert (kernel == "sbt_wgmma" and gpu is A100) or (size == 1 and kernel in predicted.MOST)
            assert kernel != "sbt_mma"
            continue
        tokens = [predicted.seconds(kernel, gpu, SHAPE, 0.5, t, size) for t in range(1, 600)]
        shares = [predicted.seconds(kernel, gpu, SHAPE, d / 10, 4, size) for d in range(11)]
        sizes = [predicted.seconds(kernel, gpu, (n, 4096), 0.5, 4, size) for n in (1024, 4096, 28672)]
        assert tokens == sorted(tokens) and shares == sorted(shares) and sizes == sorted(sizes), (gpu, kernel)


def test_what_is_not_known_is_none() -> None:
    assert predicted.seconds("sbt_mma", Gpu("NVIDIA T4", "7.5"), SHAPE, 0.5, 1) is None
    assert predicted.seconds("triton", A100, SHAPE, 0.5, 1) is None
    assert predicted.table_of(Gpu("NVIDIA T4", "7.5"), ["sbt_mma"]) is None
    assert predicted.of_int8(Gpu("NVIDIA T4", "7.5")) is None
    assert predicted.verdict(made(curve("sbt_mma", 0.5, [1] * 4, dtype="bfloat16"))) is None, "of a CPU"


@pytest.mark.parametrize("gpu", GPUS, ids=str)
def test_the_built_in_choice_is_what_the_model_predicts(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel that runs there is predicted to be more than a third faster than the one that is taken."""
    monkeypatch.setenv("ALPHAPRUNE_TIMES", "off")
    wide = predicted.rates_of(gpu).arch == "sm_90a"
    names = {"delta_spmv", "sbt_mma", "sbt_expand", *(["sbt_wgmma"] if wide else [])}
    known = {n: replace(k, available=lambda: None) for n, k in base.kernels().items() if n in names}
    monkeypatch.setattr(base, "kernels", lambda: known)
    half = torch.bfloat16
    for tokens in (1, 8, 16, 32, 64, 128, 256, 512, 4096):
        taken, _ = base.choose(SHAPE, tokens, half, half, "cuda")
        found = {name: predicted.seconds(name, gpu, SHAPE, 0.5, tokens) for name in names}
        assert found[taken.name] <= 4 / 3 * min(found.values()), (tokens, taken.name, found)


def measured(gpu: Gpu, factor: float, *kernels: str) -> table.Table:
    """A table as the model has it, times a factor."""
    found = predicted.table_of(gpu, kernels)
    slow = tuple(replace(c, seconds=tuple(factor * s for s in c.seconds)) for c in found.curves)
    return replace(found, curves=slow, versions={"alphaprune": "1"}, path="times.json")


def test_a_verdict_says_how_far_off_it_was() -> None:
    for factor in (1.5, 1 / 1.5):
        text = predicted.verdict(measured(A100, factor, "sbt_mma", "delta_spmv"))
        assert "the prediction for NVIDIA A100-SXM4-80GB was off by a factor of 1.50 (median of " in text
        assert f"delta_spmv {factor:.2f}, dense {factor:.2f}, sbt_mma {factor:.2f}" in text and "\n" not in text


def test_info_tells_the_predicted_from_the_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table.Gpu, "at", classmethod(lambda cls, index: A100))
    monkeypatch.setattr(table, "current", lambda device: None)
    guessed = inspection._break_even("cuda:0")
    kinds = list(itertools.product(("bfloat16", "int8"), inspection.TYPICAL))
    assert set(guessed) == {f"predicted, cuda:0 {values} {n}×{k}" for values, (n, k) in kinds}
    monkeypatch.setattr(table, "current", lambda device: measured(A100, 2.0, "sbt_mma"))
    both = inspection._break_even("cuda:0")
    assert {key.removeprefix("predicted, ") for key in both} == {key for key in both if "predicted" not in key}
    assert len(both) == 2 * len(kinds)
    assert "off by a factor of 2.00" in inspection._source("cuda:0")


def test_int8_is_told_with_its_count() -> None:
    for gpu in GPUS:
        text, counts = predicted.of_int8(gpu), predicted.COUNTS[predicted.rates_of(gpu).arch]
        assert f"decoding issues {counts['sbt_mma_int8', 8][0]:g} instructions per 1024 weights" in text
        assert text.endswith(f"of 16-bit ones {counts['sbt_mma', 8][0]:g}")
        one, *more = [float(part.split()[-1]) for part in text.split(":")[0].split("×")[:-1]]
        names = ("sbt_mma", "delta_spmv", *(["sbt_wgmma"] if ("sbt_wgmma", 32) in counts else []))
        best = min(predicted.seconds(name, gpu, (28672, 4096), 0.5, 1) for name in names)
        assert one == round(best / predicted.seconds("sbt_mma", gpu, (28672, 4096), 0.5, 1, 1), 2)
        assert 1 <= one < 2 and all(0.5 < gain < 2 for gain in more)


@pytest.mark.parametrize("gpu", GPUS, ids=str)
def test_int8_values_take_the_compiled_kernel(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as no other kernel of which something is known is predicted to be more than a third faster."""
    monkeypatch.setenv("ALPHAPRUNE_TIMES", "off")
    names = {"delta_spmv", "sbt_wgmma", "sbt_mma", "sbt_expand", "triton_ell", "triton", "triton_expand"}
    known = {n: replace(k, available=lambda: None) for n, k in base.kernels().items() if n in names}
    monkeypatch.setattr(base, "kernels", lambda: known)

    def taken(tokens: int, x: torch.dtype = torch.bfloat16, density: float | None = 0.5) -> str:
        return base.choose(SHAPE, tokens, torch.int8, x, "cuda", density)[0].name

    for tokens in (1, 8, 16, 32, 64, 128, 256, 512, 4096):
        found = {n: predicted.seconds(n, gpu, SHAPE, 0.5, tokens, 1) for n in ("sbt_mma", "triton_expand")}
        assert found[taken(tokens)] <= 4 / 3 * min(found.values()), (tokens, taken(tokens), found)
    assert taken(1, torch.float16) == "sbt_mma" and taken(1, torch.float32) == "triton"
    assert taken(1, density=0.15) == "triton_ell" and taken(4, density=0.15) == "sbt_mma"


def test_the_default_of_each_kernel_is_marked_as_predicted() -> None:
    assert "predicted" in inspection._source("cpu") or "measured" in inspection._source("cpu")
    assert {k.name for k in (*cuda.KERNELS, *cuda_layouts.KERNELS)} <= set(predicted.MOST)
