"""cuSPARSELt through torch, on the CPU with a stand-in for the library; captures of what is not ready."""

from dataclasses import replace

import pytest
import torch
from test_cuda import of_four
from tolerance import assert_product
from torch import Tensor

from alphaprune.formats import sbt
from alphaprune.kernels import base, nm_library, spmm

MANY = nm_library.LEAST_TOKENS


class Library:
    """A stand-in for torch's calls of cuSPARSELt: its layout of a weight is the dense one. Every product with another
    algorithm than the one that a search found is wrong."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, algorithm: int = 7) -> None:
        self.compressed: list[Tensor] = []
        self.searches: list[tuple[int, bool]] = []  # tokens, and whether there was a bias
        self.algorithm = algorithm
        self.capturing = False
        monkeypatch.setattr(nm_library, "_found", {})
        monkeypatch.setattr(torch, "_cslt_compress", self.compress)
        monkeypatch.setattr(torch, "_cslt_sparse_mm", self.multiply)
        monkeypatch.setattr(torch, "_cslt_sparse_mm_search", self.search)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)

    def compress(self, dense: Tensor) -> Tensor:
        self.compressed.append(dense)
        return dense

    def search(self, compressed: Tensor, other: Tensor, bias: Tensor | None, transpose_result: bool) -> int:
        assert transpose_result and not self.capturing
        self.searches.append((other.shape[1], bias is not None))
        return self.algorithm

    def multiply(
        self, compressed: Tensor, other: Tensor, bias: Tensor | None, transpose_result: bool, alg_id: int
    ) -> Tensor:
        assert transpose_result and other.shape[1] % 8 == 0 and other.T.is_contiguous()
        wanted = nm_library.FIRST if self.capturing else self.algorithm
        return torch.nn.functional.linear(other.T, compressed, bias) + (0 if alg_id == wanted else 100)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    return Library(monkeypatch)


def two_of_four(n: int, k: int, dtype: torch.dtype) -> Tensor:
    weight = torch.randn(n, k).to(dtype)
    return weight * of_four(weight, 2)


@pytest.mark.parametrize("shape", [(48, 96), (96, 48)])
def test_the_library_gets_the_dense_weight_once(library: Library, shape: tuple[int, int]) -> None:
    weight = two_of_four(*shape, torch.bfloat16)
    n, k = shape
    bound = nm_library.bind(sbt.pack(weight))
    for bias in (None, torch.randn(n).bfloat16()):
        x = torch.randn(2, 5, k).bfloat16()
        given = x.clone()
        y = bound(x, bias)
        assert y.shape == (2, 5, n) and y.is_contiguous() and torch.equal(x, given)
        assert_product(y.view(10, n), x.view(10, k), weight, bias)
    wide = torch.randn(n)
    assert torch.equal(bound(x, wide), (bound(x, None) + wide).bfloat16())
    assert len(library.compressed) == 1 and torch.equal(library.compressed[0], weight)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("shape", [(16, 32), (32, 16)])
def test_a_token_that_is_not_finite_is_nan_and_no_other(library: Library, shape: tuple[int, int], value: float) -> None:
    weight = two_of_four(*shape, torch.float16)
    weight[:, 4:8] = 0  # what the value meets
    x = torch.randn(3, shape[1]).half()
    x[1, 7] = value
    y = nm_library.bind(sbt.pack(weight))(x, None)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


def test_its_algorithm_is_searched_for_once_for_products_alike(library: Library) -> None:
    weights = [two_of_four(32, 48, torch.bfloat16) for _ in range(2)]
    bounds = [nm_library.bind(sbt.pack(weight)) for weight in weights]

    def call(number: int, tokens: int, bias: Tensor | None = None) -> None:
        x = torch.randn(tokens, 48).bfloat16()
        assert_product(bounds[number](x, bias), x, weights[number], bias)

    for tokens in (513, 1024, 600):
        call(0, tokens), call(1, tokens)
    assert library.searches == [(520, False)]
    call(0, 1025), call(1, 512), call(0, 700, torch.randn(32).bfloat16())
    assert library.searches[1:] == [(1032, False), (512, False), (704, True)]


def test_nothing_is_searched_for_in_a_capture(library: Library) -> None:
    weight, x = two_of_four(32, 48, torch.bfloat16), torch.randn(40, 48).bfloat16()
    bound = nm_library.bind(sbt.pack(weight))
    library.capturing = True
    assert_product(bound(x, None), x, weight, None)
    library.capturing = False
    assert_product(bound(x, None), x, weight, None)
    assert library.searches == [(40, False)], "the first algorithm is not kept for later calls"


def test_what_it_takes() -> None:
    half = torch.float16
    assert nm_library.supports((32, 48), MANY, half, half) is None
    assert nm_library.supports((40, 48), MANY, half, half) == (
        "cuSPARSELt takes multiples of 16 rows and columns, not 40 x 48"
    )
    assert "float16 or bfloat16" in nm_library.supports((32, 48), MANY, torch.int8, half)


def test_reasons_say_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "was built without CUDA" in nm_library.missing()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "finds no NVIDIA GPU: " in nm_library.missing()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    assert "has no cuSPARSELt; install" in nm_library.missing()
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "T4")
    assert (
        nm_library.missing()
        == "T4 has compute capability 7.5, wanted 8.0 (A100) or newer; take another GPU, or the CPU"
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert nm_library.missing() is None


def test_who_is_taken_on_each_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The built-in choice by tokens, where no table was measured: predicted."""
    monkeypatch.setenv("ALPHAPRUNE_TIMES", "off")
    known = base.kernels()

    def chosen(wide: bool, regular: bool, tokens: int) -> str:
        names = {"sbt_mma", "sbt_expand", "nm_mma_sp", "nm_cusparselt", *(["sbt_wgmma"] if wide else [])}
        found = {n: replace(k, available=lambda: None) for n, k in known.items() if n in names}
        monkeypatch.setattr(base, "kernels", lambda: found)
        fits = (lambda kernel: None) if regular else (lambda kernel: kernel.fits and "not 2:4")
        half = torch.bfloat16
        kernel, _ = base.choose((4096, 4096), tokens, half, half, "cuda", None, fits)
        return kernel.name

    tokens = (1, 16, 17, 64, 65, 256, 257, 511, 512, 513, 4096)
    hopper = ["sbt_mma"] * 2 + ["sbt_wgmma"] * 4 + ["sbt_expand"] * 5
    ampere = ["sbt_mma"] * 4 + ["sbt_expand"] * 7
    assert [chosen(True, False, t) for t in tokens] == hopper
    assert [chosen(False, False, t) for t in tokens] == ampere
    assert [chosen(True, True, t) for t in tokens] == ["nm_mma_sp"] * 4 + hopper[4:]
    assert [chosen(False, True, t) for t in tokens] == ["nm_mma_sp"] * 4 + ampere[4:]


def test_a_capture_before_the_kernel_is_ready_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu(Tensor):
        """A tensor of the host that says it is on a GPU."""

        is_cuda = True

    packed = sbt.pack(torch.randn(16, 64))
    prepared, other = (spmm.prepare(packed, "model.layers.0.mlp.up_proj") for _ in range(2))
    other.device = torch.device("cuda")
    x = torch.randn(3, 64)
    expected = prepared(x)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    fake = x.as_subclass(OnGpu)
    with pytest.raises(ValueError, match=r"mlp\.up_proj: a CUDA graph is being captured, and kernel \w+ for 40 tokens"):
        other.ready(40, torch.float16)
    assert torch.equal(prepared.run(fake, None), expected), "what is ready may be captured"
