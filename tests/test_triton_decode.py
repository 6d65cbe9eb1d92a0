"""The Triton kernels between products and of attention, against float64; test_triton.py has the interpreter."""

import importlib
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_triton import INTERPRETED, POINTERS, apart, device, runs  # noqa: F401
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from alphaprune.kernels import attention, neighbours

MEMORY = ("LDG", "LDS", "LDL", "ST", "ATOM", "RED", "UBLK", "UTMA")  # opcodes that touch memory begin so
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


@runs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_begin_and_end_of_a_step(dtype: torch.dtype, device: str) -> None:  # noqa: F811
    """The same rows, tokens and lengths as without Triton; nobody's row may be there several times."""
    for slots, hidden, vocabulary in (([0], 5, 3), ([3, 1, 5, 5], 1030, 70), ([5, 5, 0], 64, 20_000)):
        embedding, logits = random(vocabulary, hidden, dtype=dtype), random(len(slots), vocabulary, dtype=dtype)
        logits[0, [1, 2]] = logits[0].max() + 1  # of equal ones the first
        tokens = torch.randint(vocabulary, (6,), generator=torch.Generator().manual_seed(hidden))
        tables = [tokens, torch.tensor([7, 2, 0, 40, 1, 0])]
        for chosen in (None, torch.arange(len(slots)) % vocabulary):
            found = []
            for where, file in ((device, module("triton_neighbours")), ("cpu", neighbours)):
                mine = [table.clone().to(where) for table in tables]
                rows = torch.tensor(slots, device=where)
                h, positions = file.begin(*mine, rows, embedding.to(where))
                given = None if chosen is None else chosen.to(where)
                new = file.end(logits.to(where), given, rows, positions, *mine)
                mine[0][-1] = 0  # that of the last or the first of nobody's rows
                found.append([part.cpu() for part in (h, positions, new, *mine)])
            assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
            mine = [slot for slot in slots if slot != 5]
            assert found[0][4][-1] == 0 and torch.equal(found[0][4][mine], tables[1][mine] + 1)


@runs
def test_the_likeliest_token_is_that_of_argmax(device: str) -> None:  # noqa: F811
    inf, nan = float("inf"), float("nan")
    rows = ([0.0, -0.0, -1], [-0.0, 0.0, -1], [-3, -2.5, -2.5], [1, inf, inf], [inf, nan, nan], [-inf, -inf, -inf])
    rows = torch.tensor([*rows, [-nan, 1, inf], [-1e-40, -1e-45, -2]])
    slots = torch.arange(len(rows), device=device)
    tables = [torch.zeros(len(rows) + 1, dtype=torch.int64, device=device) for _ in range(2)]
    found = module("triton_neighbours").end(rows.to(device), None, slots, tables[1][:-1].clone(), *tables)
    assert found.tolist() == rows.argmax(-1).tolist() == [0, 0, 1, 1, 1, 0, 0, 1]


@apart
@given(lengths=st.lists(st.integers(1, 1000), min_size=1, max_size=40))
def test_sequences_go_together_while_padding_is_cheap(lengths: list[int]) -> None:
    found = attention.together(lengths)
    assert sorted(place for group in found for place in group) == list(range(len(lengths)))
    for group in found:
        assert lengths[group[0]] * len(group) <= attention.PADDING * sum(lengths[place] for place in group)
    for group, after in itertools.pairwise(found):
        joined = [*group, after[0]]
        assert lengths[group[0]] * len(joined) > attention.PADDING * sum(lengths[place] for place in joined)


# name, options: how many loads stand before the wait for the kernels before: of weights alone
KERNELS = {"norm": 2, "swiglu": 0, "rotate": 0, "begin": 0, "end": 0, "end likeliest": 0}
KERNELS |= {"step 1": 0, "step 4": 0, "step 8": 0, "step 1 ranges": 0, "step 4 ranges": 0, "step 4 ranges norms": 4}


