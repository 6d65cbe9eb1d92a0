"""The counter of GPU instructions counts what is there, and the kernels of csrc/cuda stay within their gates."""

import itertools
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import cubins  # noqa: E402
import cuda_tools  # noqa: E402
import rates  # noqa: E402
import sass  # noqa: E402

missing = cuda_tools.missing()
compiled = pytest.mark.skipif(bool(missing), reason=str(missing))

SNIPPET = """
#include <cstdint>
struct Bfloat16 {};
__device__ __forceinline__ void mma(float (&c)[4], uint32_t a, uint32_t b) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
               "{%0,%1,%2,%3}, {%4,%4,%4,%4}, {%5,%5}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a), "r"(b));
}
__device__ __forceinline__ uint32_t count(uint32_t v) {
  asm volatile("popc.b32 %0, %0;" : "+r"(v));
  return v;
}
__device__ __forceinline__ uint32_t load(uint32_t at) {
  asm volatile("ld.shared.u32 %0, [%0];" : "+r"(at));
  return at;
}
template <class Value, int kTiles>
__global__ __launch_bounds__(BOUNDS) void sbt_mma(uint32_t* y, int tiles, int inner, uint32_t a) {
  float c[kTiles][4] = {};
  uint32_t b = a;
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    a = load(count(a));
    b += 3 * tile;
    BODY
    for (int t = 0; t < kTiles; ++t) mma(c[t], a, b + t);
  }
  for (int t = 0; t < kTiles; ++t)
    for (int i = 0; i < 4; ++i) y[threadIdx.x * 64 + t * 4 + i] = __float_as_uint(c[t][i]);
}
template __global__ void sbt_mma<Bfloat16, TILES>(uint32_t*, int, int, uint32_t);
"""


def count(folder: Path, body: str = "", tiles: int = 1, arch: str = "sm_80", bounds: str = "128") -> dict:
    """The row of SNIPPET's kernel with `body` in its loop of one mma per tile of tokens."""
    source = folder / "snippet.cu"
    source.write_text(SNIPPET.replace("BODY", body).replace("TILES>(", f"{tiles}>(").replace("BOUNDS", bounds))
    (found,) = cubins.rows(source, arch)
    return found


@compiled
@pytest.mark.parametrize("arch", cubins.ARCHITECTURES)
def test_counts_per_1024_weights(tmp_path: Path, arch: str) -> None:
    one = count(tmp_path, arch=arch)
    assert (one["kernel"], one["arch"], one["m"], one["dtype"]) == ("sbt_mma<Bfloat16, 1>", arch, 8, "bfloat16")
    assert (one["weights"], one["popc"], one["lsu"], one["hmma"]) == (256, 4, 4, 4)
    assert one["instr"] == sum(one[name] for name in cubins.COLUMNS[1:])
    assert (one["spill_bytes"], one["threads"], one["unknown"]) == (0, 128, [])
    two = count(tmp_path, tiles=2, arch=arch)
    assert (two["weights"], two["popc"], two["lsu"], two["hmma"], two["m"]) == (256, 4, 4, 8, 16)


@compiled
def test_one_more_instruction_is_seen(tmp_path: Path) -> None:
    before, after = count(tmp_path), count(tmp_path, "a = count(a);")
    assert after["popc"] - before["popc"] == 4 == after["instr"] - before["instr"]


@compiled
@pytest.mark.parametrize("arch", cubins.ARCHITECTURES)
@pytest.mark.parametrize(
    ("loop", "trips"),
    [("int k = 0; k < 5; ++k", 5), ("int k = 21; k > 0; k -= 3", 7), ("int k = 2; k != 14; k += 4", 3)],
)
def test_trips_of_an_inner_loop_are_derived(tmp_path: Path, arch: str, loop: str, trips: int) -> None:
    found = count(tmp_path, f'_Pragma("unroll 1") for ({loop}) a = count(a + k);', arch=arch)
    assert found["unknown"] == [] and found["popc"] == 4 * (1 + trips)


@compiled
def test_a_product_in_an_inner_loop_counts_as_often_as_it_runs(tmp_path: Path) -> None:
    found = count(tmp_path, '_Pragma("unroll 1") for (int k = 0; k < 3; ++k) mma(c[0], a, k);')
    assert found["weights"] == 4 * 256 and found["hmma"] == 4 and found["popc"] == 1


