"""SBT, the sub-tile bitmap: 2d + 1/8 bytes per bfloat16 weight of density d, and about 1 % of padding; int8 d + 1/8.

The byte layout is described in csrc/layout.h: macro tiles of 16 rows x 64 columns, each 32 mask words in the order
[step of 16 columns][pair of rows], bit = 16 * (row of the pair) + column; then its values in bit order.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from alphaprune.formats import native, quantize
from alphaprune.formats.packed import Format, Packed

ROWS, COLS, WORDS, UNIT = 16, 64, 32, 8
TAIL = 64  # bytes: one vector may be loaded at the last value
CHUNK = 1 << 24  # weights that the torch route handles at a time: its temporaries are several times their size


def _tiles(shape: tuple[int, int]) -> tuple[int, int]:
    """(R, C), the grid of macro tiles over a weight."""
    return -(-shape[0] // ROWS), -(-shape[1] // COLS)


def _to_tiles(matrix: Tensor) -> Tensor:
    """[N, K] padded and cut into tiles: [R, C, 32 words, 32 bits] in bit order."""
    r, c = _tiles(matrix.shape)
    padded = functional.pad(matrix, (0, c * COLS - matrix.shape[1], 0, r * ROWS - matrix.shape[0]))
    cut = padded.view(r, 8, 2, c, 4, 16)  # [R, pair, row, C, step, column]
    return cut.permute(0, 3, 4, 1, 2, 5).reshape(r, c, WORDS, 32)


def _from_tiles(tiles: Tensor, shape: tuple[int, int]) -> Tensor:
    """The inverse of _to_tiles."""
    r, c = tiles.shape[:2]
    cut = tiles.view(r, c, 4, 8, 2, 16).permute(0, 3, 4, 1, 2, 5)  # [R, pair, row, C, step, column]
    return cut.reshape(r * ROWS, c * COLS)[: shape[0], : shape[1]].contiguous()


def _integers(tensor: Tensor) -> Tensor:
    """The same bits as integers, so that no NaN payload is touched."""
    return tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


def _unsigned(offsets: Tensor) -> Tensor:
    """int32 bit patterns as the numbers they mean, int64."""
    return offsets.to(torch.int64) & 0xFFFFFFFF


def _padded(dtype: torch.dtype) -> int:
    """Units that the values of a tile are padded to: 8 values, and 16 for int8, so that tiles start on 16 bytes."""
    return 2 if dtype == torch.int8 else 1


def _units(count: Tensor, dtype: torch.dtype) -> Tensor:
    """Units that tiles with so many values take."""
    step = _padded(dtype)
    return (count + UNIT * step - 1) // (UNIT * step) * step


def _length(units: int, dtype: torch.dtype) -> int:
    """Values to allocate: the units, a tail that may be read, and rounding to 64 bytes.

    The tail is TAIL bytes even after the values were cast to a dtype of half the size.
    """
    size = dtype.itemsize
    return (units * UNIT * size + max(TAIL, TAIL // 2 * size) + TAIL - 1) // TAIL * TAIL // size


def _chunks(shape: tuple[int, int]) -> list[tuple[int, int]]:
    """Ranges of row tiles of about CHUNK weights."""
    r, c = _tiles(shape)
    step = max(1, CHUNK // (c * COLS * ROWS))
    return [(first, min(first + step, r)) for first in range(0, r, step)]


def pack(weight: Tensor, mask: Tensor | None = None, scale: Tensor | None = None) -> Packed:
    """The weight [N, K] in SBT: only values where `mask` is True, bits unchanged.

    Without a mask every weight but +0 and -0 is kept; NaN and infinities are. scale: of an int8 weight, float32 [N] or
    [N, ceil(K / 128)]. ValueError on a shape or dtype that the format does not know.
    """
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(f"sbt needs a 2-D weight with rows and columns, got shape {tuple(weight.shape)}")
    if weight.dtype not in native.DTYPES:
        raise ValueError(f"sbt holds float32, float16, bfloat16 and int8, got {weight.dtype}; convert the weight first")
    if mask is not None and (mask.shape != weight.shape or mask.dtype != torch.bool):
        raise ValueError(f"sbt needs a bool mask of shape {tuple(weight.shape)}, got {mask.dtype} {tuple(mask.shape)}")
    if misfit := _scale_misfit(tuple(weight.shape), weight.dtype, scale):
        raise ValueError(misfit)
    if scale is not None and (weight == -128).any():
        raise ValueError("sbt holds int8 values from -127 to 127, got -128; clamp them")
    weight = weight.detach().contiguous()
    mask = None if mask is None else mask.to(weight.device).contiguous()
    route = _pack_native if native.load() is not None and weight.device.type == "cpu" else _pack_torch
    packed = route(weight, mask)
    return packed if scale is None else replace(packed, scale=scale.detach().to(weight.device).contiguous())


def _scale_misfit(shape: tuple[int, int], dtype: torch.dtype, scale: Tensor | None) -> str | None:
    """Why a scale does not fit the values, or None."""
    if dtype != torch.int8:
        return None if scale is None else f"only int8 values have a scale, got {dtype} with one"
    wanted = [(shape[0],), (shape[0], quantize.groups(shape[1], quantize.GROUP))]
    if scale is not None and scale.dtype == torch.float32 and tuple(scale.shape) in wanted:
        return None
    got = "none" if scale is None else f"{scale.dtype} {tuple(scale.shape)}"
    return f"int8 values of a weight {shape} need a float32 scale {wanted[0]} or {wanted[1]}, got {got}"


def _pack_native(weight: Tensor, mask: Tensor | None) -> Packed:
    module, (n, k), code = native.load(), weight.shape, native.DTYPES[weight.dtype]
    r, c = _tiles(weight.shape)
    words = torch.empty(r, c, WORDS, dtype=torch.int32)
    offsets = torch.empty(r * c + 1, dtype=torch.int32)
    keep = 0 if mask is None else mask.data_ptr()
    module.pack_mask(weight.data_ptr(), keep, n, k, code, words.data_ptr(), offsets.data_ptr())
    units = int(offsets[-1]) & 0xFFFFFFFF
    values = torch.empty(_length(units, weight.dtype), dtype=weight.dtype)
    values[units * UNIT :] = 0
    module.pack_values(weight.data_ptr(), n, k, code, words.data_ptr(), offsets.data_ptr(), values.data_ptr())
    return Packed(values, words, offsets, (n, k))


def _pack_torch(weight: Tensor, mask: Tensor | None) -> Packed:
    bits, device = _integers(weight), weight.device
    keep = (weight != 0) | weight.isnan() if mask is None else mask
    place = torch.ones(32, dtype=torch.int64, device=device) << torch.arange(32, device=device)
    words, counts, values = [], [], []
    for first, last in _chunks(weight.shape):
        tiles = _to_tiles(keep[first * ROWS : last * ROWS])  # [r, C, 32, 32] bool
        words.append((tiles.to(torch.int64) * place).sum(-1).to(torch.int32))
        count = tiles.sum((-2, -1)).flatten()  # [r * C]
        counts.append(_units(count, weight.dtype))
        ends = counts[-1].cumsum(0) * UNIT
        chunk = bits.new_zeros(int(ends[-1]))
        start = (ends - counts[-1] * UNIT) - (count.cumsum(0) - count)  # shift of a tile by the padding before it
        at = torch.arange(int(count.sum()), device=device) + start.repeat_interleave(count)
        chunk[at] = _to_tiles(bits[first * ROWS : last * ROWS])[tiles]
        values.append(chunk)
    ends = torch.cat(counts).cumsum(0)
    units = int(ends[-1])
    if units > 0xFFFFFFFF:
        raise ValueError("sbt holds at most 34e9 values in one weight")
    offsets = functional.pad(ends, (1, 0)).to(torch.int32)
    tail = bits.new_zeros(_length(units, weight.dtype) - units * UNIT)
    return Packed(torch.cat([*values, tail]).view(weight.dtype), torch.cat(words), offsets, tuple(weight.shape))


def unpack(packed: Packed) -> tuple[Tensor, Tensor]:
    """The dense weight [N, K], packed bits unchanged and +0 elsewhere, and its keep-mask, bool [N, K].

    int8 values come as the integers, without their scale. ValueError if the packed tensors disagree.
    """
    validate(packed, "unpack")
    module = native.load()
    if module is None or packed.device.type != "cpu":
        return unpack_torch(packed)
    weight = torch.empty(packed.shape, dtype=packed.dtype)
    kept = torch.empty(packed.shape, dtype=torch.bool)
    isa = next(name for name, missing in module.isas() if not missing)
    native.weight(packed, isa).expand(0, packed.shape[0], weight.data_ptr(), native.DTYPES[packed.dtype])
    module.unpack_mask(packed.mask.data_ptr(), *packed.shape, kept.data_ptr())
    return weight, kept


def unpack_torch(packed: Packed) -> tuple[Tensor, Tensor]:
    """`unpack` in torch alone, on any device: what the reference kernel stands on."""
    device, bits = packed.weight.device, _integers(packed.weight)
    starts = _unsigned(packed.offsets) * UNIT
    place = torch.arange(32, device=device)
    c = packed.mask.shape[1]
    weights, masks = [], []
    for first, last in _chunks(packed.shape):
        tiles = (packed.mask[first:last, :, :, None] >> place & 1).bool()  # [r, C, 32, 32]
        count = tiles.sum((-2, -1)).flatten()
        start = starts[first * c : last * c] - (count.cumsum(0) - count)
        at = torch.arange(int(count.sum()), device=device) + start.repeat_interleave(count)
        dense = bits.new_zeros(tiles.shape)
        dense[tiles] = bits[at]
        rows = (min(last * ROWS, packed.shape[0]) - first * ROWS, packed.shape[1])
        weights.append(_from_tiles(dense, rows))
        masks.append(_from_tiles(tiles, rows))
    return torch.cat(weights).view(packed.dtype), torch.cat(masks)


def dense(packed: Packed, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """The weight [N, K] as a dense layer holds it, int8 multiplied by its scale, and its keep-mask, bool [N, K].

    dtype: None keeps the bits of floats and gives float32 for int8. ValueError if the packed tensors disagree.
    """
    weight, kept = unpack(packed)
    if packed.scale is None:
        return weight.to(dtype or weight.dtype), kept
    return quantize.dequantize(weight, packed.scale, dtype or torch.float32), kept


def nbytes(shape: tuple[int, int], kept: int, dtype: torch.dtype, scales: int = 0) -> int:
    """Bytes that `kept` weights of a [N, K] weight never exceed: every tile may waste padding but for one value.

    scales: float32 numbers per row, for int8.
    """
    r, c = _tiles(shape)
    step = UNIT * _padded(dtype)
    values = min(kept + (step - 1) * r * c, r * c * ROWS * COLS)
    units = -(-values // step) * _padded(dtype)
    return _length(units, dtype) * dtype.itemsize + r * c * (WORDS + 1) * 4 + 4 + shape[0] * scales * 4


def kept(packed: Packed) -> int:
    """Weights that the mask keeps."""
    if native.load() is not None and packed.mask.device.type == "cpu":
        mask = packed.mask.contiguous()
        return native.load().count_bits(mask.data_ptr(), mask.numel())
    return int(popcount(packed.mask).sum())


def popcount(words: Tensor) -> Tensor:
    """Bits set in each int32, int64 of the same shape."""
    v = _unsigned(words)
    v = v - (v >> 1 & 0x55555555)
    v = (v & 0x33333333) + (v >> 2 & 0x33333333)
    v = (v + (v >> 4)) & 0x0F0F0F0F
    return v * 0x01010101 >> 24 & 0xFF


def validate(packed: Packed, name: str) -> None:
    """Nothing, if a kernel can trust the packed tensors; ValueError naming the layer and the disagreement if not."""
    for what, tensor in packed.tensors.items():
        if not tensor.is_contiguous() or tensor.device != packed.weight.device:
            raise ValueError(f"{name}: sbt needs contiguous tensors on one device, got {what} on {tensor.device}")
    if len(packed.shape) != 2 or min(packed.shape) < 1:
        raise ValueError(f"{name}: sbt needs the shape (N, K) of a weight, got {tuple(packed.shape)}")
    if packed.weight.dim() != 1 or packed.dtype not in native.DTYPES:
        raise ValueError(
            f"{name}: sbt needs 1-D values in float32, float16, bfloat16 or int8, "
            f"got {packed.dtype} {tuple(packed.weight.shape)}"
        )
    if misfit := _scale_misfit(packed.shape, packed.dtype, packed.scale):
        raise ValueError(f"{name}: {misfit}; the file is damaged or belongs to another model")
    r, c = _tiles(packed.shape)
    for what, tensor, wanted in (("mask", packed.mask, (r, c, WORDS)), ("offsets", packed.offsets, (r * c + 1,))):
        if tensor.dtype != torch.int32 or tuple(tensor.shape) != wanted:
            raise ValueError(
                f"{name}: an sbt weight {tuple(packed.shape)} needs an int32 {what} of shape {wanted}, "
                f"got {tensor.dtype} {tuple(tensor.shape)}; the file is damaged or belongs to another model"
            )
    fault, tile = _fault(packed)
    if fault:
        raise ValueError(f"{name}: {FAULTS[fault]} in tile {tile}; the file is damaged, fetch or pack it again")
    units = int(_unsigned(packed.offsets[-1]))
    if packed.weight.numel() * packed.dtype.itemsize < units * UNIT * packed.dtype.itemsize + TAIL:
        raise ValueError(
            f"{name}: the offsets need {_length(units, packed.dtype)} values, got {packed.weight.numel()}; "
            f"the file is cut short, fetch or pack it again"
        )


FAULTS = {  # csrc/cpu/pack.h
    1: "sbt offsets do not start at 0",
    2: "sbt offsets and mask disagree",
    3: "the sbt mask keeps weights outside the shape",
}


def _fault(packed: Packed) -> tuple[int, int]:
    """(code, tile) of the first fault of mask and offsets, (0, 0) if there is none."""
    if native.load() is not None and packed.weight.device.type == "cpu":
        return native.load().fault(
            packed.mask.data_ptr(), packed.offsets.data_ptr(), *packed.shape, native.DTYPES[packed.dtype]
        )
    offsets = _unsigned(packed.offsets)
    if offsets[0] != 0:
        return 1, 0
    units = _units(popcount(packed.mask).sum(-1).flatten(), packed.dtype)
    bad = torch.where(offsets.diff() != units, 2, 0)
    outside = _outside(packed).flatten()
    bad = torch.where((bad == 0) & outside, 3, bad)
    faults = bad.nonzero().flatten()
    return (int(bad[faults[0]]), int(faults[0])) if faults.numel() else (0, 0)


def _outside(packed: Packed) -> Tensor:
    """Whether the mask of a tile keeps weights past the last row or column, bool [R, C]; only tiles there can."""
    (n, k), words = packed.shape, _unsigned(packed.mask)
    place = torch.ones(32, dtype=torch.int64, device=packed.device) << torch.arange(32, device=packed.device)

    def allowed(rows: int, cols: int) -> Tensor:
        tile = _to_tiles(torch.ones((rows, cols), dtype=torch.bool, device=packed.device))[0, 0]  # [32, 32]
        return (tile.to(torch.int64) * place).sum(-1)

    found = torch.zeros(words.shape[:2], dtype=torch.bool, device=packed.device)
    found[:, -1] |= (words[:, -1] & ~allowed(ROWS, (k - 1) % COLS + 1)).any(-1)
    found[-1] |= (words[-1] & ~allowed((n - 1) % ROWS + 1, COLS)).any(-1)
    return found


FORMAT = Format("sbt", pack, unpack, dense, nbytes, kept, validate)
