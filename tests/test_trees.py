"""Any module tree through analyze, plan, prune and sparsify; convolutions against float64 formulas."""

import copy
import importlib
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from vision import KINDS, images, made

import alphaprune
from alphaprune import SparseLinear, Tree, trees

pytestmark = pytest.mark.usefixtures("one_thread")


def layers(tree: Tree) -> dict[str, nn.Module]:
    return {name: layer for _, name, layer in tree._layers()}


def zeroed(module: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    """A copy with zeros where the masks have them, made layer by layer by hand."""
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for name, mask in masks.items():
            weight = twin.get_submodule(name).weight
            weight[~mask.reshape(weight.shape)] = 0
    return twin


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_its_dense_twin(kind: str) -> None:
    """Alpha allocation, Wanda on images: exact counts, the same outputs as dense with zeros, linears packed."""
    model, path, x = made(kind), KINDS[kind][2], images()
    dense = copy.deepcopy(model)
    tree = Tree(model, blocks=path)
    names = []
    analysis = alphaprune.analyze(tree, progress=names.append)
    assert names == [block.name for block in tree.blocks()]
    assert {s.block for s in analysis.layers.values()} == set(range(tree.block_count()))
    assert all(stat.columns["alpha"] > 0 for stat in analysis.layers.values())
    assert not [n for n in analysis.layers if any(part in n for part in ("head", "stem", "patch", "conv_dw"))]
    plan = alphaprune.plan(analysis, 0.6, epsilon=0.3)
    shares = {s.block: 0 for s in analysis.layers.values()}
    masks = alphaprune.prune(tree, plan, "wanda", inputs=x)
    assert masks.keys() == analysis.layers.keys() == plan.layers.keys()
    for name, mask in masks.items():
        assert mask.shape == analysis.layers[name].shape and int((~mask).sum()) == plan.layers[name].zeros
        shares[analysis.layers[name].block] += plan.layers[name].zeros
    assert len(set(shares.values())) > 1  # the allocation differs between blocks
    weights = sum(mask.numel() for mask in masks.values())
    assert sum(shares.values()) == round(0.6 * weights)
    twin = zeroed(dense, masks)
    with torch.no_grad():
        assert torch.equal(model(x), twin(x)) and (model(x) - dense(x)).abs().max() > 1e-3
        sparse = alphaprune.sparsify(model, masks)
        close(sparse(x), twin(x))
    linears = [name for name in masks if isinstance(dense.get_submodule(name), nn.Linear)]
    assert [n for n, m in sparse.named_modules() if isinstance(m, SparseLinear)] == linears
    assert len(linears) == (0 if kind.endswith("1×1") else len(masks))


@pytest.mark.parametrize("kind", ["vit", "convnext 1×1"])
def test_magnitude_needs_no_images_and_stays_by_default_with_the_top(kind: str) -> None:
    model = made(kind)
    dense = copy.deepcopy(model)
    analysis = alphaprune.analyze(model, fit=None)
    assert {"head", "blocks.0.mlp.fc1" if kind == "vit" else "stages.0.blocks.1.fc1"} <= analysis.layers.keys()
    blocks = {name: stat.block for name, stat in analysis.layers.items()}
    assert len(set(blocks.values())) == (5 if kind == "vit" else 4)
    plan = alphaprune.plan(analysis, 0.5, allocator="uniform")
    masks = alphaprune.prune(model, plan, "magnitude")
    for name, mask in masks.items():
        weight = dense.get_submodule(name).weight.detach().abs().flatten(1)
        assert weight[mask].min() >= weight[~mask].max()
    with torch.no_grad():
        assert torch.equal(model(images()), zeroed(dense, masks)(images()))
    again = (
        alphaprune.prune(
            copy.deepcopy(dense),
            alphaprune.plan(
                analysis,
                pattern="2:4",
                allocator="uniform",
            ),
            "magnitude",
        )
        if kind == "vit"
        else {}
    )
    for mask in again.values():
        assert mask.unflatten(1, (-1, 4)).sum(-1).eq(2).all()


def matrix_rows(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """[samples, places, groups, K] float64, index by index, without any unfolding of torch's."""
    top, left = (p if isinstance(p, int) else 0 for p in conv.padding)
    (kh, kw), (sh, sw), (dh, dw) = conv.kernel_size, conv.stride, conv.dilation
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = nn.functional.pad(x.double(), (left, left, top, top), mode=mode)
    height, width = ((x.shape[-2] - dh * (kh - 1) - 1) // sh + 1, (x.shape[-1] - dw * (kw - 1) - 1) // sw + 1)
    inputs = conv.in_channels // conv.groups
    rows = torch.empty(len(x), height * width, conv.groups, inputs * kh * kw, dtype=torch.float64)
    for i, j, c, a, b in itertools.product(range(height), range(width), range(conv.in_channels), range(kh), range(kw)):
        column = (c % inputs) * kh * kw + a * kw + b
        rows[:, i * width + j, c // inputs, column] = x[:, c, i * sh + a * dh, j * sw + b * dw]
    return rows


@st.composite
def convolutions(draw: st.DrawFn) -> nn.Conv2d:
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    pick = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    return nn.Conv2d(
        groups * pick(1, 2, 3), groups * pick(1, 2, 4), (pick(1, 2, 3), pick(1, 3)), (pick(1, 2), pick(1, 3)),
        (pick(0, 1), pick(0, 2)), (pick(1, 2), 1), groups, pick(True, False),
        pick("zeros", "reflect", "circular"),
    )  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(convolutions(), st.integers(0, 2**16))
def test_the_statistics_of_a_convolution(conv: nn.Conv2d, seed: int) -> None:
    """Norms, product and Gram matrix against float64 sums over indices."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, conv.in_channels, 6, 7, generator=generator)
    rows = matrix_rows(x, conv)
    torch.testing.assert_close(trees.unfold(x[0], conv), rows[0].float())
    weight = conv.weight.detach().double().flatten(1).unflatten(0, (conv.groups, -1))  # [groups, out / groups, K]
    y = torch.einsum("bpgk,gnk->bgnp", rows, weight).flatten(1, 2)
    bias = 0 if conv.bias is None else conv.bias.detach().double()[:, None]
    torch.testing.assert_close(conv(x).double().flatten(2), y + bias, rtol=1e-4, atol=1e-5)
    need = "gram" if conv.groups == 1 else "norms"
    found = trees.observe(conv, {"conv": conv}, [x[:1], x[1:]], need)["conv"]
    wanted = (rows.square().sum((0, 1)) / 2).sqrt()  # [groups, K]
    own = wanted.repeat_interleave(conv.out_channels // conv.groups, 0)
    torch.testing.assert_close(
        found.norms.double().reshape(-1, own.shape[1]), own[: len(found.norms.reshape(-1, own.shape[1]))]
    )
    assert found.tokens == rows.shape[0] * rows.shape[1]
    if conv.groups == 1:
        flat = rows.flatten(0, 1)[:, 0]
        torch.testing.assert_close(found.gram.matrix.double(), flat.t() @ flat / 2, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_wanda_on_a_convolution(groups: int) -> None:
    """The mask is that of |W|·‖X‖ in float64, rows of a group by the inputs of that group."""
    torch.manual_seed(groups)
    model = nn.Sequential(nn.Conv2d(6, 12, 3, padding=1, groups=groups, stride=2))
    x = torch.randn(4, 6, 9, 9) * torch.logspace(-1, 1, 6)[:, None, None]
    dense = copy.deepcopy(model)
    tree = Tree(model, depthwise=True)
    zeros = int(0.5 * model[0].weight.numel())
    masks = alphaprune.prune(tree, alphaprune.plan(alphaprune.analyze(tree, fit=None), 0.5, "uniform"), inputs=x)
    norms = matrix_rows(x, dense[0]).square().sum((0, 1)).sqrt().repeat_interleave(12 // groups, 0)  # [12, K]
    scores = dense[0].weight.detach().double().flatten(1).abs() * norms
    columns = scores.shape[1]
    for row, (mask, score) in enumerate(zip(masks["0"], scores, strict=True)):
        gone = zeros // 12 + (row < zeros % 12)
        assert set((~mask).nonzero().flatten().tolist()) == set(score.argsort()[:gone].tolist()), columns
    assert torch.equal(model[0].weight.flatten(1), dense[0].weight.flatten(1) * masks["0"])
    assert sorted(layers(Tree(model, depthwise=True))) == ["0"]


def test_blocks_see_the_pruned_blocks_before_them() -> None:
    """And with the prefix "dense" those as they were; whatever the batches are made of."""
    x, path = images(), "blocks"
    plan = alphaprune.plan(alphaprune.analyze(Tree(made("vit"), path), fit=None), 0.7, "uniform")
    found = {}
    for name, inputs, options in (
        ("tensor", x, {}),
        ("batches", [x[:2], x[2:]], {}),
        ("labels", [(x[:4], torch.zeros(4)), (x[4:], torch.zeros(2))], {}),
        ("names", [{"x": x}], {}),
        ("once", iter([x]), {}),
        ("dense", x, {"prefix": "dense"}),
        ("other", images(seed=5), {}),
    ):
        found[name] = alphaprune.prune(Tree(made("vit"), path), plan, "wanda", inputs=inputs, **options)
    same = [name for name, masks in found.items() if all(torch.equal(masks[n], m) for n, m in found["tensor"].items())]
    assert same == ["tensor", "batches", "labels", "names", "once"]
    first = [name for name in found["dense"] if name.startswith("blocks.0.")]
    assert all(torch.equal(found["dense"][name], found["tensor"][name]) for name in first)
    model = made("vit")
    known = trees.observe(model, {"fc": model.blocks[2].mlp.fc1}, [x], "norms")["fc"].norms
    score = model.blocks[2].mlp.fc1.weight.detach().abs() * known
    assert score[found["dense"]["blocks.2.mlp.fc1"]].mean() > score[found["tensor"]["blocks.2.mlp.fc1"]].mean()


def test_methods_with_second_moments_and_allocators_with_inputs() -> None:
    x, path = images(), "stages.*.blocks"
    tree = Tree(made("convnext 1×1"), path)
    stats = alphaprune.analyze(tree, inputs=x)
    plan = alphaprune.plan(stats, 0.6, allocator="owl")
    for options in ({"method": "sparsegpt"}, {"method": "wanda", "refit": True}, {"method": "ria"}):
        model = made("convnext 1×1")
        masks = alphaprune.prune(Tree(model, path), plan, inputs=x, **options)
        assert all(int((~mask).sum()) == plan.layers[name].zeros for name, mask in masks.items())
        assert all(not model.get_submodule(n).weight.flatten(1)[~mask].any() for n, mask in masks.items())


class Odd(nn.Module):
    """Attention that reads weights past its layers, a layer that nothing reaches, and one that is shared."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.fc, self.unused = (
            nn.MultiheadAttention(32, 4, batch_first=True),
            nn.Linear(32, 32),
            nn.Linear(32, 32),
        )
        self.again = self.fc

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.fc(self.attn(x, x, x)[0]))


def test_odd_trees() -> None:
    model, x = Odd().eval(), torch.randn(3, 5, 32)
    assert sorted(layers(Tree(model))) == ["fc", "unused"]
    plan = alphaprune.plan(alphaprune.analyze(model, fit=None), 0.5, "uniform")
    with pytest.raises(ValueError, match=r"^unused: no input reached this layer; .*skip=\['unused'\]"):
        alphaprune.prune(model, plan, "wanda", inputs=x)
    tree = Tree(model, skip=["un*"])
    masks = alphaprune.prune(tree, alphaprune.plan(alphaprune.analyze(tree, fit=None), 0.5, "uniform"), inputs=x)
    with torch.no_grad():
        twin = model(x)
        close(alphaprune.sparsify(model, masks)(x), twin)
    plain = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    assert alphaprune.analyze(plain, fit=None).layers["2"].block == 1
    alphaprune.prune(plain, alphaprune.plan(alphaprune.analyze(plain, fit=None), 0.5, "uniform"), "magnitude")
    assert [type(m).__name__ for m in alphaprune.sparsify(plain)] == ["SparseLinear", "ReLU", "SparseLinear"]


def test_a_weight_of_two_layers_is_pruned_once_or_refused() -> None:
    shared = nn.Linear(32, 32)
    model = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), shared) for _ in range(2))
    with pytest.raises(ValueError, match=r"^1\.1: has the weight of 0\.1; .*skip=\['1\.1'\]"):
        alphaprune.analyze(model)
    tree = Tree(model, skip=["1.1"])
    masks = alphaprune.prune(tree, alphaprune.plan(alphaprune.analyze(tree, fit=None), 0.5, "uniform"), "magnitude")
    assert sorted(masks) == ["0.0", "0.1", "1.0"] and torch.equal(shared.weight != 0, masks["0.1"])


