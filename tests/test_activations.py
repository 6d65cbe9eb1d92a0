"""activations="int8": who may round x beside int8 values, which kernel runs then, and that a layer is told so.

Numbers hold whether a kernel uses the permission or not: the bound is that of rounding in any case.
"""

import copy
import gc
import io
import pickle
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import sparse_layers, write_packed, zeros_model
from problems import DTYPES, KINDS, Kind, problem
from tables import curve, made
from tolerance import GROUP, bound, exact
from torch import Tensor, nn

import alphaprune
from alphaprune import SparseLinear, round_activations, sparsify
from alphaprune.formats import Packed, native, sbt
from alphaprune.hf_parallel import SlicedLinear
from alphaprune.kernels import cpu, group, spmm

INTEGERS = ("int8", "int8/128")
BF16 = torch.bfloat16
MANY = 3000  # tokens, more than any limit


def allowing(packed: Packed, activations: torch.dtype | None = torch.int8) -> Packed:
    return replace(packed, activations=activations)


def assert_rounded(y: Tensor, x: Tensor, weight: Tensor) -> None:
    """Fails unless y is x Wᵀ, each x at most half a step of 8 bits off, besides what is allowed without.

    Per token and group g of 128 columns a step is max|x_k| / 127; that of the float32 it is kept in and of a quotient
    near a half that was rounded adds 2⁻⁷ of it at most. So Σ_g max|x_k|·Σ_{k∈g}|w_k| / 254·(1 + 2⁻⁷).
    """
    largest = torch.stack([part.abs().amax(-1) for part in x.double().split(GROUP, -1)], -1)
    weights = torch.stack([part.abs().sum(-1) for part in weight.double().split(GROUP, -1)])
    allowed = bound(x, weight, rounded=True) + largest @ weights / 254 * (1 + 2.0**-7)
    assert y.dtype == x.dtype and ((y.double() - exact(x, weight)).abs() <= allowed).all()


def best() -> str:
    return next(isa for isa in cpu.ISAS if cpu.missing(isa) is None)


