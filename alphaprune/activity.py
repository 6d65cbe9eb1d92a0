"""Block and what is known of its layers' inputs → the columns that activation-based allocators read."""

from alphaprune.calibrate import InputStat
from alphaprune.model import Block

COLUMNS: tuple[str, ...] = ()


def columns(block: Block, inputs: dict[str, InputStat]) -> dict[str, dict[str, float]]:
    """Columns by layer name."""
    return {name: {} for name in block.linears}
