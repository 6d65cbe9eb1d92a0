"""What kernels keep for good beside a packed weight, in layouts of their own."""

from alphaprune.formats import Packed
from alphaprune.kernels import delta_layout, nm_layout, nm_library

SIZES = {
    "nm_mma_sp": nm_layout.nbytes,
    "nm_cusparselt": nm_library.nbytes,
    "delta_spmv": delta_layout.nbytes,
}


def nbytes(kernel: str, packed: Packed) -> int:
    """Bytes that a kernel keeps once it was bound to a weight; 0 for those that read it as it is packed."""
    return SIZES[kernel](packed) if kernel in SIZES else 0