@pytest.fixture
def told(native_only: None, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """(instruction set, whether x may be rounded) of every weight that is bound."""
    found, original = [], native.weight

    def weight(packed: Packed, isa: str):
        found.append((isa, packed.bytes_allowed))
        return original(packed, isa)

    monkeypatch.setattr(native, "weight", weight)
    return found


@pytest.fixture
def looked_up(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether x may be rounded, of every product of the op that torch.compile knows."""
    found, original = [], spmm._lookup

    def lookup(*arguments):
        found.append(arguments[6:] == (True,))
        return original(*arguments)

    monkeypatch.setattr(spmm, "_lookup", lookup)
    return found


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 70),
    k=st.integers(1, 400),
    tokens=st.integers(0, 40),
    density=st.floats(0, 1),
    kind=st.sampled_from(KINDS),
    x=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_products_are_within_a_step(n, k, tokens, density, kind: Kind, x, seed) -> None:
    dense, packed, rows = problem(n, k, tokens, density, kind, x, seed)
    packed = allowing(packed)
    if kind in DTYPES:
        assert torch.equal(spmm.spmm(rows, packed), spmm.spmm(rows, allowing(packed, None)))
        return
    for kernel in (None, *(isa for isa in cpu.BYTES if not cpu.missing(isa))):
        assert_rounded(spmm.spmm(rows, packed, kernel=kernel), rows, dense)


@settings(max_examples=200, deadline=None)
@given(
    isa=st.sampled_from((*cpu.ISAS, None)),
    tokens=st.integers(1, 5000),
    kind=st.sampled_from(KINDS),
    x=st.sampled_from(DTYPES),
    density=st.sampled_from((0.2, 0.5, 1.0)),
)
def test_the_kernel_that_multiplies_bytes_is_taken_for_any_number_of_tokens(isa, tokens, kind, x, density) -> None:
    """On a machine whose best instruction set is `isa`, or without native code."""
    _, packed, _ = problem(32, 140, 1, density, kind, x)
    as_ever, prepared = spmm.prepare(packed), spmm.prepare(allowing(packed))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("ALPHAPRUNE_ISA", raising=False)
        usable = cpu.ISAS[cpu.ISAS.index(isa) :] if isa else ()
        module = SimpleNamespace(isas=lambda: [(name, "" if name in usable else "not here") for name in cpu.ISAS])
        patch.setattr(native, "load", lambda: module if isa else None)
        kernel, why = prepared.choice(tokens, x)
        if kind in INTEGERS and isa in cpu.BYTES:
            assert kernel.name == isa
            assert set(k.name for k in prepared.kernels(MANY, x).values()) == {isa}
        else:
            assert (kernel, why) == as_ever.choice(tokens, x)
            assert prepared.kernels(MANY, x) == as_ever.kernels(MANY, x)
        between = prepared._limits.get(x, ())
        for limit in between:  # what a stretch of tokens was bound to holds for all of it
            assert prepared.case(limit, x) != prepared.case(limit + 1, x)


@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 16, 40])
@pytest.mark.parametrize("kernel", cpu.BYTES)
def test_what_is_allowed_is_done(native_only: None, kernel: str, tokens: int) -> None:
    """Beside 127, 0.4 is less than half a unit: it vanishes from sums of bytes, and from no others."""
    if reason := cpu.missing(kernel):
        pytest.skip(reason)
    x = torch.full((tokens, 128), 0.4, dtype=BF16)
    x[:, 5] = 127
    packed = sbt.pack(torch.full((16, 128), 2, dtype=torch.int8), None, torch.ones(16))
    for activations, others in ((None, 127 * 0.4), (torch.int8, 0)):
        y = spmm.spmm(x, allowing(packed, activations), kernel=kernel)
        assert (y.float() - 2 * (127 + others)).abs().max() <= 1  # of bfloat16 below 512


def test_a_lesser_instruction_set_computes_as_before(native_only: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in INTEGERS:
        for isa in ("avx512bw", "avx2", "scalar"):
            monkeypatch.setenv("ALPHAPRUNE_ISA", isa)
            if cpu.missing(isa):
                continue
            _, packed, x = problem(40, 300, 200, 0.5, kind, BF16)
            allowed = allowing(packed)
            for tokens in (1, 3, 17, 200):
                kernel, _ = spmm.prepare(allowed).choice(tokens, BF16)
                past = tokens > cpu.MOST_TOKENS[isa] and not cpu.takes_any(isa, torch.int8, BF16, 0.5)
                assert kernel.name == ("expand" if past else isa)
                assert torch.equal(spmm.spmm(x[:tokens], allowed), spmm.spmm(x[:tokens], packed))


def test_kernels_by_name(native_only: None) -> None:
    dense, packed, x = problem(40, 300, 70, 0.5, "int8/128", BF16)
    allowed = allowing(packed)
    for name in ("expand", "reference", "avx512bw", "avx2", "scalar"):
        if name in cpu.ISAS and cpu.missing(name):
            continue
        assert spmm.prepare(allowed, "layer", name).choice(MANY, BF16)[0].name == name
        assert torch.equal(spmm.spmm(x, allowed, kernel=name), spmm.spmm(x, packed, kernel=name))
    for name in cpu.BYTES:
        if not cpu.missing(name):
            assert_rounded(spmm.spmm(x, allowed, kernel=name), x, dense)
    with pytest.raises(ValueError, match=r"x is torch\.int8, wanted float32, float16 or bfloat16"):
        spmm.spmm(torch.ones(1, 300, dtype=torch.int8), allowed)


def test_a_weight_elsewhere_keeps_its_kernels() -> None:
    _, packed, _ = problem(40, 300, 1, 0.5, "int8", BF16)
    meta = allowing(packed).to("meta")
    assert meta.bytes_allowed and not cpu.rounds_to_bytes(meta)


def test_time_tables(use_table, native_only: None) -> None:
    """Times of int8 values beside bfloat16 say nothing of products of bytes; times of those do."""
    _, packed, _ = problem(64, 64, 1, 0.5, "int8", BF16)
    measured = [
        replace(curve(name, 0, [at] * 4, dtype="int8"), x="bfloat16") for name, at in (("scalar", 1), ("expand", 2))
    ]
    use_table(made(*measured))
    assert {kernel.name for kernel in spmm.prepare(packed).kernels(MANY, BF16).values()} == {"scalar"}
    allowed = spmm.prepare(allowing(packed))
    wanted = best() if best() in cpu.BYTES else "scalar"
    assert {kernel.name for kernel in allowed.kernels(MANY, BF16).values()} == {wanted}
    if wanted == "scalar":
        return
    assert not allowed._limits[BF16]
    others = [isa for isa in cpu.BYTES if isa != wanted and not cpu.missing(isa)]
    for other in others:
        bytes_by_bytes = curve(wanted, 0, (1, 1, 3, 3), dtype="int8"), curve(other, 0, (2, 2, 2, 2), dtype="int8")
        use_table(made(*measured, *bytes_by_bytes, curve("scalar", 0, [0.1] * 4, dtype="int8")))  # which cannot
        found = spmm.prepare(allowing(packed))
        assert [found.choice(tokens, BF16)[0].name for tokens in (1, 4, 16, MANY)] == [wanted] * 2 + [other] * 2
        assert len(set(found.kernels(MANY, BF16))) == 2  # stretches of tokens


def test_native_code_is_told(told: list) -> None:
    for kind, activations in ((k, a) for k in ("int8", "int8/128", torch.float32) for a in (torch.int8, None)):
        _, packed, x = problem(20, 70, 2, 0.5, kind, BF16)
        told.clear()
        spmm.spmm(x, allowing(packed, activations))
        assert [flag for _, flag in told] == [kind in INTEGERS and activations is torch.int8]
    seen, integers, floats = [], *(problem(20, 70, 1, 0.5, kind, BF16)[1] for kind in ("int8", BF16))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "load", lambda: SimpleNamespace(Weight=lambda *arguments: seen.append(arguments[-2])))
        for packed in (allowing(integers), integers, allowing(floats)):
            native.weight(packed, "avx2")
    assert seen == [True, False, False]


@pytest.mark.parametrize("kind", INTEGERS)
def test_groups_have_the_bits_of_separate_calls(told: list, kind: Kind) -> None:
    """Weights that allow it, weights that do not, and both."""
    made_ = [problem(n, 333, 40, 0.4, kind, BF16, n) for n in (96, 40, 17)]
    x = made_[0][2]
    for flags in ((True, True, True), (True, False, True), (False, True, False)):
        weights = [allowing(p, torch.int8 if flag else None) for (_, p, _), flag in zip(made_, flags, strict=True)]
        prepared = [spmm.prepare(packed) for packed in weights]
        for tokens in (1, 2, 9, 40):
            wanted = [one(x[:tokens]) for one in prepared]
            told.clear()
            found = group.spmm_group(x[:tokens], prepared)
            assert [flag for _, flag in told] == list(flags)  # one native call, each by its own choice
            for y, z, (dense, _, _) in zip(found, wanted, made_, strict=True):
                assert torch.equal(y, z)
                assert_rounded(y, x[:tokens], dense)


def test_the_op_keeps_layers_apart_that_share_a_weight(told: list) -> None:
    _, packed, x = problem(40, 300, 3, 0.5, "int8", torch.float32)
    one, other = SparseLinear(packed), SparseLinear(allowing(packed))
    assert one.weight is other.weight
    first, second = spmm.of_op(one.packed), spmm.of_op(other.packed)
    assert first is not second and (first.packed.activations, second.packed.activations) == (None, torch.int8)
    leaf, twin = x.clone().requires_grad_(), x.clone().requires_grad_()
    for _ in range(2):
        one(leaf).square().sum().backward()
        other(twin).sum().backward()
    assert [flag for _, flag in told].count(True) == 1  # it is bound once, though they take turns
    assert (spmm.of_op(one.packed), spmm.of_op(other.packed)) == (first, second)
    alive = weakref.ref(packed.weight)
    del packed, one, other, first, second
    gc.collect()
    assert alive() is None


def test_gradients_are_those_of_x_as_it_is() -> None:
    _, packed, x = problem(40, 300, 5, 0.5, "int8", torch.float32)
    grads = []
    for one in (packed, allowing(packed)):
        leaf, bias = x.clone().requires_grad_(), torch.zeros(40, requires_grad=True)
        (spmm.spmm(leaf, one, bias) * torch.linspace(-1, 1, 40)).sum().backward()
        grads.append((leaf.grad, bias.grad))
    assert torch.equal(grads[0][0], grads[1][0]) and torch.equal(grads[0][1], grads[1][1])
    tensors = packed.weight, packed.mask, packed.offsets, packed.scale, 40, 300
    for bias in (None, torch.randn(40, requires_grad=True)):
        leaf = x.clone().requires_grad_()
        torch.library.opcheck(torch.ops.alphaprune.spmm.default, (leaf, *tensors, bias, True))


def test_compiled_layers_follow_the_choice(looked_up: list) -> None:
    dense, packed, x = problem(40, 300, 3, 0.5, "int8", torch.float32)
    layer = SparseLinear(packed)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for activations in (None, torch.int8, None):
        layer.activations = activations
        looked_up.clear()
        assert_rounded(compiled(x), x, dense)
        assert looked_up == [activations is torch.int8]
        assert torch.equal(compiled(x), layer(x))
    prepared = spmm.prepare(allowing(packed))
    for call in (prepared, lambda x: spmm.spmm(x, allowing(packed)), lambda x: group.spmm_group(x, [prepared])[0]):
        looked_up.clear()
        torch.compile(call, fullgraph=True, backend="aot_eager")(x)
        assert looked_up == [True]


# Layers and models.


def rounded_layer(values: str | None = "int8") -> SparseLinear:
    torch.manual_seed(0)
    linear = nn.Linear(300, 40).requires_grad_(False)
    return SparseLinear.from_linear(linear, torch.rand(40, 300) < 0.4, values)


def test_the_attribute_stays_with_the_layer_and_out_of_files(told: list) -> None:
    layer = round_activations(rounded_layer())
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)]
    for one in (layer, *copies, copy.deepcopy(layer).to(BF16), copy.deepcopy(layer).float()):
        assert one.activations is one.packed.activations is torch.int8
        told.clear()
        one(torch.randn(2, 300))
        assert told == [(best(), True)]
    assert set(layer.state_dict()) == {"weight", "weight_mask", "weight_offsets", "weight_scale", "bias"}
    assert "values=int8, activations=int8" in repr(layer)
    layer.activations = None
    assert copies[0].activations is torch.int8 and "activations" not in repr(layer)
    old = pickle.loads(pickle.dumps(layer))
    del old.__dict__["activations"]  # as layers were pickled before
    assert old.activations is old.packed.activations is None


def test_a_change_takes_effect_at_the_next_call(told: list) -> None:
    layer, x = rounded_layer(), torch.randn(3, 300)
    first = layer(x)
    prepared = layer.prepared()
    assert layer.prepared() is prepared
    for to in ("int8", None, "int8"):
        round_activations(layer, to)
        layer(x)
        assert layer.prepared() is layer.prepared() is not prepared
    assert [flag for _, flag in told] == [False, True, False, True]
    assert torch.equal(round_activations(layer, None)(x), first)


def test_other_values_are_taken_as_they_come() -> None:
    """A layer that loads floats multiplies floats, whatever it was allowed beside integers."""
    layer, floats, x = round_activations(rounded_layer()), rounded_layer(None), torch.randn(3, 300)
    layer.load_state_dict(floats.state_dict())
    assert torch.equal(layer(x), floats(x)) and "activations" not in repr(layer)
    layer.load_state_dict(rounded_layer().state_dict())
    assert layer.packed.bytes_allowed


def test_slices_carry_it() -> None:
    part = SlicedLinear(rounded_layer().packed)
    assert not part.packed.bytes_allowed and round_activations(part).packed.bytes_allowed


def flags(model: nn.Module) -> set[torch.dtype | None]:
    return {layer.activations for layer in sparse_layers(model).values()}


def test_round_activations_of_a_model() -> None:
    model = sparsify(zeros_model(), values="int8")
    name, last = list(sparse_layers(model).items())[-1]
    floats = SparseLinear.from_linear(last.to_linear())
    model.set_submodule(name, floats)
    assert round_activations(model) is model and floats.activations is None
    assert flags(model) == {torch.int8, None}
    assert round_activations(model, None) is model and flags(model) == {None}
    assert flags(sparsify(zeros_model(), values="int8", activations="int8")) == {torch.int8}
    assert flags(sparsify(zeros_model(), values="int8")) == {None}


def test_what_cannot_be_is_one_sentence() -> None:
    floats = sparsify(zeros_model())
    for model in (floats, make_model()):
        with pytest.raises(
            ValueError, match=r"activations 'int8': no layer of this model has int8 values, .*--values int8"
        ):
            round_activations(model)
        assert round_activations(model, None) is model
    for call in (
        lambda: round_activations(floats, "int4"),
        lambda: sparsify(zeros_model(), values="int8", activations="int4"),
        lambda: alphaprune.load("nowhere", activations="int4"),
    ):
        with pytest.raises(ValueError, match=r"^activations 'int4': wanted int8, or None"):
            call()
    untouched = zeros_model()
    with pytest.raises(ValueError, match=r"activations 'int8': .* give values='int8', too"):
        sparsify(untouched, activations="int8")
    assert not sparse_layers(untouched)


def test_loaded_models_and_their_files(tmp_path) -> None:
    integers, floats = write_packed(tmp_path / "integers", "int8"), write_packed(tmp_path / "floats")
    model = alphaprune.load(integers, activations="int8")
    assert flags(model) == {torch.int8} and flags(alphaprune.load(integers)) == {None}
    alphaprune.save(model, tmp_path / "again")
    for file in integers.glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    with pytest.raises(ValueError, match="no layer of this model has int8 values"):
        alphaprune.load(floats, activations="int8")
