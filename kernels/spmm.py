"""The one op, y = x Wᵀ + b with a packed W: checks, dispatch, gradients, torch.compile."""

import functools
import itertools
import weakref
from bisect import bisect_left
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from alphaprune import memory
from alphaprune.files import first_line
from alphaprune.formats import Packed, native, sbt
from alphaprune.kernels import base, copies, cpu, expansion
from alphaprune.kernels.base import Bound, Kernel, Together
from alphaprune.kernels.expansion import expand

__all__ = ["Prepared", "back_ends", "expand", "native_status", "of_op", "prepare", "spmm"]

FLOATS = cpu.FLOATS
OP = "alphaprune::spmm"
_numbers = itertools.count()


class Prepared:
    """A packed weight that was checked once; called with x and bias it gives y. It keeps the packed tensors alive."""

    def __init__(self, packed: Packed, name: str, kernel: str | None = None) -> None:
        sbt.validate(packed, name)
        self.packed, self.name = packed, name
        self.rows, self.cols = packed.shape
        self.device = packed.device
        self.kernel = None if kernel is None else base.named(kernel)
        self._fits: dict[str, str | None] = {}  # by kernel: why it does not take this weight, looked at once
        self._limits: dict[torch.dtype, tuple[int, ...]] = {}  # by x's dtype: past which tokens another kernel runs
        self._bound: dict[tuple[torch.dtype, int], Bound] = {}  # by x's dtype and the limits that the tokens exceed
        self._adds: dict[tuple[torch.dtype, int], bool] = {}  # by the same: whether these add in place
        self._made: dict[str, tuple[Bound, int]] = {}  # by kernel: what was bound once, and the bytes that it keeps
        self.number = next(_numbers)
        self.groups: dict[tuple, Together | None] = {}  # see group.py
        self.made_groups: dict[tuple, Together | None] = {}

    def __reduce__(self) -> tuple:
        # Addresses mean nothing in a copy or another process.
        return Prepared, (self.packed, self.name, None if self.kernel is None else self.kernel.name)

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """y [..., N] in x's dtype. x: [..., K]; bias: [N], in float32 or any dtype of x.

        ValueError naming the layer if shapes, dtypes or devices do not fit, or the kernel asked for cannot run.
        """
        if torch.compiler.is_compiling():
            return _call_op(x, self.packed, bias)
        if not needs_op(x, bias):
            return self.run(x, bias)
        try:
            return _call_op(x, self.packed, bias)
        except (RuntimeError, ValueError) as error:  # the op does not know of which layer it is
            if not str(error).startswith(OP):
                raise
            raise type(error)(self.name + str(error).removeprefix(OP)) from error

    def run(self, x: Tensor, bias: Tensor | None, into: Tensor | None = None) -> Tensor:
        """y without gradients: the direct call of the kernel.

        into: [..., N], contiguous, in x's dtype, which y is added to in place, for kernels of which `adds` says so.
        """
        if x.dim() == 0 or x.shape[-1] != self.cols or (bias is not None and bias.numel() != self.rows):
            raise ValueError(_misfit(self.name, (self.rows, self.cols), x, bias))
        if x.device != self.device:
            raise ValueError(f"{self.name}: x is on {x.device}, the packed weight on {self.device}; move one of them")
        tokens = x.numel() // self.cols
        limits = self._limits.get(x.dtype, ())
        bound = self._bound.get((x.dtype, bisect_left(limits, tokens))) or self._bind(x.dtype, tokens)
        if bias is not None and (bias.dtype not in FLOATS or bias.device != x.device):
            raise ValueError(f"{self.name}: bias is {bias.dtype} on {bias.device}, wanted a float on {x.device}")
        bias = None if bias is None else bias.contiguous()
        try:
            return bound(x.contiguous(), bias) if into is None else bound(x.contiguous(), bias, into)
        except RuntimeError as error:
            raise self.told(error, f"y [{tokens}, {self.rows}]") from error

    def adds(self, tokens: int, x_dtype: torch.dtype) -> bool:
        """Whether the kernel for so many tokens adds to a tensor in place."""
        key = x_dtype, self.case(tokens, x_dtype)
        if key not in self._adds:
            self._adds[key] = self.choice(tokens, x_dtype)[0].adds
        return self._adds[key]

    def choice(self, tokens: int, x_dtype: torch.dtype) -> tuple[Kernel, str]:
        """The kernel for so many tokens, and why those before it in preference were passed over."""
        shape, dtype = self.packed.shape, self.packed.dtype
        if self.kernel is None:
            seen = self.seen(x_dtype)
            return base.choose(shape, tokens, dtype, seen, str(self.device), self.packed.density, self.fits)
        reason = base.elsewhere(self.kernel, self.device) or self.kernel.supports(shape, tokens, dtype, x_dtype)
        if reason := reason or self.fits(self.kernel):
            raise ValueError(f"{self.name}: kernel {self.kernel.name} cannot run: {reason}")
        return self.kernel, "asked for"

    def seen(self, x_dtype: torch.dtype) -> torch.dtype:
        """What kernels are chosen for: int8 where they round x so, or x's dtype."""
        return torch.int8 if cpu.rounds_to_bytes(self.packed) else x_dtype

    def fits(self, kernel: Kernel) -> str | None:
        """None, or why `kernel` does not take this weight."""
        if kernel.name not in self._fits:
            self._fits[kernel.name] = None if kernel.fits is None else kernel.fits(self.packed)
        return self._fits[kernel.name]

    def leave_out(self, kernel: str, reason: str) -> None:
        """Has other kernels chosen from now on, and forgets what this one kept. Not for weights of a graph."""
        self._fits[kernel] = reason
        self._made.pop(kernel, None)
        self._forget()

    def keep_to(self, kernel: Kernel) -> None:
        """Has this kernel multiply any number of tokens from now on, as if it had been asked for; as `leave_out`."""
        self.kernel = kernel
        self._made.clear()
        self._forget()

    def _forget(self) -> None:
        """What was chosen and bound."""
        self._limits.clear()
        self._bound.clear()
        self._adds.clear()
        self.number = next(_numbers)  # of no group that others remember
        self.groups.clear()
        self.made_groups.clear()

    def kernels(self, most: int, x_dtype: torch.dtype) -> dict[int, Kernel]:
        """The kernels for up to `most` tokens: {the most tokens of a stretch: its kernel}, rising."""
        self.case(most, x_dtype)
        limits = self._limits.get(x_dtype, ())
        return {tokens: self.choice(tokens, x_dtype)[0] for tokens in (*(t for t in limits if t < most), most)}

    def ready(self, tokens: int, x_dtype: torch.dtype) -> None:
        """Makes now what the first call with so many tokens would make."""
        if (x_dtype, self.case(tokens, x_dtype)) not in self._bound:
            self._bind(x_dtype, tokens)

    def copied(self) -> int:
        """Bytes that its kernels keep beside the packed weight."""
        groups = sum(one.nbytes for one in self.made_groups.values() if one is not None)
        return groups + sum(nbytes for _, nbytes in self._made.values())

    def case(self, tokens: int, x_dtype: torch.dtype) -> int:
        """A number that two counts of tokens share only if they have the same kernel."""
        if self.kernel is not None:
            return 0
        if x_dtype not in self._limits:
            p, seen = self.packed, self.seen(x_dtype)
            self._limits[x_dtype] = base.limits(p.shape, p.dtype, seen, str(p.device), p.density, self.fits)
        return bisect_left(self._limits[x_dtype], tokens)

    def _bind(self, x_dtype: torch.dtype, tokens: int) -> Bound:
        if x_dtype not in FLOATS:
            raise ValueError(f"{self.name}: x is {x_dtype}, wanted float32, float16 or bfloat16")
        kernel, why = self.choice(tokens, x_dtype)
        if kernel.name not in self._made:
            refuse_capture(self, kernel.name, tokens, x_dtype)
            try:
                self._made[kernel.name] = kernel.bind(self.packed), copies.nbytes(kernel.name, self.packed)
            except (RuntimeError, ValueError) as error:
                raise self.told(error, f"what kernel {kernel.name} keeps of the weight") from error
        if kernel.name == "reference" and self.kernel is None:
            _log_slow(self.device.type, why)
        base.log.debug("%s: kernel %s for %d tokens in %s (%s)", self.name, kernel.name, tokens, x_dtype, why)
        bound = self._bound[x_dtype, self.case(tokens, x_dtype)] = self._made[kernel.name][0]
        return bound

    def told(self, error: Exception, made: str) -> Exception:
        """The same kind of error, whose text names the layer, and after want of memory what there was none for."""
        what = f"no memory for {made}: " if memory.is_shortage(error) else ""
        return type(error)(f"{self.name}: {what}{first_line(error)}")


