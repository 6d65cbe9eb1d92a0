"""bench/engines/cublaslt.py against a stand-in written in C, which checks every argument and multiplies on the host."""

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tolerance
import torch

ROOT = Path(__file__).parent.parent
STREAM = 0x5EED0
CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench" / "engines"))
    monkeypatch.delitem(sys.modules, "cublaslt", raising=False)
    import cublaslt

    yield cublaslt
    sys.modules.pop("cublaslt", None)


@pytest.fixture
def stub(tmp_path: Path) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler for the stand-in of cuBLASLt")
    library = tmp_path / "libcublasLt.so.13"
    source = ROOT / "tests" / "native" / "cublaslt_stub.c"
    flags = ["-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, "-o", str(library), str(source)], check=True)
    return library


def made(module, stub: Path):
    return module.CublasLt(str(stub), CPU, lambda: STREAM)


def operands(tokens: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    x, weight = (torch.randn(rows, k, generator=generator).bfloat16() for rows in (tokens, n))
    return x, weight


@pytest.mark.parametrize(("tokens", "n", "k"), [(1, 1, 1), (1, 37, 64), (5, 16, 33), (64, 8, 3)])
def test_every_proposal_gives_the_product(module, stub: Path, tokens: int, n: int, k: int) -> None:
    x, weight = operands(tokens, n, k)
    calls = made(module, stub).linear(x, weight)
    assert len(calls) == 3, "of four proposals one is not usable"
    for call in calls:
        tolerance.assert_product(call(weight), x, weight)
        tolerance.assert_product(call(other := weight.flip(0).contiguous()), x, other)
    library = ctypes.CDLL(str(stub))
    assert list((ctypes.c_int64 * 4).in_dll(library, "stub_calls")) == [2, 2, 0, 2]
    assert ctypes.c_size_t.in_dll(library, "stub_stream").value == STREAM


SWAPS = {  # positions of two arguments of cublasLtMatmul, from 0 → the argument, from 1, that is refused
    "handle and product": (0, 1, 1),
    "alpha and beta": (2, 7, 3),
    "matrix and layout": (3, 4, 5),
    "layouts": (4, 6, 5),
    "weight and output": (3, 10, 9),
    "algorithm and workspace": (12, 13, 13),
    "bytes and stream": (14, 15, 15),
}


@pytest.mark.parametrize("swap", SWAPS)
def test_swapped_arguments_are_seen(module, stub: Path, monkeypatch, swap: str) -> None:
    first, second, position = SWAPS[swap]
    x, weight = operands(3, 8, 16)
    engine, call = made(module, stub), module.CublasLt._call

    def swapped(self, name: str, *arguments) -> None:
        given = list(arguments)
        if name == "cublasLtMatmul":
            given[first], given[second] = given[second], given[first]
        call(self, name, *given)

    run = engine.linear(x, weight)[0]
    monkeypatch.setattr(module.CublasLt, "_call", swapped)
    with pytest.raises(RuntimeError, match="cublasLtMatmul returned 7"):
        run(weight)
    assert ctypes.c_int64.in_dll(ctypes.CDLL(str(stub)), "stub_wrong").value == position


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("COMPUTE_FLOAT", 64),
        ("FLOAT", 2),
        ("KINDS", {torch.bfloat16: 2}),
        ("TRANSPOSE_FIRST", 4),
        ("MOST_WORKSPACE", 0),
    ],
)
def test_wrong_constants_are_seen(module, stub: Path, monkeypatch, name: str, value: object) -> None:
    engine = made(module, stub)
    monkeypatch.setattr(module, name, value)
    with pytest.raises(RuntimeError, match="returned 7"):
        engine.linear(*operands(3, 8, 16))


def test_a_refusal_has_its_status(module, stub: Path) -> None:
    x, weight = operands(1, 4, 8)
    run = made(module, stub).linear(x, weight)[0]
    ctypes.c_int.in_dll(ctypes.CDLL(str(stub)), "stub_status").value = 13
    with pytest.raises(RuntimeError, match="cublasLtMatmul returned 13"):
        run(weight)


def test_the_library_is_the_one_of_this_process(module, tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    maps.write_text("7f-80 r-xp 0 08:01 1  /a b/libcublasLt.so.13\n7f-80 r-xp 0 08:01 1  /a b/libcublas.so.13\n")
    assert module.loaded(str(maps)) == "/a b/libcublasLt.so.13"
    maps.write_text("")
    with pytest.raises(ValueError, match="no libcublasLt"):
        module.loaded(str(maps))


def test_the_struct_is_as_large_as_the_header_says(module) -> None:
    assert ctypes.sizeof(module.Proposal) == 64 + 8 + 4 + 4 + 16 and module.Proposal.workspace.offset == 64
