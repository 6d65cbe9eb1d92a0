"""The Triton kernels between products and of attention, against float64; test_triton.py has the interpreter."""

import importlib
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_triton import INTERPRETED, POINTERS, apart, device, runs  # noqa: F401
from torch import Tensor

from alphaprune.kernels import neighbours

# Triton's interpreter does not round to bfloat16.
DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)
ROUNDING = {torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}  # a unit in the last place


def module(name: str):
    return importlib.import_module(f"alphaprune.kernels.{name}")


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def close(found: Tensor, truth: Tensor, units: float) -> None:
    """Within so many units in the last place of the largest of a row; of numbers, not of subnormal ones."""
    allowed = (
        units * ROUNDING[found.dtype] * truth.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(found.dtype).tiny)
    )
    error = (found.cpu().double() - truth).abs()
    assert (error <= allowed).all(), f"{(error / allowed).max():.2f} times what is allowed"


@runs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_and_sum(dtype: torch.dtype, device: str) -> None:  # noqa: F811
    for rows, cols in ((1, 1), (3, 70), (5, 4096), (2, 129)):
        h, delta = random(rows, cols, dtype=dtype), random(rows, cols, dtype=dtype, seed=1)
        weight = random(cols, dtype=dtype, seed=2)
        order = torch.randperm(cols, generator=torch.Generator().manual_seed(cols))
        for add, permuted in ((False, False), (True, False), (True, True), (False, True)):
            mine = h.to(device).clone()
            given = (
                (delta.to(device) if add else None),
                weight.to(device),
                1e-5,
                (order.to(device) if permuted else None),
            )
            x = module("triton_neighbours").add_norm(mine, *given)
            total = (h + delta) if add else h
            assert torch.equal(mine.cpu(), total)
            truth = total.double() / (total.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
            close(x, truth[:, order] if permuted else truth, 4)
            cpu = [None if part is None or isinstance(part, float) else part.cpu() for part in given]
            plain = neighbours.add_norm(h.clone(), cpu[0], cpu[1], 1e-5, cpu[3])
            close(plain, x.cpu().double(), 2)


@runs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activation(dtype: torch.dtype, device: str) -> None:  # noqa: F811
    for rows, cols in ((1, 1), (3, 700), (2, 2048)):
        gate, up = 4 * random(rows, cols, dtype=dtype), random(rows, cols, dtype=dtype, seed=1)
        gate[0, 0] = -60 if dtype == torch.float16 else -200  # exp overflows: silu is 0, not NaN
        truth = gate.double() * gate.double().sigmoid() * up.double()
        close(module("triton_neighbours").swiglu(gate.to(device), up.to(device)), truth, 4)
        close(neighbours.swiglu(gate.clone(), up), truth, 4)


@runs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotation_into_pages(dtype: torch.dtype, device: str) -> None:  # noqa: F811
    for tokens, heads, key_heads, dim in ((1, 1, 1, 2), (3, 6, 2, 16), (2, 5, 5, 24)):
        q, k, v = (random(tokens, n * dim, dtype=dtype, seed=i) for i, n in enumerate((heads, key_heads, key_heads)))
        angle = random(tokens, dim // 2, dtype=torch.float32, seed=7)
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
        place = torch.randperm(9, generator=torch.Generator().manual_seed(tokens))[:tokens]
        caches = [torch.full((2, 9, key_heads, dim), 7.0, dtype=dtype) for _ in range(2)]
        wanted = neighbours.rotate_store(q, k, v, cos, sin, place, caches[0])
        mine = caches[1].to(device)
        given = [part.to(device) for part in (q, k, v, cos, sin, place)]
        close(module("triton_neighbours").rotate_store(*given, mine), wanted.double(), 1)
        close(mine, caches[0].double(), 1)
        assert torch.equal(mine[1].cpu(), caches[0][1])
        full = q.view(tokens, heads, 2, dim // 2).double()
        c, s = cos.double()[:, None], sin.double()[:, None]
        truth = torch.cat((full[:, :, 0] * c - full[:, :, 1] * s, full[:, :, 1] * c + full[:, :, 0] * s), -1)
        close(wanted, truth, 4)


def attention(q: Tensor, cache: Tensor, table: Tensor, lengths: list[int], page: int, window: int | None) -> Tensor:
    """In float64, one sequence after the other."""
    found = []
    for query, pages, length in zip(q.double(), table, lengths, strict=True):
        first = 0 if window is None else max(0, length - window)
        rows = torch.tensor([int(pages[n // page]) * page + n % page for n in range(first, length)])
        keys, values = (part[rows].double().repeat_interleave(len(query) // part.shape[1], 1) for part in cache)
        scores = torch.einsum("hd,nhd->hn", query, keys) / query.shape[-1] ** 0.5
        found.append(torch.einsum("hn,nhd->hd", scores.softmax(-1), values).flatten())
    return torch.stack(found)


@runs
def test_attention_over_pages(device: str) -> None:  # noqa: F811
    @settings(max_examples=12 if INTERPRETED else 150, deadline=None)
    @given(
        lengths=st.lists(st.integers(1, 300), min_size=1, max_size=4),
        heads=st.sampled_from(((1, 1), (2, 2), (4, 2), (6, 1), (8, 2))),
        dim=st.sampled_from((16, 24, 64)),
        page=st.sampled_from((1, 16, 32)),
        window=st.sampled_from((None, None, 1, 7, 130)),
        dtype=st.sampled_from(DTYPES),
        seed=st.integers(0, 100),
    )
    def products(lengths, heads, dim, page, window, dtype, seed) -> None:
        check_attention(device, lengths, heads, dim, page, window, dtype, seed)

    products()


def check_attention(where: str, lengths, heads, dim, page, window, dtype, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    longest = -(-max(lengths) // page)
    pages = len(lengths) * longest
    table = torch.randperm(pages, generator=generator).view(len(lengths), longest)
    cache = torch.full((2, pages * page, heads[1], dim), float("nan"), dtype=dtype)  # what nobody wrote
    for row, length in zip(table, lengths, strict=True):
        for n in range(length):
            cache[:, int(row[n // page]) * page + n % page] = torch.randn(2, heads[1], dim, generator=generator).to(
                dtype
            )
    q = torch.randn(len(lengths), heads[0], dim, generator=generator).to(dtype)
    truth = attention(q, cache, table, lengths, page, window)
    reach = max(lengths) + seed % 50
    table = torch.nn.functional.pad(table, (0, -(-reach // page) - longest), value=pages - 1)
    given = [part.to(where) for part in (q, cache, table, torch.tensor(lengths))]
    found = module("triton_attention").attend(*given, page, reach, window)
    close(found, truth, 8)
    for known in (None, lengths):
        keys = neighbours.Keys(table, torch.tensor(lengths), page, reach, known)
        close(neighbours.attend(q, cache, keys, window), truth, 8)


@runs
def test_faults_in_attention_are_seen(device: str, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """A wrong length, page or scale fails the comparison."""
    case = ([90, 200], (4, 2), 16, 16, None, torch.float32, 3)
    check_attention(device, *case)
    triton_attention = module("triton_attention")
    original = triton_attention.attend

    def shifted(change):
        def call(q, cache, table, lengths, page, reach, window):
            return original(*change(q, cache, table, lengths), page, reach, window)

        return call

    for change in (
        lambda q, c, t, n: (q, c, t, n - 1),
        lambda q, c, t, n: (q, c, t.flip(0), n),
        lambda q, c, t, n: (q * 1.01, c, t, n),
        lambda q, c, t, n: (q, c.flip(0), t, n),
    ):
        monkeypatch.setattr(triton_attention, "attend", shifted(change))
        with pytest.raises(AssertionError, match="times what is allowed"):
            check_attention(device, *case)


@apart
@given(lengths=st.lists(st.integers(1, 1000), min_size=1, max_size=40))
def test_sequences_go_together_while_padding_is_cheap(lengths: list[int]) -> None:
    found = neighbours.together(lengths)
    assert sorted(place for group in found for place in group) == list(range(len(lengths)))
    for group in found:
        assert lengths[group[0]] * len(group) <= neighbours.PADDING * sum(lengths[place] for place in group)
    for group, after in itertools.pairwise(found):
        joined = [*group, after[0]]
        assert lengths[group[0]] * len(joined) > neighbours.PADDING * sum(lengths[place] for place in joined)


@apart
def test_ranges_cover_all_keys() -> None:
    triton_attention = module("triton_attention")
    for programs, keys, multiprocessors in ((32, 4096, 132), (8, 100, 132), (1, 1, 108), (2048, 8192, 132), (4, 65, 8)):
        count, span = triton_attention.ranges(programs, keys, multiprocessors)
        assert span % triton_attention.KEYS == 0 and (count - 1) * span < keys <= count * span and 1 <= count <= 64


KERNELS = ("norm", "swiglu", "rotate", "range 1", "range 4", "join")


def compiled(name: str, arch: int, dtype: torch.dtype):
    """The machine code for a model with heads of 128, compiled without a GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kind, _, shared = name.partition(" ")
    file = module("triton_attention" if kind in ("range", "join") else "triton_neighbours")
    kernel = getattr(file, f"{kind}_kernel")
    pointer = POINTERS[dtype]
    types = dict.fromkeys(("h", "delta", "weight", "x", "gate", "up", "y", "q", "k", "v", "cos", "sin"), pointer)
    types |= dict.fromkeys(("cache", "turned", "out"), pointer) | {"order": "*i64", "place": "*i64", "table": "*i64"}
    types |= {"lengths": "*i64", "parts": "*fp32", "logs": "*fp32", "epsilon": "fp32", "scale": "fp32"}
    types |= {"value_offset": "i64"}
    constants = {"BLOCK": 4096 if kind == "norm" else 1024, "HEADS": 32, "HALF": 64, "DIM": 128, "N": file.KEYS if
                 kind in ("range", "join") else 0, "RANGES": 16}  # fmt: skip
    if kind == "range":
        constants |= {"SHARED": int(shared), "GROUP": file.group(int(shared))}
    if kind == "norm":
        constants["order"] = None
    names = [parameter.name for parameter in kernel.params]
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    fixed = {(names.index(n),): value for n, value in constants.items() if n in names}
    aligned = [i for i, n in enumerate(names) if signature[n].startswith("*") or n in ("cols", "dim", "half")]
    source = ASTSource(kernel, signature, fixed, {(i,): [["tt.divisibility", 16]] for i in aligned})
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 8 if kind == "norm" else 4})


@apart
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", KERNELS)
def test_machine_code(name: str, arch: int, tmp_path) -> None:
    """It compiles without a GPU, spills nothing, and fits the shared memory of every GPU from an A100 on."""
    import sys
    from pathlib import Path

    import triton

    sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
    import sass

    for dtype in (torch.bfloat16, torch.float32) if (name, arch) == ("range 4", 80) else (torch.bfloat16,):
        code, cubin = compiled(name, arch, dtype), tmp_path / "kernel.cubin"
        assert code.metadata.shared <= 99 << 10
        cubin.write_bytes(code.asm["cubin"])
        nvdisasm = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
        (function,) = sass.disassemble(cubin, str(nvdisasm)).values()
        opcodes = [instruction.opcode for instruction in function.body(None)]
        assert not [opcode for opcode in opcodes if opcode.startswith(("LDL", "STL"))], "spills"
        assert any("HMMA" in opcode for opcode in opcodes) == (
            name in ("range 4", "range 16") and dtype != torch.float32
        )


@runs
def test_a_ragged_batch_through_all_of_them(device: str, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Prefill and steps of a model: on a GPU as CUDA graphs, in the interpreter one call after the other."""
    from test_decoder import build, theirs
    from test_graphs import decode, ragged_prompts

    model = build("qwen3, window and biases")
    given = ragged_prompts(model)[:3]
    expected = [theirs(model, one[None], 5)[0].tolist() for one in given]
    monkeypatch.setattr(neighbours, "fused", lambda x: True)
    assert decode(model.to(device), given, 5) == expected