@functools.cache
def _log_slow(device: str, why: str) -> None:
    base.log.warning("no kernel runs on %s, so the slow reference does, because %s", device, why)


def refuse_capture(prepared: Prepared, kernel: str, tokens: int, x_dtype: torch.dtype) -> None:
    """ValueError while a CUDA graph is captured: what is about to be made takes work outside of one."""
    if prepared.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise ValueError(
            f"{prepared.name}: a CUDA graph is being captured, and kernel {kernel} for {tokens} tokens in {x_dtype} is "
            f"not ready, which takes work outside of a graph; call the layer once with so many before"
        )


def prepare(packed: Packed, name: str = "packed weight", kernel: str | None = None) -> Prepared:
    """The packed weight, checked and bound to its kernels; ValueError naming the layer if it is malformed."""
    return Prepared(packed, name, kernel)


_prepared: "weakref.WeakKeyDictionary[Packed, dict[str | None, Prepared]]" = weakref.WeakKeyDictionary()


def spmm(x: Tensor, packed: Packed, bias: Tensor | None = None, kernel: str | None = None) -> Tensor:
    """y [..., N] = x Wᵀ + bias in x's dtype, accumulated in float32; differentiable in x and bias.

    x: [..., K], float32, float16 or bfloat16. packed: W [N, K], checked at its first use. bias: [N] or None.
    kernel: a name of `back_ends()`; one that cannot run raises ValueError with the reason and never falls back.
    """
    if torch.compiler.is_compiling():
        return _call_op(x, packed, bias)
    known = _prepared.setdefault(packed, {})
    if kernel not in known:
        # The key must not be reachable from its value, or neither would ever be freed.
        known[kernel] = Prepared(replace(packed), "spmm", kernel)
    return known[kernel](x, bias)