def compiled(name: str, arch: int, dtype: torch.dtype):
    """The machine code for a model with heads of 128, compiled without a GPU; early where that can be."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kind, *options = name.split()
    file = module("triton_attention" if kind == "step" else "triton_neighbours")
    kernel, pointer = getattr(file, f"{kind}_kernel"), POINTERS[dtype]
    types = dict.fromkeys(("h", "delta", "weight", "x", "gate", "up", "y", "q", "k", "v", "q_norm", "k_norm"), pointer)
    types |= dict.fromkeys(("cos", "sin", "cache", "turned", "out", "embedding", "logits"), pointer)
    types |= dict.fromkeys(("order", "place", "table", "lengths", "tokens", "slots", "positions", "new"), "*i64")
    types |= dict.fromkeys(("parts", "logs"), "*fp32") | {"counters": "*i32"}
    types |= dict.fromkeys(("epsilon", "q_epsilon", "k_epsilon", "scale"), "fp32") | {"value_offset": "i64"}
    constants = {"BLOCK": 4096 if kind == "norm" else 1024, "HEADS": 32, "HALF": 64, "EARLY": arch >= 90}
    constants |= {"LIKELIEST": "likeliest" in options}
    if kind == "step":
        constants |= file.constants(int(options[0]), 128, 32)
        constants |= {} if "norms" in options else dict.fromkeys(("q_norm", "k_norm"))
        constants |= {} if "ranges" in options else dict.fromkeys(("parts", "logs", "counters"))
    if kind == "norm" and not options:
        constants["order"] = None
    names = [parameter.name for parameter in kernel.params]
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    fixed = {(names.index(n),): value for n, value in constants.items() if n in names}
    even = ("cols", "dim", "half", "q_row", "k_row", "v_row", "value_offset", "vocabulary")
    aligned = [i for i, n in enumerate(names) if signature[n].startswith("*") or n in even]
    source = ASTSource(kernel, signature, fixed, {(i,): [["tt.divisibility", 16]] for i in aligned})
    settings = file.settings(dtype, 128) if kind == "step" else {"num_warps": 8 if kind == "norm" else 4}
    settings |= {"launch_pdl": True} if arch >= 90 else {}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=settings)


def opcodes(code, folder: Path) -> tuple[list[str], int]:
    """The instructions of a kernel in their order, with nothing left out, and the registers of a thread."""
    import triton

    sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
    import sass

    cubin, tools = folder / "kernel.cubin", Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    cubin.write_bytes(code.asm["cubin"])
    (function,) = sass.disassemble(cubin, str(tools / "nvdisasm")).values()
    usage = subprocess.run(
        [tools / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    return [instruction.opcode for instruction in function.body(None)], int(re.search(r"REG:(\d+)", usage)[1])


@apart
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", KERNELS)
def test_machine_code(name: str, arch: int, tmp_path) -> None:
    """It compiles without a GPU, spills nothing, fits as often as it should, and loads only weights before it waits."""
    for dtype in (torch.bfloat16, torch.float32) if (name, arch) == ("step 4 ranges", 80) else (torch.bfloat16,):
        code = compiled(name, arch, dtype)
        found, registers = opcodes(code, tmp_path)
        assert not [opcode for opcode in found if opcode.startswith(("LDL", "STL"))], "spills"
        if name.startswith("step") and dtype == torch.bfloat16:  # as many as PROGRAMS_PER_SM says, on an A100, too
            file = module("triton_attention")
            assert file.PROGRAMS_PER_SM * registers * 32 * file.WARPS <= 65536
            assert file.PROGRAMS_PER_SM * (code.metadata.shared + 1024) <= 164 << 10
        products = name.startswith(("step 4", "step 8")) and dtype != torch.float32
        assert any("HMMA" in opcode for opcode in found) == products
        waits = [place for place, opcode in enumerate(found) if opcode.startswith("ACQBULK")]
        assert len(waits) == (arch >= 90) == ("PREEXIT" in found)
        if arch >= 90:
            before = [opcode for opcode in found[: waits[0]] if opcode.startswith(MEMORY)]
            assert len(before) <= KERNELS[name] and all(opcode.startswith("LDG") for opcode in before), before
            assert not [opcode for opcode in found[: waits[0]] if opcode.startswith(("BRA", "EXIT", "RET"))]


@apart
@pytest.mark.parametrize("name", ["step 1 ranges", "step 4 ranges"])
def test_what_others_wrote_is_read_behind_the_count(name: str) -> None:
    """All threads have stored before one counts, and all wait for its answer; then nothing comes from the L1 cache."""
    code = compiled(name, 90, torch.bfloat16).asm["ptx"]
    found = re.findall(r"\b(?:bar\.sync|atom\.global\S*|red\.global\S*|ld\.global\S*|st\.global\S*)", code)
    (count,) = [place for place, one in enumerate(found) if one.startswith(("atom", "red"))]
    assert found[count].startswith("atom.global.gpu.acq_rel.add")
    assert found[count - 1] == found[count + 1] == "bar.sync" and found[count - 2].startswith("st.global")
    loads = [one for one in found[count:] if one.startswith("ld")]
    assert loads and all(one.startswith("ld.global.cg") for one in loads)


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


class Launches(TorchDispatchMode):
    """Names of what a GPU would be asked to do: operations of torch that compute, and kernels of Triton."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.names: list[str] = []
        owner = type(module("triton_neighbours").norm_kernel)
        original = owner.run

        def run(kernel, *given, **named):
            self.names.append(kernel.fn.__name__)
            with _disable_current_modes():
                return original(kernel, *given, **named)

        monkeypatch.setattr(owner, "run", run)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if not func.is_view and not name.startswith(("new_empty", "empty", "detach", "_unsafe_view")):
            self.names.append("product" if name in ("mm", "addmm", "linear") else name)
        return func(*args, **(kwargs or {}))


@runs
def test_launches_of_a_step(device: str, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """One at the beginning, one for what stands between two products of a block, two and the last product at the end.

    Of a dense model: what packed weights take into their launches is in test_cuda_delta.py and test_decoder_gpu.py.
    """
    from test_decoder import build

    from alphaprune.decoder import Decoder
    from alphaprune.ragged import Ragged

    monkeypatch.setattr(neighbours, "fused", lambda x: True)
    decoder = Decoder(build("qwen3, window and biases").to(device))
    ragged = Ragged(decoder, 3, 70)
    slots = torch.tensor([2, 0, 3], device=device)
    attention_part = ["norm_kernel", *["product"] * 3, "step_kernel", "product"]
    block = [*attention_part, "norm_kernel", *["product"] * 2, "swiglu_kernel", "product"]
    with torch.inference_mode(), Launches(monkeypatch) as found:
        ragged.step(slots, 40)
    assert found.names == ["begin_kernel", *block * len(decoder.blocks), "norm_kernel", "product", "end_kernel"]
    with torch.inference_mode(), Launches(monkeypatch) as found:
        ragged.step(slots, 40, lambda logits, slots, positions: logits.argmin(-1))
    assert found.names[-2:] == ["argmin", "end_kernel"]
