"""SparseLinear behaves as nn.Linear does; sparsify replaces what gets smaller."""

import copy
import io
import pickle

import pytest
import torch
from conftest import make_model
from torch import nn

from alphaprune import SparseLinear, formats, sparsify

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_pair(n: int = 50, k: int = 70, bias: bool = True, dtype=torch.float32, sparsity: float = 0.7):
    """A dense layer with zeros and its sparse twin."""
    torch.manual_seed(n * 1000 + k)
    linear = nn.Linear(k, n, bias=bias).to(dtype)
    mask = torch.rand(n, k) >= sparsity
    linear.weight.data.masked_fill_(~mask, 0)
    return linear.requires_grad_(False), SparseLinear.from_linear(linear, mask)


def close(sparse: torch.Tensor, dense: torch.Tensor) -> None:
    assert sparse.shape == dense.shape and sparse.dtype == dense.dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}[dense.dtype]
    torch.testing.assert_close(sparse, dense, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", [(), (1,), (3,), (2, 5), (2, 1, 4), (0,), (2, 0)])
def test_same_call_same_shape_same_dtype(dtype, bias, leading) -> None:
    linear, sparse = make_pair(bias=bias, dtype=dtype)
    x = torch.randn(*leading, 70).to(dtype)
    close(sparse(x), linear(x))


def test_views_of_x() -> None:
    linear, sparse = make_pair()
    x = torch.randn(4, 9, 140)[:, ::2, ::2]
    close(sparse(x), linear(x))
    close(sparse(torch.randn(70, 6).t()[:0]), linear(torch.randn(0, 70)))


def test_copies_are_independent_and_equal() -> None:
    _, sparse = make_pair()
    x = torch.randn(3, 70)
    wanted = sparse(x)
    for twin in (copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse))):
        assert torch.equal(twin(x), wanted)
        twin.weight.zero_()
        twin.bias.data.zero_()
        assert not twin(x).any() and torch.equal(sparse(x), wanted)


def test_state_dict_round_trip_also_from_another_pruning() -> None:
    _, a = make_pair(sparsity=0.7)
    _, b = make_pair(sparsity=0.2)
    assert set(a.state_dict()) == {"weight", "weight_mask", "weight_offsets", "bias"}
    x = torch.randn(3, 70)
    b(x)  # prepared before the load: must be prepared again
    file = io.BytesIO()
    torch.save(a.state_dict(), file)
    file.seek(0)
    b.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(a(x), b(x))


def test_moving_to_a_dtype_casts_values_and_bias_only() -> None:
    linear, sparse = make_pair()
    moved, x = sparse.to(torch.bfloat16), torch.randn(3, 70).bfloat16()
    assert moved.weight.dtype == moved.bias.dtype == torch.bfloat16 and moved.weight_mask.dtype == torch.int32
    close(moved(x), linear.to(torch.bfloat16)(x))


def test_values_keep_their_bits() -> None:
    weight = torch.tensor([[1.0, float("nan"), 0.0], [float("inf"), -0.0, 1e-40]])
    linear = nn.Linear(3, 2, bias=False)
    linear.weight.data = weight
    dense = SparseLinear.from_linear(linear, torch.ones(2, 3, dtype=torch.bool)).to_linear()
    assert torch.equal(dense.weight.view(torch.int32), weight.view(torch.int32))


def test_gradients_for_x_and_bias() -> None:
    linear, sparse = make_pair(n=9, k=11)
    x = torch.randn(4, 11, dtype=torch.float32, requires_grad=True)
    sparse.bias.requires_grad_(True)
    linear.bias.requires_grad_(True)
    weights = torch.randn(4, 9)
    (sparse(x) * weights).sum().backward()
    got, got_bias, x.grad = x.grad, sparse.bias.grad, None
    (linear(x) * weights).sum().backward()
    torch.testing.assert_close(got, x.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got_bias, linear.bias.grad)
    with torch.no_grad():
        assert not sparse(x).requires_grad
    assert not any(p.requires_grad for n, p in sparse.named_parameters() if n != "bias")