@compiled
def test_a_product_of_what_stays_the_same_is_no_work(tmp_path: Path) -> None:
    for operand in ("0", "uint32_t(inner)", "a"):
        found = count(tmp_path, f"mma(c[0], {operand}, a);")
        assert found["weights"] == 256 and found["hmma"] == 8, operand


@compiled
def test_trips_that_the_code_does_not_tell(tmp_path: Path) -> None:
    body = '_Pragma("unroll 1")\n for (int k = 0; k < inner; ++k) a = count(a + k);'
    found = count(tmp_path, body)
    assert found["popc"] == 8 and "trips of the loop" in found["unknown"][0] and "snippet.cu:" in found["unknown"][0]
    assert "UNKNOWN" in cubins.line(found)
    found = count(tmp_path, body + "  // cubins: trips 2.5: half of five copies\n")
    assert found["popc"] == 4 * 3.5 and found["unknown"] == [] and "half of five copies" in found["assumed"][0]
    with pytest.raises(ValueError, match=r"snippet.cu:\d+: want .* got .*trip 2.5"):
        count(tmp_path, body + "  // cubins: trip 2.5\n")


@compiled
def test_an_inner_main_loop_is_taken_only_where_the_source_says_so(tmp_path: Path) -> None:
    body = '_Pragma("unroll 1")\n for (int k = 0; k < inner; ++k) { a = load(count(a)); mma(c[0], a, k); }'
    assert count(tmp_path, body)["weights"] == 512
    inner = count(tmp_path, body + "  // cubins: main: tiles is one\n")
    assert inner["weights"] == 256 and inner["popc"] == 4 and inner["lsu"] == 4 and inner["unknown"] == []
    assert inner["assumed"] == ["not the outermost loop: tiles is one"]


RARE = "if (__builtin_expect(a == inner, 0)) { " + 8 * "a = count(a); y[a] = a; " + "}"


@compiled
def test_a_block_out_of_line_counts_unless_the_source_says_otherwise(tmp_path: Path) -> None:
    inside = count(tmp_path, RARE)
    assert inside["popc"] == 4 * 9
    without = count(tmp_path, f"\n// cubins: begin times 0: never\n{RARE}\n// cubins: end\n")
    assert without["popc"] == 4 and "0 times: never" in without["assumed"][0]
    some = count(tmp_path, f"\n{RARE}  // cubins: times 0.5: every other tile\n")
    assert some["popc"] == 4 * 5


@compiled
def test_spills_are_seen(tmp_path: Path) -> None:
    assert count(tmp_path, tiles=8)["spill_bytes"] == 0
    squeezed = count(tmp_path, tiles=8, bounds="128, 16")  # 2048 threads share the registers
    assert squeezed["spill_bytes"] > 0 and squeezed["registers"] <= 32


@compiled
def test_an_spmv_counts_non_zeros(tmp_path: Path) -> None:
    source = tmp_path / "spmv.cu"
    source.write_text(
        "struct Float16 {};\n"
        "template <class Value, int kTokens> __global__ __launch_bounds__(64) void delta_spmv(\n"
        "    const float* w, const float* x, float* y, int n) {\n"
        "  __shared__ float s[1024];\n"
        "  for (int i = threadIdx.x; i < 1024; i += 64) s[i] = x[i];\n"
        "  __syncthreads();\n"
        "  float sum[kTokens] = {};\n"
        '  _Pragma("unroll 1") for (int i = threadIdx.x; i < n; i += 64) {\n'
        "    const float v = w[i];\n"
        "    for (int t = 0; t < kTokens; ++t) sum[t] = fmaf(v, s[(i + t) & 1023], sum[t]);\n"
        "  }\n"
        "  for (int t = 0; t < kTokens; ++t) y[threadIdx.x * kTokens + t] = sum[t];\n"
        "}\n"
        "template __global__ void delta_spmv<Float16, 2>(const float*, const float*, float*, int);\n"
    )
    (found,) = cubins.rows(source, "sm_90a")
    assert (found["m"], found["dtype"], found["per"], found["weights"]) == (2, "float16", "1024 non-zeros", 32)
    assert found["lsu"] >= 3 * 32 and found["shared_bytes"] == 4096


