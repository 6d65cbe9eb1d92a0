"""Where expansion takes over from kernels that multiply packed weights as they are, and how it cuts the rows."""

import itertools

import pytest
import torch
from problems import DTYPES, problem
from tolerance import assert_product

from alphaprune import hardware
from alphaprune.kernels import base, cpu, expansion


def test_chunks_of_a_gpu_are_large_and_alike() -> None:
    for n, k in itertools.product((16, 1000, 4096, 28672, 128256), (64, 4096, 14336, 2 << 20)):
        step = expansion.chunk_rows((n, k), 2, True)
        count = -(-n // step)
        assert step % 128 == 0 and (step * k * 2 <= expansion.GPU_CHUNK_BYTES or step == 128)
        assert n - (count - 1) * step > step - 128 * count, "the last chunk is nearly as large as the others"
    assert expansion.chunk_rows((11008, 4096), 2, True) >= 11008, "one chunk"
    assert expansion.chunk_rows((4096, 4096), 2, False) == 1024


@pytest.mark.parametrize("bias", [False, True])
def test_products_of_chunks_are_written_in_place(monkeypatch: pytest.MonkeyPatch, bias: bool) -> None:
    monkeypatch.setattr(expansion, "chunk_rows", lambda *_: 32)
    dense, packed, x = problem(100, 70, 6, 0.5, torch.float32, torch.float32)
    added = torch.randn(100) if bias else None
    y = expansion.multiply_in_place(x.view(2, 3, 70), packed, added, expansion.expand)
    assert_product(y.view(6, 100), x, dense, added)


def test_skipping_zeros_knows_no_limit_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are taken past their limits for what they multiply without zeros, and for nothing else."""
    monkeypatch.setattr(cpu, "fast_in_torch", lambda dtype: True)
    kernels = base.kernels()
    for name, weight, x in itertools.product(("avx512bf16", "avx512"), (*DTYPES, torch.int8), DTYPES):
        kernel, pairs = kernels[name], weight in (torch.bfloat16, torch.int8) and x == torch.bfloat16
        assert kernel.takes(kernel.most_tokens, weight, x, None) and not kernel.takes(10**6, weight, x, None)
        assert not kernel.takes(10**6, weight, x, 0.6)
        assert kernel.takes(10**6, weight, x, 0.5) == (pairs and name == "avx512bf16")
        assert kernel.takes(10**6, weight, x, 0.3) == (weight != torch.int8 or (pairs and name == "avx512bf16"))
    assert not kernels["amx"].takes(10**6, torch.bfloat16, torch.bfloat16, 0.1)


def test_expansion_waits_for_a_fast_product_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "fast_in_torch", lambda dtype: dtype == torch.bfloat16)
    for name, kernel in base.kernels().items():
        if name in cpu.ISAS:
            many = kernel.most_tokens + 1
            assert not kernel.takes(many, torch.float16, torch.bfloat16, None)
            assert kernel.takes(many, torch.bfloat16, torch.float16, None) == (name != "scalar")


@pytest.mark.parametrize(
    ("sets", "maker", "fast"),
    [
        (["avx2", "fma"], "GenuineIntel", [torch.float32]),
        (["avx2", "avx512f", "avx512_bf16"], "AuthenticAMD", [torch.bfloat16]),
        (["avx2", "avx512f", "avx512_bf16"], "GenuineIntel", [torch.float32, torch.bfloat16]),
        (["avx512f", "amx_bf16", "avx512_fp16"], "GenuineIntel", [torch.float32, torch.bfloat16, torch.float16]),
        (["asimd"], None, [torch.float32, torch.bfloat16, torch.float16]),
        ([], None, [torch.float32, torch.bfloat16, torch.float16]),
    ],
)
def test_what_is_fast_in_torch(
    monkeypatch: pytest.MonkeyPatch, sets: list[str], maker: str | None, fast: list[torch.dtype]
) -> None:
    monkeypatch.setattr(hardware, "instruction_sets", lambda: sets)
    monkeypatch.setattr(hardware, "maker", lambda: maker)
    cpu.fast_in_torch.cache_clear()
    assert [dtype for dtype in (torch.float32, torch.bfloat16, torch.float16) if cpu.fast_in_torch(dtype)] == fast
    cpu.fast_in_torch.cache_clear()


def test_what_onednn_is_held_to_is_not_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """A benchmark held to AVX2 chooses as a CPU that has no more: bfloat16 is not expanded for a slow product."""
    monkeypatch.setattr(hardware, "instruction_sets", lambda: ["avx2", "avx512f", "avx512_bf16"])
    for limit, fast in (("AVX2", False), ("avx512_core_vnni", False), ("AVX512_CORE_BF16", True), ("DEFAULT", True)):
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
        cpu.fast_in_torch.cache_clear()
        assert cpu.fast_in_torch(torch.bfloat16) == fast
    cpu.fast_in_torch.cache_clear()