def test_wrong_inputs_name_the_layer() -> None:
    model = make_model()
    masks = {"model.layers.0.mlp.up_proj": torch.rand(200, 96) > 0.8}
    sparsify(model, masks)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.up_proj.*96.*95"):
        model.get_submodule("model.layers.0.mlp.up_proj")(torch.randn(2, 95))
    with pytest.raises(ValueError, match=r"lm_heat: the mask names a layer"):
        sparsify(make_model(), {"lm_heat": torch.ones(2, 2)})
    with pytest.raises(ValueError, match=r"mask has shape \(2, 2\)"):
        sparsify(make_model(), {"lm_head": torch.ones(2, 2)})


def test_corrupt_buffers_are_found_before_a_kernel_sees_them() -> None:
    _, sparse = make_pair()
    sparse.weight_offsets = sparse.weight_offsets + 1000
    with pytest.raises(ValueError, match="offsets"):
        sparse(torch.randn(1, 70))
    _, sparse = rounded_pair()
    sparse(torch.randn(1, 70))
    sparse.weight_scale = sparse.weight_scale[:-1]
    with pytest.raises(ValueError, match=r"need a float32 scale \(50,\) or \(50, 1\), got torch.float32 \(49,\)"):
        sparse(torch.randn(1, 70))


def test_sparsify_from_zeros_in_the_model_leaves_dense_layers_alone() -> None:
    live = make_model()
    for layer in live.model.layers[:2]:
        layer.mlp.up_proj.weight.data[:, ::2] = 0
    x = torch.arange(20)[None]
    with torch.no_grad():
        wanted = live(x).logits
        assert sparsify(live) is live
        torch.testing.assert_close(live(x).logits, wanted, rtol=1e-4, atol=1e-4)
    sparse = [n for n, m in live.named_modules() if isinstance(m, SparseLinear)]
    assert sparse == ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
    assert "format=sbt" in repr(live.model.layers[0].mlp.up_proj)


@pytest.mark.parametrize("values", [None, "int8"])
def test_works_in_torch_compile(values) -> None:
    linear, sparse = make_pair()
    if values:
        linear, sparse = rounded_pair()
    compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 70)
    close(compiled(x), linear(x))


def rounded_pair(k: int = 70, dtype=torch.float32, group: int | None = None, sparsity: float = 0.7):
    """The int8 twin of a layer, and a dense layer with what it holds."""
    linear, _ = make_pair(k=k, dtype=dtype, sparsity=sparsity)
    sparse = SparseLinear.from_linear(linear, None, values="int8", group=group)
    return sparse.to_linear(torch.float32).to(dtype), sparse


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "group"), [(70, None), (300, None), (300, 128)])
@pytest.mark.parametrize("sparsity", [0.7, 0.0])
def test_int8_values(dtype, k: int, group, sparsity: float) -> None:
    linear, _ = make_pair(k=k, dtype=dtype, sparsity=sparsity)
    sparse = SparseLinear.from_linear(linear, None, values="int8", group=group)
    assert sparse.weight.dtype == torch.int8 and sparse.weight_scale.dtype == torch.float32
    assert sparse.weight_scale.shape == ((50,) if group is None else (50, 3))
    lost = sparse.quantization_error
    off = sparse.to_linear(torch.float32).weight.double() - linear.weight.double()
    assert 0 < lost.relative < 0.01 and 0 < lost.largest < 0.005
    assert lost.relative == pytest.approx((off.norm() / linear.weight.double().norm()).item(), rel=1e-3)
    x = torch.randn(2, 3, k).to(dtype)
    close(sparse(x), sparse.to_linear(dtype)(x))
    leaf = torch.randn(4, k, requires_grad=True)
    weights = torch.randn(4, 50)
    (sparse(leaf) * weights).sum().backward()
    torch.testing.assert_close(leaf.grad, weights @ sparse.to_linear(torch.float32).weight, rtol=1e-4, atol=1e-5)
    assert "values=int8" in repr(sparse) and f"quantization_error={lost.relative:.2g}" in repr(sparse)
    assert sparse.to_linear().weight.dtype == sparse.to_linear().bias.dtype == dtype
    assert torch.equal(sparse.to_linear().bias, linear.bias)


