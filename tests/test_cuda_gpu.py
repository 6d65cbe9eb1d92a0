"""The CUDA kernels on a GPU, where there is one: products, graphs, streams, compilation, devices mixed up."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from problems import problem
from test_cuda import BUCKETS, HALVES, INTEGERS, SHAPES, of_four
from tolerance import assert_product
from torch import Tensor

from alphaprune.formats import sbt
from alphaprune.kernels import cuda, cuda_layouts, group, spmm


@pytest.fixture
def gpu() -> torch.device:
    if reason := cuda.missing():
        pytest.skip(f"no CUDA kernels: {reason}")
    return torch.device("cuda")


@pytest.fixture
def full_sums() -> Iterator[None]:
    """The products after an expansion are the library's. torch lets it round the parts of a sum to 16 bits before it
    adds them, which the bound, of sums in float32, knows nothing of; here it must not."""
    settings, names = (
        torch.backends.cuda.matmul,
        [f"allow_{kind}_reduced_precision_reduction" for kind in ("bf16", "fp16")],
    )
    before = {name: getattr(settings, name) for name in names}
    for name in names:
        setattr(settings, name, False)
    yield
    for name, allowed in before.items():
        setattr(settings, name, allowed)


def product(kernel: str, device: torch.device, found, bias: Tensor | None) -> None:
    dense, packed, x = found
    moved = None if bias is None else bias.to(device)
    y = spmm.prepare(packed.to(device), "layer", kernel)(x.to(device), moved)
    assert_product(y.cpu(), x, dense, bias)


@pytest.mark.gpu
@pytest.mark.usefixtures("full_sums")
@pytest.mark.parametrize("kernel", ["sbt_mma", "pair_mma", "sbt_wgmma", "sbt_expand", "delta_spmv", "nm_mma_sp"])
@pytest.mark.parametrize("dtype", HALVES)
def test_products_on_a_gpu(gpu: torch.device, kernel: str, dtype: torch.dtype) -> None:
    if kernel == "sbt_wgmma" and (reason := cuda.missing_wide()):
        pytest.skip(reason)
    shapes = [*SHAPES, (1000, 4096, 0.5), (4100, 1030, 0.2)]
    for (n, k, density), tokens in itertools.product(shapes, (*BUCKETS, 128, 200, 256, 300)):
        if kernel == "delta_spmv" and tokens > cuda.MOST_DELTA_TOKENS:
            continue
        bias = (None, torch.randn(n).to(dtype), torch.randn(n))[(tokens + n) % 3]
        dense, packed, x = problem(n, k, tokens, density, dtype, dtype)
        if kernel == "nm_mma_sp":
            dense = dense * of_four(dense, 2)
            packed = sbt.pack(dense)
        product(kernel, gpu, (dense, packed, x), bias)


@pytest.mark.gpu
@pytest.mark.parametrize("values", [None, "2:4", *INTEGERS])
@pytest.mark.parametrize("dtype", HALVES)
def test_weights_that_share_a_launch_on_a_gpu(gpu: torch.device, values: str | None, dtype: torch.dtype) -> None:
    """By one launch, and the same again from a graph; biases of some."""
    kernel, kind = ("nm_mma_sp", dtype) if values == "2:4" else ("sbt_mma", values or dtype)
    for rows, k in (((1000, 17, 300), 4096), ((1, 15, 16), 130), ((4096, 1024, 1024), 1024), ((100, 33), 264)):
        found = [problem(n, k, 1, 0.3 + 0.2 * i, kind, dtype, i) for i, n in enumerate(rows)]
        if values == "2:4":
            pruned = [dense * of_four(dense, 2) for dense, _, _ in found]
            found = [(dense, sbt.pack(dense), None) for dense in pruned]
        prepared = [spmm.prepare(packed.to(gpu), "layer", kernel) for _, packed, _ in found]
        biases = [(torch.randn(n), None, torch.randn(n).to(dtype))[i] for i, n in enumerate(rows)]
        moved = [None if bias is None else bias.to(gpu) for bias in biases]
        for tokens in (1, 8, 9, 16, 25, 40, 64, 100):
            x = torch.randn(tokens, k).to(dtype)
            given = x.to(gpu)
            outputs = group.spmm_group(given, prepared, moved)
            assert list(prepared[0].made_groups)[-1][0] == kernel
            for y, (dense, _, _), bias in zip(outputs, found, biases, strict=True):
                assert_product(y.cpu(), x, dense, bias)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                again = group.spmm_group(given, prepared, moved)
            for y in again:
                y.fill_(float("nan"))
            graph.replay()
            assert all(torch.equal(a, b) for a, b in zip(again, outputs, strict=True))


@pytest.mark.gpu
def test_two_row_tiles_of_a_warp_on_a_gpu(gpu: torch.device) -> None:
    for (n, k), tokens in itertools.product(((1000, 4096), (17, 300)), (9, 16, 32)):
        dense, packed, x = problem(n, k, tokens, 0.5, HALVES[1], HALVES[1])
        moved = packed.to(gpu)
        native = cuda.handles(moved)[0][HALVES[1]].by_row_tiles(2)
        (y,) = cuda.joined(native, [n], k, gpu, 1, moved).run(x.to(gpu), None, None)
        assert_product(y.cpu(), x, dense)


@pytest.mark.gpu
@pytest.mark.parametrize("tile", [(0, 0), (128, 2), (256, 2), (128, 4)])
def test_prompts_of_two_of_four_on_a_gpu(gpu: torch.device, tile: tuple[int, int]) -> None:
    """Several units of work for each pair of blocks; and what is not finite."""
    if reason := cuda.missing_wide():
        pytest.skip(reason)
    for (n, k), tokens, dtype in zip(
        ((9000, 264), (520, 4096), (37, 136)), (2100, 300, 70), (*HALVES, HALVES[0]), strict=True
    ):
        dense, _, x = problem(n, k, tokens, 1.0, dtype, dtype)
        dense = dense * of_four(dense, 2)
        if tokens == 300:
            x[7, 90], x[100, 3000], x[299, k - 1] = float("inf"), float("nan"), float("-inf")
        made, panels = cuda_layouts.native_nm(sbt.pack(dense).to(gpu))
        given = x.to(gpu)
        runs = [cuda.joined(made.by_ways(*tile), [n], k, gpu, 1, panels).run(given, None)[0] for _ in range(5)]
        assert_product(runs[0].cpu(), x, dense)
        assert all(torch.equal(runs[0].view(torch.int16), again.view(torch.int16)) for again in runs[1:])


@pytest.mark.gpu
@pytest.mark.parametrize("values", INTEGERS)
@pytest.mark.parametrize("dtype", HALVES)
def test_int8_values_on_a_gpu(gpu: torch.device, values: str, dtype: torch.dtype) -> None:
    shapes = [*SHAPES, (1000, 4096, 0.5), (4100, 1030, 0.2), (36864, 256, 0.5)]  # the last in blocks of 64 rows
    for (n, k, density), tokens in itertools.product(shapes, (*BUCKETS, 33, 100)):
        bias = (None, torch.randn(n).to(dtype), torch.randn(n))[(tokens + n) % 3]
        product("sbt_mma", gpu, problem(n, k, tokens, density, values, dtype), bias)
    dense, packed, x = problem(33, 200, 4, 0.5, values, dtype)
    x[1, 70], x[2, 5], x[3, 199] = float("inf"), float("nan"), float("-inf")
    product("sbt_mma", gpu, (dense, packed, x), None)
    assert spmm.prepare(packed.to(gpu)).choice(1, dtype)[0].name == "sbt_mma"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
def test_every_integer_is_itself_on_a_gpu(gpu: torch.device, dtype: torch.dtype) -> None:
    """Which needs subnormal operands of the multiply-add in bfloat16."""
    integers = torch.arange(-127, 128, dtype=torch.int8)[:, None].expand(255, 8).contiguous()
    scale = torch.rand(255)
    for mask in (
        torch.ones(255, 8, dtype=torch.bool),
        torch.arange(8).expand(255, 8) == torch.arange(255)[:, None] % 8,
    ):
        packed = sbt.pack(integers, mask, scale).to(gpu)
        y = spmm.prepare(packed, "layer", "sbt_mma")(torch.eye(8, dtype=dtype, device=gpu))
        assert torch.equal(y.cpu(), (integers * mask * scale[:, None]).to(dtype).T)


@pytest.mark.gpu
@pytest.mark.parametrize("values", [torch.bfloat16, *INTEGERS])
def test_graphs_streams_and_compile_on_a_gpu(gpu: torch.device, values) -> None:
    dense, packed, x = problem(300, 512, 4, 0.4, values, torch.bfloat16)
    prepared, given = spmm.prepare(packed.to(gpu), "layer"), x.to(gpu)
    expected = prepared(given)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph):
        y = prepared(given)
    y.fill_(float("nan"))
    graph.replay()
    assert torch.equal(y, expected)
    with torch.cuda.stream(stream):
        aside = prepared(given)
    stream.synchronize()
    assert torch.equal(aside, expected)
    compiled = torch.compile(lambda t: spmm.spmm(t, prepared.packed), fullgraph=True)
    assert torch.equal(compiled(given), expected)
    assert_product(y.cpu(), x, dense)


@pytest.mark.gpu
def test_wrong_devices_on_a_gpu(gpu: torch.device) -> None:
    _, packed, x = problem(16, 64, 1, 0.5, torch.bfloat16, torch.bfloat16)
    prepared = spmm.prepare(packed.to(gpu), "model.layers.0.up_proj")
    prepared(x.to(gpu))
    with pytest.raises(ValueError, match=r"model\.layers\.0\.up_proj: x is on cpu, the packed weight on cuda:0"):
        prepared(x)
    with pytest.raises(ValueError, match="runs on cuda, the packed weight is on cpu"):
        spmm.prepare(packed, "layer", "sbt_mma")(x)
