"""The machine code of csrc/cuda stays within its gates: instructions, registers, bank conflicts per 1024 weights."""

import itertools
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import cubins  # noqa: E402
import cuda_tools  # noqa: E402
import wavefronts  # noqa: E402

missing = cuda_tools.missing()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing), reason=str(missing))]

# What was counted when the kernels were last changed on purpose; the README shows it.
COMMITTED = [json.loads(line) for line in (ROOT / "bench" / "results" / "cubins.jsonl").read_text().splitlines()]
# Wide loads of lanes that agree in pairs take half the wavefronts, as Nsight Compute counts on an H200, too. x comes
# through shared memory and is counted, two wavefronts a step.
GATES = {
    "sbt_mma": {"instr": 230, "alu": 100, "popc": 10, "lsu": 60, "wavefronts_paired": 64, "wavefronts": 66},
    "sbt_mma_int8": {"instr": 210, "alu": 90, "popc": 10, "lsu": 45, "wavefronts": 60},
    "delta_spmv": {"instr": 260},
    "nm_mma_sp": {"instr": 16},
    "nm_mma_sp_sm90": {"instr": 14},
}


# Of the tensor cores' time for so many tokens, what the instructions of a product may take: 4 of them are issued per
# clock and multiprocessor, which multiplies and adds 2048 numbers of 16 bits in it (H100's dense rate).
DECODING = {256: 0.4, 128: 0.8}
ISSUED, FMAS = 4, 2048


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Rows of all kernels of the package."""
    found = [row for arch in cubins.ARCHITECTURES for source in cubins.sources() for row in cubins.rows(source, arch)]
    program = wavefronts.Emulated(tmp_path_factory.mktemp("wavefronts"))
    return list(cubins.with_wavefronts(found, cubins.emulated_by(program)))


def gates_of(row: dict) -> dict[str, float]:
    """The gates of a kernel: of few tokens, and of the variant for whole chunks and aligned x."""
    name = row["kernel"].partition("<")[0]
    delta = name == "delta_spmv"  # whose last argument tells of fifth bits
    gated = name in GATES and row["m"] <= (1 if delta else 8) and (delta or "false" not in row["kernel"])
    return GATES[name] if gated else {}


def test_no_kernel_spills_and_nothing_is_unknown(kernels: list[dict]) -> None:
    for row in kernels:
        assert row["spill_bytes"] == 0, cubins.line(row)
        assert row["unknown"] == [] or not gates_of(row), cubins.line(row)
        assert row["occupancy"], cubins.line(row)


def test_main_loops_stay_within_their_gates(kernels: list[dict]) -> None:
    gated = {(row["kernel"].partition("<")[0], row["arch"], row["dtype"]) for row in kernels if gates_of(row)}
    names = {row["kernel"].partition("<")[0] for row in kernels}
    for name, arch in itertools.product(names & GATES.keys(), cubins.ARCHITECTURES):
        assert (name, arch, "bfloat16") in gated or (arch != "sm_90a" and f"{name}<" in cubins.HOPPER)
    over = [
        f"{row['kernel']} {row['arch']}: {column} {row[column]} > {limit}"
        for row in kernels
        for column, limit in gates_of(row).items()
        if row[column] > limit
    ]
    assert not over, "\n".join(over)


@pytest.mark.parametrize("committed", COMMITTED, ids=lambda row: f"{row['kernel']} {row['arch']}")
def test_main_loops_keep_their_committed_counts(kernels: list[dict], committed: dict) -> None:
    (row,) = [row for row in kernels if (row["kernel"], row["arch"]) == (committed["kernel"], committed["arch"])]
    for column in ("instr", "alu", "lsu", "registers"):
        assert row[column] <= committed[column], f"{column} of {cubins.line(row)}; python bench/cubins.py --json"


@pytest.mark.parametrize("tokens", DECODING)
def test_decoding_leaves_the_tensor_cores_their_time(kernels: list[dict], tokens: int) -> None:
    wide = [row for row in kernels if row["kernel"].startswith("sbt_wgmma<") and row["m"] == tokens]
    assert {(row["arch"], row["dtype"]) for row in wide} == {("sm_90a", "bfloat16"), ("sm_90a", "float16")}
    for row in wide:
        share = row["instr"] / ISSUED / (cubins.UNIT * tokens / FMAS)
        assert share <= DECODING[tokens], f"{share:.3f}: {cubins.line(row)}"
        assert row["hmma"] == 4 and row["weights"] == 2048, "an instruction for each 256 weights of a warp"


@pytest.mark.parametrize("arch", ["sm_86", "sm_89"])
def test_nothing_spills_on_the_smaller_gpus_either(arch: str, tmp_path: Path) -> None:
    for source in cubins.sources():
        used = cuda_tools.compile_cubin(source, arch, tmp_path / f"{source.stem}.cubin")
        assert not [symbol for symbol, use in used.items() if use.spills]