def test_a_kept_weight_that_rounds_to_zero_stays_kept() -> None:
    linear = nn.Linear(64, 1, bias=False)
    linear.weight.data = torch.full((1, 64), 1e-6)
    linear.weight.data[0, 0] = 1
    mask = torch.ones(1, 64, dtype=torch.bool)
    mask[0, 1] = False
    for keep, count in ((mask, 63), (None, 64)):
        sparse = SparseLinear.from_linear(linear, keep, values="int8")
        assert formats.get("sbt").kept(sparse.packed) == count
        assert sparse.to_linear().weight.count_nonzero() == 1
        assert sparse(torch.full((1, 64), float("inf"))).isnan().all()  # as in a dense layer with those zeros


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.to("cpu").float()])
@pytest.mark.parametrize("group", [None, 128])
def test_casting_leaves_integers_and_their_scale_alone(cast, group) -> None:
    _, sparse = rounded_pair(k=300, group=group)
    values, scale, x = sparse.weight.clone(), sparse.weight_scale.clone(), torch.randn(3, 300)
    wanted = sparse(x)
    model = cast(nn.Sequential(sparse, nn.Linear(50, 2)))
    assert model[0].bias.dtype == model[1].weight.dtype
    assert sparse.weight.dtype == torch.int8 and torch.equal(sparse.weight, values)
    assert sparse.weight_scale.dtype == torch.float32 and torch.equal(sparse.weight_scale, scale)
    moved = x.to(model[1].weight.dtype)
    close(sparse(moved), wanted.to(moved.dtype))
    assert model.to("meta")[0].weight_scale.is_meta and model[0].weight_scale.dtype == torch.float32


def test_state_dicts_cross_between_floats_and_integers() -> None:
    _, floats = make_pair(k=300)
    by_row, by_group = rounded_pair(k=300)[1], rounded_pair(k=300, group=128, sparsity=0.2)[1]
    x = torch.randn(3, 300)
    assert set(by_row.state_dict()) == {"weight", "weight_mask", "weight_offsets", "weight_scale", "bias"}
    for source in (floats, by_row, by_group):
        for target in (floats, by_row, by_group):
            loaded = copy.deepcopy(target)
            loaded(x)
            loaded.load_state_dict(source.state_dict())
            assert torch.equal(loaded(x), source(x)) and loaded.weight.dtype == source.weight.dtype
            assert set(loaded.state_dict()) == set(source.state_dict())
            twin = pickle.loads(pickle.dumps(loaded))
            assert torch.equal(twin(x), source(x))
    short = {name: tensor for name, tensor in by_row.state_dict().items() if name != "weight_scale"}
    for target in (floats, by_row):
        with pytest.raises(RuntimeError, match="weight_scale"):
            copy.deepcopy(target).load_state_dict(short)


def test_sparsify_to_int8_packs_dense_layers_too() -> None:
    live = make_model(dtype=torch.bfloat16)
    wanted = {n: m.weight.detach().clone() for n, m in live.model.layers.named_modules() if isinstance(m, nn.Linear)}
    x = torch.arange(20)[None]
    with torch.no_grad():
        logits = live(x).logits
        assert sparsify(live, values="int8", group=128) is live
        assert (live(x).logits - logits).norm() / logits.norm() < 0.03
    sparse = {n: m for n, m in live.model.layers.named_modules() if isinstance(m, SparseLinear)}
    assert set(sparse) == set(wanted)  # no zeros in it, and all the same smaller
    for name, layer in sparse.items():
        assert layer.name == f"model.layers.{name}"
        assert layer.packed.nbytes < wanted[name].nbytes and layer.quantization_error.relative < 0.01
        assert formats.get("sbt").kept(layer.packed) == wanted[name].count_nonzero()


def test_sparsify_to_int8_by_masks() -> None:
    live = make_model()
    layer = live.model.layers[1].mlp.up_proj
    name, weight = "model.layers.1.mlp.up_proj", layer.weight.detach().clone()
    mask = torch.rand(200, 96) > 0.8
    sparsify(live, {name: mask}, values="int8")
    assert [n for n, m in live.named_modules() if isinstance(m, SparseLinear)] == [name]
    dense = live.get_submodule(name).to_linear().weight
    step = (weight * mask).abs().amax(1, keepdim=True) / 127
    assert ((dense - weight * mask).abs() <= 0.5001 * step).all()
    live.model.layers[0].mlp.up_proj.weight.data[3, 5] = float("nan")
    with pytest.raises(ValueError, match=r"^model\.layers\.0\.mlp\.up_proj: NaN and infinity have no place"):
        sparsify(live, values="int8")
    with pytest.raises(ValueError, match="values 'int4': wanted int8"):
        sparsify(live, values="int4")
    with pytest.raises(ValueError, match="group 64"):
        SparseLinear.from_linear(live.lm_head, None, "int8", 64)
