"""The main loops of the compiled kernels are found in their disassembly, whatever functions they stand in."""

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import cpu_loops  # noqa: E402
from cpu_loops import Loop  # noqa: E402

TOOLS = ("cmake", "g++", "objdump", "c++filt")
missing = [tool for tool in TOOLS if shutil.which(tool) is None]
compiled = pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    import platform

    return cpu_loops.build(tmp_path_factory.mktemp("loops"), platform.machine())


@compiled
def test_every_compiled_kernel_has_a_loop(objects: list[Path]) -> None:
    assert objects
    for file in objects:
        found = cpu_loops.loops(file)
        assert any(loop.weights for loop in found), file.name
        assert any(loop.products for loop in found), file.name
        for loop in cpu_loops.hottest(found):
            assert loop.isa in file.name and loop.function and "_Z" not in loop.function
        isa = file.name.removeprefix("sbt_").removesuffix(".cpp.o")
        fused = {(loop.dtype, loop.tokens) for loop in found if loop.part == "fused"}
        if isa in ("avx512vnni", "avxvnni"):
            assert {("int8", 1), ("int8", 2)} <= fused, fused
        if isa == "avx512bf16":
            assert {("bfloat16", tokens) for tokens in (1, 2, 3)} <= fused, fused
        if isa in ("avx2", "avx512bw", "avx512"):
            assert {(dtype, 1) for dtype in ("bfloat16", "float16", "float32", "int8")} <= fused, (isa, fused)


@compiled
@pytest.mark.slow
def test_the_aarch64_kernel_has_a_loop(tmp_path: Path) -> None:
    compiler = "aarch64-linux-gnu-g++"
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    files = {f.name: f for f in cpu_loops.build(tmp_path, "aarch64", compiler)}
    for isa, wanted in (
        ("neon", {(dtype, 1, 0) for dtype in ("bfloat16", "float16", "float32", "int8")}),
        ("neondot", {("int8", 1, 1), ("int8", 2, 1), ("int8", 3, 1), ("int8", 1, 2)}),
    ):
        found = cpu_loops.loops(files[f"sbt_{isa}.cpp.o"], "aarch64-linux-gnu-objdump")
        fused = {(loop.dtype, loop.tokens, loop.integers) for loop in found if loop.part == "fused"}
        assert wanted <= fused, (isa, fused)


@compiled
def test_rows_count_per_1024_weights(objects: list[Path]) -> None:
    scalar = next(f for f in objects if "scalar" in f.name)
    best = next((f for name in ("avx512bw", "neon", "scalar") for f in objects if f"_{name}." in f.name), scalar)
    for row in cpu_loops.rows(cpu_loops.hottest(cpu_loops.loops(best))):
        assert {"kernel", "isa", "part", "dtype", "tokens", "function", "per", "instructions", "cpu"} <= row.keys()
        assert cpu_loops.line(row)
        if shutil.which(cpu_loops.MCA) is None:
            assert "not installed" in row["missing"]
            continue
        assert row["uops"] > 0 and row["model"] and row["bottleneck"] in row["ports"]
        assert row["bottleneck_cycles"] == max(row["ports"].values()) <= 1.01 * row["cycles"]


LISTING = """
  10: mov %rdi,%rax
  12: xor %ecx,%ecx
  14: vmovups (%rsi),%zmm1
  16: vpexpandw (%rax),%zmm0{%k1}{z}
  18: vfmadd231ps %zmm0,%zmm1,%zmm2
  1a: vfmadd231ps 0x40(%rsi),%zmm1,%zmm3
  1c: add $0x40,%rax
  1e: jne 16 <alphaprune::f<int, 1, 30>(float, int)+0x6>
  20: inc %rcx
  22: jb 14 <f+0x4>
  24: jmp 30 <f+0x20>
  26: vfmadd231ps %ymm0,%ymm1,%ymm2
  28: jmp 26 <f+0x16>
  30: ret
"""


def listing(text: str) -> list[tuple[int, str]]:
    lines = (line.split(":", 1) for line in text.strip().splitlines())
    return [(int(address, 16), instruction.strip()) for address, instruction in lines]


def test_innermost_loops() -> None:
    bodies = list(cpu_loops.innermost(listing(LISTING)))
    assert [(body[0].split()[0], len(body)) for body in bodies] == [("vpexpandw", 5), ("vfmadd231ps", 2)]
    fused, multiply = (Loop("avx512", "f", body) for body in bodies)
    assert (fused.part, fused.weights, fused.products, fused.tokens, fused.dtype) == ("fused", 32, 32, 1, "bfloat16")
    assert (multiply.part, multiply.products, multiply.unit) == ("multiply", 8, 128)
    assert fused.unit == 32
    text = cpu_loops.assembly(fused)
    assert text.startswith("again:") and text.endswith("jne again\n") and "<" not in text


def test_an_encoding_is_no_opcode(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "0000000000000000 <f>:\n   0:\t{vex} vpdpbusd %ymm1,%ymm2,%ymm3\n"
    monkeypatch.setattr(cpu_loops.subprocess, "run", lambda *a, **k: SimpleNamespace(stdout=text))
    assert list(cpu_loops.functions(Path("f.o"), "objdump")) == [("f", [(0, "vpdpbusd %ymm1,%ymm2,%ymm3")])]


def test_tokens_of_rounded_activations() -> None:
    for nbytes, products, tokens in ((2, 2, 1), (2, 4, 2), (1, 1, 1), (1, 6, 6)):
        body = ("vpexpandb (%rax),%zmm0{%k1}{z}", *["vpdpbusd %zmm0,%zmm1,%zmm2"] * products, "jne 0 <f>")
        loop = Loop("avx512", f"Integer<ExpandedBytes<AsksNear<false> >, {nbytes}>::fused", body)
        assert (loop.weights, loop.tokens, loop.integers, loop.dtype) == (64, tokens, nbytes, "int8")


def test_names_without_their_surroundings() -> None:
    symbol = "_ZN10alphaprune12_GLOBAL__N_15FusedINS0_8Bfloat16ELi1ELi8EE4turnERKNS_7ProductEllliPf.constprop.0"
    if shutil.which("c++filt") is None:
        pytest.skip("c++filt is not installed")
    assert cpu_loops.demangle([symbol]) == ["Fused<Bfloat16, 1, 8>::turn"]
