"""A CUDA graph on the CPU: the operations of a call, recorded once and repeated on the tensors of that time.

As in a CUDA graph, what Python decided while recording stays decided, tensors that the call would have fetched anew are
those of the recording, and reading a number back from the device is an error.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten

from alphaprune.kernels import cpu_attention, dense, group, neighbours, spmm

# What waits for the device to know a size or a number.
SYNCING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "item", "is_nonzero")


class Recording(TorchDispatchMode):
    """The operations that run inside, in order."""

    current: "Recording | None" = None

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], None]] = []

    def __enter__(self) -> "Recording":
        Recording.current = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        Recording.current = None
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        masks = name in ("index", "index_put_") and any(
            isinstance(one, Tensor) and one.dtype == torch.bool for one in tree_flatten(args[1])[0]
        )
        if name.startswith(SYNCING) or masks:
            raise RuntimeError(f"{name} waits for the device: not permitted while a graph is recorded")
        given = kwargs or {}
        out = func(*args, **given)
        self.add(lambda: func(*args, **given), out, [args, given])
        return out

    def add(self, call: Callable[[], Any], out: Any, given: Any) -> None:
        """Remembers a call that gave `out`: repeated, it has to write there."""
        storages = {t.untyped_storage().data_ptr() for t in tree_flatten(given)[0] if isinstance(t, Tensor)}
        made = [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)]
        fresh = [t.untyped_storage().data_ptr() not in storages for t in made]

        def repeat() -> None:
            again = [t for t in tree_flatten(call())[0] if isinstance(t, Tensor)]
            for old, new, copied in zip(made, again, fresh, strict=True):
                if copied and old.numel():
                    old.copy_(new)

        self.calls.append(repeat)


class Fake:
    """In the place of graphs.Graphs. recordings: how often something was recorded."""

    def __init__(self) -> None:
        self.recordings = 0

    def record(self, call: Callable[[], Any]) -> Callable[[], Any]:
        call()  # the warm-up
        self.recordings += 1
        with Recording() as recording:
            result = call()
        for tensor in tree_flatten(result)[0]:  # recording computes nothing
            tensor.fill_(float("nan") if tensor.is_floating_point() else -1)

        def replay() -> Any:
            for one in recording.calls:
                one()
            return result

        return replay


def record_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Native products, which torch does not see, are recorded, too, with the tensors that they were given.

    What else is native on a CPU alone is left to torch, as it is on a GPU.
    """
    run, together = spmm.Prepared.run, group.spmm_group

    def watched(original: Callable) -> Callable:
        def product(*given: Any, **named: Any) -> Any:
            recording = Recording.current
            if recording is None:
                return original(*given, **named)
            with _disable_current_modes():
                out = original(*given, **named)
            recording.add(lambda: original(*given, **named), out, [])
            return out

        return product

    monkeypatch.setattr(spmm.Prepared, "run", watched(run))
    monkeypatch.setattr(group, "spmm_group", watched(together))
    monkeypatch.setattr(neighbours, "NATIVE", ())
    monkeypatch.setattr(dense, "ISAS", {})
    monkeypatch.setattr(cpu_attention, "DTYPES", ())
