"""SparseLinear behaves as nn.Linear does; sparsify replaces what gets smaller."""

import copy
import io
import pickle

import pytest
import torch
from conftest import make_model
from torch import nn

from alphaprune import SparseLinear, sparsify

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


def test_works_in_torch_compile() -> None:
    linear, sparse = make_pair()
    compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 70)
    close(compiled(x), linear(x))