@pytest.mark.parametrize("named", ["0.1", "1.1"])
def test_a_module_under_two_names_is_replaced_under_both(named: str) -> None:
    shared = nn.Linear(32, 32)
    model = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), shared) for _ in range(2))
    mask = torch.rand(32, 32) < 0.3
    with pytest.raises(ValueError, match=r"^1\.1: is the module that is called 0\.1, too; give a mask for one of"):
        alphaprune.sparsify(copy.deepcopy(model), {"0.1": mask, "1.1": mask})
    assert alphaprune.sparsify(model, {named: mask}) is model
    assert type(model[0][1]) is SparseLinear and model[1][1] is model[0][1]
    assert [type(block[0]) for block in model] == [nn.Linear, nn.Linear]
    x = torch.randn(3, 32)
    close(model[1][1](x), nn.functional.linear(x, shared.weight * mask, shared.bias))


def test_bad_input() -> None:
    x, model = images(), made("convnext")
    tree = Tree(model)
    plan = alphaprune.plan(alphaprune.analyze(tree, fit=None), 0.5, "uniform")
    cases = (
        (lambda: Tree(nn.ReLU()), "ReLU: no nn.Linear or nn.Conv2d in it"),
        (lambda: Tree(model, "nowhere"), "at 'nowhere'"),
        (lambda: alphaprune.prune(tree, plan), r"inputs to calibrate with \(inputs=…\), or choose --method magnitude"),
        (lambda: alphaprune.prune(tree, plan, tokens=torch.zeros(1, 2).long()), "not with tokens"),
        (lambda: alphaprune.prune(tree, plan, inputs=x, device="cpu"), r"move it with \.to\('cpu'\)"),
        (lambda: alphaprune.prune(tree, plan, inputs=x, channel_permute=True), "knows language models only"),
        (lambda: alphaprune.prune(tree, plan, inputs=[]), "there is no batch"),
        (lambda: alphaprune.prune(tree, plan, inputs=x[:0]), "a sample at least"),
        (lambda: alphaprune.prune(tree, plan, inputs=["cat.png"]), "a batch is str"),
        (lambda: alphaprune.prune(tree, plan, inputs="images"), "got str"),
        (lambda: alphaprune.prune(tree, plan, inputs=x * float("nan")), r"^stem\.0: its inputs hold NaN"),
        (lambda: alphaprune.prune(made("vit"), plan, "magnitude"), "plan"),
        (
            lambda: alphaprune.prune(Tree(model, depthwise=True), plan, "sparsegpt", inputs=x),
            r"^stages\.0\.blocks\.0\.conv_dw: a convolution in groups",
        ),
    )
    for call, sentence in cases:
        with pytest.raises(ValueError, match=sentence):
            call()
    model.stages[1].downsample.weight.data[7] = float("inf")  # in no row of the fingerprint
    with pytest.raises(ValueError, match=r"^stages\.1\.downsample: the weights hold NaN or infinity"):
        alphaprune.prune(tree, plan, "magnitude")


