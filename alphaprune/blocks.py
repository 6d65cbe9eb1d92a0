"""A decoder block of transformers as plain calls: norms, projections, activation. What families differ in is here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from alphaprune.kernels import cpu, dense, neighbours
from alphaprune.kernels import group as op
from alphaprune.kernels.attention import HeadNorm
from alphaprune.kernels.spmm import Prepared
from alphaprune.layer import SparseLinear

Linear = Callable[[Tensor], Tensor]  # x [M, K] → y [M, N]
Group = Callable[[Tensor], Sequence[Tensor]]  # x [M, K] → [y [M, N], …]
Norm = Callable[..., Tensor]  # h [M, K], delta [M, K] or None, which is added to h in place → x [M, K]
Act = Callable[[Tensor, Tensor], Tensor]  # gate, up [M, N] → their product after the activation


class Projections:
    """Products of one x after a norm of h; with `act` of the two that there are the gated product alone.

    On a GPU packed weights take the norm and SwiGLU into their launch where a kernel does (group.spmm_group).
    """

    def __init__(self, layernorm: nn.Module, product: Group, packed: "Packed | None", act: Act | None = None) -> None:
        self.norm, self.product, self.packed = norm(layernorm), product, packed
        self._norm = (layernorm.weight, layernorm.variance_epsilon)
        self.fused = packed is not None and packed.weights[0].device.type == "cuda"
        self.gated = act is neighbours.swiglu
        self.swiglu = self.fused and self.gated
        self.act = partial(neighbours.swiglu, isa=cpu.best()) if self.gated else act

    def __call__(self, h: Tensor, delta: Tensor | None) -> Sequence[Tensor]:
        """[y [M, N], …] of h [M, hidden], which first takes delta [M, hidden] in place, if there is one."""
        fuses = self.fused and delta is None
        found = self.multiply(h, self._norm) if fuses else self.multiply(self.norm(h, delta))
        return found if self.act is None or self.swiglu else [self.act(*found)]

    def multiply(self, x: Tensor, before: "op.Norm | None" = None) -> Sequence[Tensor]:
        """What there is of weights in a call, and what goes with it in one launch."""
        if self.fused and self.packed is not None:
            return op.spmm_group(x, self.packed.weights, self.packed.biases, before, self.swiglu)
        return self.product(x)


class Packed(NamedTuple):
    """Packed layers that share x."""

    weights: list[Prepared]
    biases: list[Tensor | None]


class Added:
    """A product that the residual stream takes: in place and in the same launch where a kernel does."""

    def __init__(self, module: nn.Module, direct: bool) -> None:
        self.product = linear(module, direct)
        self.packed = Packed([module.prepared()], [module.bias]) if direct and _plain(module) else None
        self.fused = self.packed is not None and self.packed.weights[0].device.type == "cuda"

    def __call__(self, x: Tensor, h: Tensor) -> Tensor | None:
        """The product [M, hidden] of x [M, K], which is yet to be added to h [M, hidden], or None if it was."""
        if self.fused and self.packed is not None and not torch.compiler.is_compiling():
            (weight,), (bias,) = self.packed
            if weight.adds(len(x), x.dtype):
                weight.run(x, bias, h)
                return None
        return self.product(x)


@dataclass(frozen=True, slots=True)
class Block:
    """The parts of one decoder block.

    qkv: q, k and v, normed. head_norm: of q and k side by side, in place on [batch, tokens, heads, dim], or None.
    head_norms: the same of each as its weight [dim] and epsilon. inside: what `down` takes, of gate and up. window: how
    many positions back it sees, itself included; None for all. isa: whose loops attend on a CPU.
    """

    qkv: Projections
    head_norm: Callable[[Tensor], None] | None
    head_norms: tuple[HeadNorm, HeadNorm] | None
    out: Added
    inside: Projections
    down: Added
    window: int | None
    isa: str | None

    def mlp(self, h: Tensor, delta: Tensor | None) -> Tensor | None:
        """What the second half of the block adds to h, which first takes `delta`, the work of the first half."""
        (x,) = self.inside(h, delta)
        return self.down(x, h)

    def packed(self) -> list[tuple[Packed, bool]]:
        """Packed layers as they are called, and whether with SwiGLU in one launch."""
        parts = ((self.qkv, False), (self.out, False), (self.inside, self.inside.swiglu), (self.down, False))
        return [(part.packed, swiglu) for part, swiglu in parts if part.packed is not None]


def build(layer: nn.Module, config: Any, head_dim: int, direct: bool = True, ranks: int = 1) -> Block:
    """The block of a transformers layer, which shares its weights.

    direct: packed layers by the shortest call; without it through the op that torch.compile knows. ranks: that share
    the heads.
    """
    attention, mlp = layer.self_attn, layer.mlp
    normed = hasattr(attention, "q_norm")
    act = neighbours.swiglu if config.hidden_act == "silu" else lambda gate, up: mlp.act_fn(gate).mul_(up)
    return Block(
        qkv=Projections(layer.input_layernorm, *_qkv(attention, config, head_dim, direct)),
        head_norm=_head_norm(attention, config.num_key_value_heads // ranks, head_dim) if normed else None,
        head_norms=_head_norms(attention) if normed else None,
        out=Added(attention.o_proj, direct),
        inside=Projections(layer.post_attention_layernorm, *_gate_up(mlp, config, direct), act),
        down=Added(mlp.down_proj, direct),
        window=_window(config, attention),
        isa=cpu.best(),
    )


def norm(module: nn.Module) -> Norm:
    """transformers' RMSNorm with its rounding, after the sum of h and a delta."""
    weight, epsilon, isa = module.weight, module.variance_epsilon, cpu.best()
    return lambda h, delta=None: neighbours.add_norm(h, delta, weight, epsilon, isa=isa)


