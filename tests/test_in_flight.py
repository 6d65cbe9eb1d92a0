"""No product of a warpgroup loses its operands before it has read them, by the machine code of csrc/cuda."""

import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import cuda_tools  # noqa: E402
import in_flight  # noqa: E402
import sass  # noqa: E402

missing = cuda_tools.missing()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing), reason=str(missing))]

SOURCES = ("nm_wgmma.cu", "pair_wgmma.cu", "sbt_wgmma.cu")
# Both words of metadata loaded at once: ptxas gives the second one its register while products still read it.
EARLY = {
    "meta[half] = load_shared_u32(words + 4 * half);": "if (half == 0) {\n"
    "          const uint2 both = load_shared_u64(words);\n"
    "          meta[0] = both.x, second = both.y;\n"
    "        } else {\n"
    "          meta[1] = second;\n"
    "        }",
    "words = 0;": "words = 0, second = 0;",
}
LOOP = """
.L_1:
        /*0000*/                   LDS.64 R8, [R3] ;
        /*0010*/                   HGMMA.SP.64x256x32.F32.BF16 R24, R4, gdesc[UR4], R24, R8, 0x0, gsb0 ;
        /*0020*/                   MOV R2, R1 ;
        /*0030*/                   HGMMA.SP.64x256x32.F32.BF16 R24, R12, gdesc[UR4], R24, R9, 0x0, gsb0 ;
        /*0040*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0050*/              @P0 BRA `(.L_1) ;
        /*0060*/                   EXIT ;
"""


def hazards_of(source: Path, folder: Path) -> list[str]:
    cubin = folder / "kernels.cubin"
    cuda_tools.compile_cubin(source, "sm_90a", cubin)
    functions = sass.disassemble(cubin, cuda_tools.tool("nvdisasm")).values()
    products = [f for f in functions if any(in_flight.PRODUCT.match(one.text) for one in f.body(None))]
    assert products, f"{source.name} has no products of a warpgroup"
    return [text for function in products for text in in_flight.hazards(function)]


@pytest.mark.parametrize("name", SOURCES)
def test_nothing_writes_what_a_product_still_reads(name: str, tmp_path: Path) -> None:
    assert hazards_of(ROOT / "csrc" / "cuda" / name, tmp_path) == []


def test_a_register_that_ptxas_gives_away_too_early_is_seen(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    kernel = tmp_path / "csrc" / "cuda" / "nm_wgmma.cuh"
    text = kernel.read_text()
    for old, new in EARLY.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    kernel.write_text(text)
    found = hazards_of(kernel.with_suffix(".cu"), tmp_path)
    assert found and all("LDS.64" in one and "belongs to a product in flight" in one for one in found)


def test_what_is_in_flight_at_the_end_of_a_loop_is_so_at_its_beginning() -> None:
    found = list(in_flight.hazards(sass.Function("kernel", LOOP.splitlines())))
    assert found == ["0x0 LDS.64 R8, [R3]: R9 belongs to a product in flight"]
    later = LOOP.replace("R24, R9, 0x0, gsb0", "R24, R10, 0x0, gsb0")
    assert list(in_flight.hazards(sass.Function("kernel", later.splitlines()))) == []
    unready = later.replace("MOV R2, R1", "MOV R7, R1")  # operand a has four registers
    assert len(list(in_flight.hazards(sass.Function("kernel", unready.splitlines())))) == 2
    waited = LOOP.replace("gsb0, 0x1", "gsb0, 0x0")
    assert list(in_flight.hazards(sass.Function("kernel", waited.splitlines()))) == []