def timm():
    try:
        return importlib.import_module("timm")
    except Exception as error:  # torchvision, which it needs, fails in ways of its own beside another torch
        pytest.skip(f"timm cannot be imported: {type(error).__name__}: {error}")


def test_without_timm_there_is_one_sentence(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    (tmp_path / "weights.pt").write_bytes(b"")
    status, _, err = run("analyze", "timm:vit_tiny_patch16_224", "--weights", "weights.pt")
    assert status == 2 and "pip install 'alphaprune[vision]'" in err and len(err.strip().splitlines()) == 1
    for option in ("--weights", "--blocks"):
        assert f"{option} belongs to a model timm:NAME" in run("analyze", tmp_path, option, "weights.pt")[2]


SMALL = {
    "vit_tiny_patch16_224": {"img_size": 32, "embed_dim": 48, "depth": 3, "num_heads": 3},
    "deit_tiny_distilled_patch16_224": {"img_size": 32, "embed_dim": 48, "depth": 3, "num_heads": 3},
    "convnext_atto": {"depths": (1, 1, 2, 1), "dims": (16, 24, 32, 40)},
}


@pytest.mark.parametrize("name", SMALL)
def test_models_of_timm(name: str) -> None:
    torch.manual_seed(0)
    model = timm().create_model(name, num_classes=10, **SMALL[name]).eval()
    dense, x = copy.deepcopy(model), images()
    analysis = alphaprune.analyze(model)
    assert not [n for n in analysis.layers if any(part in n for part in ("head", "stem", "patch_embed", "conv_dw"))]
    plan = alphaprune.plan(analysis, 0.6, epsilon=0.3)
    masks = alphaprune.prune(model, plan, "wanda", inputs=x)
    with torch.no_grad():
        twin = zeroed(dense, masks)(x)
        assert torch.equal(model(x), twin)
        close(alphaprune.sparsify(model, masks)(x), twin)


def test_the_command_on_timm(run, tmp_path: Path) -> None:
    name = "vit_tiny_patch16_224"
    torch.save(timm().create_model(name).state_dict(), tmp_path / "weights.pt")
    status, _, err = run("analyze", f"timm:{name}", "--weights", "weights.pt", "-o", "a.json")
    assert status == 0, err
    found = json.loads(Path("a.json").read_text())
    assert len(found["layers"]) == 48 and found["model"] == f"timm:{name}"
    assert run("plan", "a.json", "--sparsity", 0.5, "-o", "p.json")[0] == 0
    for arguments, sentence in (
        (("timm:nothing",), "nothing"),
        ((f"timm:{name}",), "--weights FILE"),
        ((f"timm:{name}", "--weights", "a.json"), "a.json"),
        ((f"timm:{name}", "--weights", "none.pt"), "none.pt"),
    ):
        status, _, err = run("analyze", *arguments, "-o", "b.json")
        assert status == 2 and sentence in err and len(err.strip().splitlines()) == 1 and not Path("b.json").exists()