def linear(module: nn.Module, direct: bool = True) -> Linear:
    """The shortest call with the result of the module's; anything but a plain linear layer is called as it is."""
    if type(module) is nn.Linear and not hooked(module):
        return dense.linear(module.weight, module.bias)
    if direct and _plain(module):
        return partial(module.prepared().run, bias=module.bias)
    return module


def _group(modules: Sequence[nn.Module], direct: bool) -> tuple[Group, Packed | None]:
    """Several layers of one x: one call of the kernel if all are packed."""
    if direct and all(map(_plain, modules)):
        packed = Packed([module.prepared() for module in modules], [module.bias for module in modules])
        return lambda x: op.spmm_group(x, *packed), packed
    calls = [linear(module, direct) for module in modules]
    return lambda x: [call(x) for call in calls], None


def _qkv(attention: nn.Module, config: Any, head_dim: int, direct: bool) -> tuple[Group, Packed | None]:
    if config.model_type != "phi3":
        return _group([attention.q_proj, attention.k_proj, attention.v_proj], direct)
    keys = config.num_key_value_heads * head_dim
    return _parts(attention.qkv_proj, [config.num_attention_heads * head_dim, keys, keys], direct), None


def _gate_up(mlp: nn.Module, config: Any, direct: bool) -> tuple[Group, Packed | None]:
    if config.model_type == "phi3":
        half = mlp.gate_up_proj.out_features // 2
        return _parts(mlp.gate_up_proj, [half, half], direct), None
    return _group([mlp.gate_proj, mlp.up_proj], direct)


def _parts(module: nn.Module, sizes: list[int], direct: bool) -> Group:
    """One layer whose outputs are several, side by side."""
    call = linear(module, direct)
    return lambda x: [part.contiguous() for part in call(x).split(sizes, -1)]


def _head_norm(attention: nn.Module, keys: int, head_dim: int) -> Callable[[Tensor], None]:
    """Qwen3's RMSNorm of each head of q and k, in place on [batch, tokens, heads, dim]: one call for both."""
    weights, epsilon = (attention.q_norm.weight, attention.k_norm.weight), attention.q_norm.variance_epsilon
    tables: dict[int, Tensor] = {}  # by the number of heads: their weights, [heads, dim]

    def run(turned: Tensor) -> None:
        count = turned.shape[2]
        if count not in tables:
            tables[count] = torch.cat([weights[0].expand(count - keys, -1), weights[1].expand(keys, -1)])
        torch.mul(functional.rms_norm(turned, (head_dim,), None, epsilon), tables[count], out=turned)

    return run


def _head_norms(attention: nn.Module) -> tuple[HeadNorm, HeadNorm]:
    q, k = attention.q_norm, attention.k_norm
    return (q.weight, q.variance_epsilon), (k.weight, k.variance_epsilon)


def _window(config: Any, attention: nn.Module) -> int | None:
    if config.model_type in ("mistral", "phi3"):
        return config.sliding_window
    return getattr(attention, "sliding_window", None)


def _plain(module: nn.Module) -> bool:
    """Whether a module is a packed layer and no more, whose kernel may be called directly."""
    return type(module) is SparseLinear and not hooked(module)


def hooked(module: nn.Module) -> bool:
    """Whether more happens around a module's forward, such as adding up what several ranks have."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)
