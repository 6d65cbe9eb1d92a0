"""What kernels keep for good beside a packed weight, in layouts of their own."""

from alphaprune.formats import Packed
from alphaprune.kernels import delta_layout, nm_layout, nm_library, pair_layout

SIZES = {
    "nm_mma_sp": nm_layout.nbytes,
    "nm_cusparselt": nm_library.nbytes,
    "delta_spmv": delta_layout.nbytes,
    "pair_mma": pair_layout.nbytes,
}


TOGETHER = ("delta_spmv",)  # whose groups have a layout of their own


def nbytes(kernel: str, *weights: Packed) -> int:
    """Bytes that a kernel keeps once it was bound to a weight, or to some that share x; 0 for those that read SBT."""
    if len(weights) > 1 and kernel in TOGETHER:
        return SIZES[kernel](*weights)
    return sum(SIZES[kernel](packed) for packed in weights) if kernel in SIZES else 0