def back_ends() -> list[tuple[str, str | None]]:
    """(kernel, None or the reason it does not run here), in order of preference."""
    return [(kernel.name, kernel.available()) for kernel in base.kernels().values()]


def native_status() -> str:
    """`built: …` or `not built: ` and the reason."""
    return native.status()


def needs_op(x: Tensor, bias: Tensor | None) -> bool:
    """Gradients, fake tensors and subclasses go through the dispatcher; plain tensors call the kernel directly."""
    if type(x) is not Tensor and type(x) is not torch.nn.Parameter:
        return True
    return torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))


def _misfit(name: str, shape: tuple[int, int], x: Tensor, bias: Tensor | None) -> str:
    bias_shape = "" if bias is None else f" and bias {tuple(bias.shape)}"
    return (
        f"{name}: a weight {shape} needs x [..., {shape[1]}] and bias [{shape[0]}], got x {tuple(x.shape)}{bias_shape}"
    )


# The op for torch.compile and autograd. Its packed tensors come through the dispatcher, so what was checked is
# remembered by the identity of `weight`; an alias of it is held, because the key itself would then live for ever. Of
# layers that share a weight one may have x rounded beside it and another not: each has its own.
_by_weight: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _lookup(
    weight: Tensor, mask: Tensor, offsets: Tensor, scale: Tensor | None, n: int, k: int, to_bytes: bool = False
) -> Prepared:
    address = (weight.data_ptr(), mask.data_ptr(), offsets.data_ptr(), 0 if scale is None else scale.data_ptr(), n, k)
    known = _by_weight.setdefault(weight, {})
    if to_bytes not in known or known[to_bytes][0] != address:
        activations = torch.int8 if to_bytes else None
        packed = Packed(weight, mask, offsets, (n, k), scale, activations).map(Tensor.detach)
        known[to_bytes] = (address, Prepared(packed, OP))
    return known[to_bytes][1]


def of_op(packed: Packed) -> Prepared:
    """What the op of torch.compile multiplies with; it lives as long as the values of the weight."""
    return _lookup(packed.weight, packed.mask, packed.offsets, packed.scale, *packed.shape, packed.bytes_allowed)


def _call_op(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    tensors = packed.weight, packed.mask, packed.offsets, packed.scale
    return torch.ops.alphaprune.spmm(x, *tensors, *packed.shape, bias, packed.bytes_allowed)


def _spmm(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    offsets: Tensor,
    scale: Tensor | None,
    n: int,
    k: int,
    bias: Tensor | None,
    to_bytes: bool = False,
) -> Tensor:
    return _lookup(weight, mask, offsets, scale, n, k, to_bytes).run(x, bias)


def _spmm_fake(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    offsets: Tensor,
    scale: Tensor | None,
    n: int,
    k: int,
    bias: Tensor | None,
    to_bytes: bool = False,
) -> Tensor:
    torch._check(x.shape[-1] == k, lambda: _misfit(OP, (n, k), x, bias))
    return x.new_empty((*x.shape[:-1], n))


def _grad(grad: Tensor, weight: Tensor, mask: Tensor, offsets: Tensor, scale: Tensor | None, n: int, k: int) -> Tensor:
    return expansion.multiply_transposed(grad, _lookup(weight, mask, offsets, scale, n, k).packed)


def _grad_fake(
    grad: Tensor, weight: Tensor, mask: Tensor, offsets: Tensor, scale: Tensor | None, n: int, k: int
) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], k))


def _remember(ctx, inputs, output) -> None:
    _, *packed, ctx.n, ctx.k, bias, _ = inputs
    ctx.save_for_backward(*packed)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, grad: Tensor):
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.alphaprune.spmm_grad(grad.contiguous(), *ctx.saved_tensors, ctx.n, ctx.k)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[7]:
        grad_bias = grad.float().flatten(0, -2).sum(0).to(ctx.bias_dtype)
    return grad_x, *[None] * 6, grad_bias, None


_PACKED = "Tensor weight, Tensor mask, Tensor offsets, Tensor? scale, SymInt n, SymInt k"
_library = torch.library.Library("alphaprune", "DEF")
_library.define(f"spmm(Tensor x, {_PACKED}, Tensor? bias, bool to_bytes=False) -> Tensor")
_library.define(f"spmm_grad(Tensor grad, {_PACKED}) -> Tensor")
for _name, _impl, _fake in (("spmm", _spmm, _spmm_fake), ("spmm_grad", _grad, _grad_fake)):
    _library.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"alphaprune::{_name}", _fake, lib=_library)
torch.library.register_autograd("alphaprune::spmm", _backward, setup_context=_remember, lib=_library)