@compiled
def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    count(tmp_path)
    assert cubins.main([str(tmp_path / "snippet.cu"), "--arch", "sm_80", "--kernel", "nothing"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    (tmp_path / "broken.cu").write_text("int main( {")
    assert cubins.main([str(tmp_path / "broken.cu"), "--arch", "sm_80"]) == 2
    assert "broken.cu for sm_80" in capsys.readouterr().err


def test_missing_tools_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cuda_tools.sysconfig, "get_path", lambda _: "/nonexistent")
    assert cuda_tools.missing() == "nvcc is not installed: pip install nvidia-cuda-nvcc, or set CUDA_HOME"


def test_a_compiler_from_the_package_index_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("nvidia/cu13/bin/nvcc", "triton/backends/nvidia/bin/nvdisasm"):
        (tmp_path / place).parent.mkdir(parents=True)
        (tmp_path / place).touch(mode=0o755)
    monkeypatch.setenv("PATH", "/nonexistent")
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cuda_tools.sysconfig, "get_path", lambda _: str(tmp_path))
    assert cuda_tools.tool("nvcc") == str(tmp_path / "nvidia/cu13/bin/nvcc")
    assert cuda_tools.tool("nvdisasm") == str(tmp_path / "triton/backends/nvidia/bin/nvdisasm")


@pytest.mark.parametrize(
    ("opcodes", "pipe"),
    [
        ("LOP3.LUT PRMT SEL ISETP.GE.AND R2P IADD3 VIADD SHF.R.U32.HI LEA CS2R MOV PLOP3.LUT VOTE.ANY", "alu"),
        ("IMAD.MOV.U32 IMAD.WIDE FFMA HFMA2.MMA HFMA2.BF16_V2 IDP.4A.U8.U8", "fma"),
        ("POPC FLO.U32 BREV I2F.F16 MUFU.RCP", "popc"),
        ("LDS.U16 STS.64 LDG.E.128.CONSTANT LDGSTS.E.BYPASS.128 SHFL.UP LDSM.16.M88.4 ATOMS.ADD LDC.64 UBLKCP", "lsu"),
        ("HMMA.16816.F32.BF16 HMMA.SP.16832.F32.BF16 HGMMA.64x16x16.F32.BF16", "hmma"),
        ("UIADD3 ULDC.64 R2UR UMOV USHF.R.S32.HI VOTEU.ANY", "uniform"),
        ("BRA BSSY BSYNC NOP EXIT WARPSYNC.ALL DEPBAR.LE LDGDEPBAR BAR.SYNC.DEFER_BLOCKING CALL.REL.NOINC", "control"),
    ],
)
def test_pipes(opcodes: str, pipe: str) -> None:
    assert {sass.pipe(opcode) for opcode in opcodes.split()} == {pipe}


def function(text: str) -> sass.Function:
    """Control flow of a listing with one instruction or label per line."""
    address, lines = itertools.count(0, 16), []
    for line in text.strip().splitlines():
        line = line.strip()
        lines.append(line if line.endswith(":") or line.startswith("//##") else f"  /*{next(address):04x}*/  {line} ;")
    return sass.Function("kernel", lines)


LISTING = """
  MOV R1, 0x0
.L_x_0:
  HMMA.16816.F32.BF16 R4, R3, R8, R4
  BRA.DIV UR5, `(.L_x_8)
.L_x_1:
  @P0 BRA `(.L_x_5)
.L_x_2:
  UMOV UR4, 0x2
.L_x_3:
  @!P1 LDS.U16 R3, [R2]
  UIADD3 UR4, UR4, 0x3, URZ
  UISETP.GE.AND UP0, UPT, UR4, 0xe, UPT
  PLOP3.LUT P2, PT, PT, PT, UP0, 0x80, 0x0
  @!P2 BRA `(.L_x_3)
  BSSY B0, `(.L_x_4)
  @P3 BRA `(.L_x_6)
  SHFL.UP P0, R6, R7, 0x1, RZ
  BSYNC B0
.L_x_4:
  @P4 BRA `(.L_x_0)
  STG.E [R2.64], R4
  EXIT
.L_x_5:
  POPC R1, R1
  BRA `(.L_x_2)
.L_x_6:
  FADD R1, R1, R1
  BSYNC B0
.L_x_8:
  MUFU.RCP R1, R1
  BRA `(.L_x_1)
.L_x_9:
  BRA `(.L_x_9)
"""


