"""bench/variants.py without a GPU: what is replaced stands in the source, and what should compute the same does."""

import shutil
import sys
from pathlib import Path

import cuda_face
import pytest
import test_cuda_wgmma

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import cuda_tools  # noqa: E402
import variants  # noqa: E402


@pytest.mark.parametrize("variant", [*variants.VARIANTS, *variants.NONSENSE])
def test_what_is_replaced_stands_in_the_source(variant: str) -> None:
    as_it_is = variants.changed(variants.AS_IT_IS)
    assert (variants.changed(variant) == as_it_is) == (variant == variants.AS_IT_IS)


def test_what_does_not_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(variants.NONSENSE, "nothing", {"no such text": ""})
    with pytest.raises(ValueError, match="'no such text' stands 0 times in sbt_wgmma"):
        variants.changed("nothing")


def test_without_a_gpu_it_says_why(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    from alphaprune.kernels import cuda

    monkeypatch.setattr(cuda, "missing_wide", lambda: "there is none")
    assert variants.main([]) == 2
    assert capsys.readouterr().err == "variants.py: there is none\n"
    with pytest.raises(SystemExit):
        variants.main(["--only", "no gravity"])
    assert "--only 'no gravity': there are as it is, " in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("variant", [name for name in variants.VARIANTS if name != variants.AS_IT_IS])
def test_other_constants_compute_the_same(variant: str, tmp_path: Path) -> None:
    library = cuda_face.build("wgmma", tmp_path, variants.VARIANTS[variant])
    test_cuda_wgmma.battery(library.sbt_wgmma_emulated)


@pytest.mark.slow
@pytest.mark.skipif(bool(cuda_tools.missing()), reason=str(cuda_tools.missing()))
@pytest.mark.parametrize("variant", variants.NONSENSE)
def test_nonsense_compiles(variant: str, tmp_path: Path) -> None:
    copy = shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (copy / "cuda" / f"{variants.SOURCE}.cuh").write_text(variants.changed(variant))
    cuda_tools.compile_cubin(copy / "cuda" / f"{variants.SOURCE}.cu", "sm_90a", tmp_path / "out.cubin")