def test_control_flow() -> None:
    found = cubins.row(function(LISTING), "sbt_mma<Bfloat16, 1>", rates.Notes())
    counts = {name: found[name] / 4 for name in cubins.COLUMNS}
    # UR4 = 2, 5, 8, 11: the inner loop runs four times. POPC and FADD stand out of line, STG after the loop; MUFU is
    # for diverged warps.
    inner = {"lsu": 4, "uniform": 8, "alu": 4, "control": 4}
    outer = {"lsu": 1, "uniform": 1, "popc": 1, "fma": 1, "hmma": 1, "control": 8}
    expected = {name: inner.get(name, 0) + outer.get(name, 0) for name in cubins.COLUMNS[1:]}
    assert counts == expected | {"instr": sum(expected.values())}
    assert found["unknown"] == [] and found["assumed"] == ["1 paths for diverged warps left out"]


def test_calls_and_jumps_by_register_are_not_silent() -> None:
    call = function(LISTING.replace("POPC R1, R1", "CALL.REL.NOINC `($helper)"))
    assert "called" in cubins.row(call, "sbt_mma<Bfloat16, 1>", rates.Notes())["unknown"][0]
    jump = function(LISTING.replace("POPC R1, R1", "@P1 BRX R2 -0x10"))
    assert "only a register knows" in cubins.row(jump, "sbt_mma<Bfloat16, 1>", rates.Notes())["unknown"][0]


@pytest.mark.parametrize(
    ("line", "change"),
    [
        ("UMOV UR4, 0x2", "ULDC UR4, c[0x0][0x160]"),  # starts at a parameter
        ("UIADD3 UR4, UR4, 0x3, URZ", "UIADD3 UR4, UR4, UR5, URZ"),  # steps by a register
        ("UIADD3 UR4, UR4, 0x3, URZ", "@UP1 UIADD3 UR4, UR4, 0x3, URZ"),  # steps now and then
        ("UISETP.GE.AND UP0, UPT, UR4, 0xe, UPT", "UISETP.GE.AND UP0, UPT, UR4, UR5, UPT"),  # ends at a register
        ("UISETP.GE.AND UP0, UPT, UR4, 0xe, UPT", "UISETP.GE.AND UP0, UPT, UR4, 0xe, UP1"),  # ends on two conditions
    ],
)
def test_trips_are_not_derived_from_what_is_not_known(line: str, change: str) -> None:
    assert line in LISTING
    found = cubins.row(function(LISTING.replace(line, change)), "sbt_mma<Bfloat16, 1>", rates.Notes())
    assert len(found["unknown"]) == 1 and "trips" in found["unknown"][0]


def test_a_loop_that_the_compiler_split_is_not_silent(tmp_path: Path) -> None:
    source = tmp_path / "split.cu"
    source.write_text("for (;;)  // cubins: trips 2: two copies\n")
    loop = f'//## File "{source}", line 1\n{{0}}:\nLDS R2, [R2]\n@P1 BRA `({{0}})\n'
    text = "HEAD:\nHMMA.16816.F32 R4, R4, R8, R4\n" + loop.format("A") + loop.format("B") + "@P0 BRA `(HEAD)\nEXIT"
    one = function(text.replace("@P1 BRA `(B)", "NOP"))
    assert rates.rates(one, max(one.loops, key=lambda x: len(x.blocks)), rates.Notes()).unknown == []
    two = function(text)
    (unknown,) = rates.rates(two, max(two.loops, key=lambda x: len(x.blocks)), rates.Notes()).unknown
    assert "unroll 1" in unknown


@pytest.mark.parametrize(
    ("arch", "registers", "threads", "shared", "share"),
    [
        ("sm_80", 32, 256, 0, 1.0),
        ("sm_80", 40, 128, 0, 0.75),
        ("sm_80", 128, 256, 0, 0.25),
        ("sm_80", 32, 32, 0, 0.5),  # 32 blocks
        ("sm_80", 32, 256, 81 << 10, 0.25),  # two blocks and 1 KiB each in 164 KiB
        ("sm_80", 32, 256, 82 << 10, 0.125),
        ("sm_90a", 32, 256, 82 << 10, 0.25),
        ("sm_86", 32, 256, 0, 1.0),
        ("sm_80", 255, 512, 0, 0.0),
    ],
)
def test_occupancy(arch: str, registers: int, threads: int, shared: int, share: float) -> None:
    assert cubins.occupancy(arch, registers, threads, shared) == share
