// Dense -> SBT and the checks of packed data, in portable C++.
#pragma once

#include <cstdint>

#include "../layout.h"

namespace alphaprune {

// Mask words [R, C, 32] and offsets [R * C + 1] of a dense weight [rows, cols]. `keep` is one byte per weight, or null:
// then every value but +0 and -0 is kept. False if the offsets do not fit 32 bits.
bool pack_mask(const void* weight, const uint8_t* keep, int64_t rows, int64_t cols, Dtype dtype, uint32_t* mask,
               uint32_t* offsets);

// Values [8 * offsets[R * C]] in the order of the mask, each tile padded with zeros.
void pack_values(const void* weight, int64_t rows, int64_t cols, Dtype dtype, const uint32_t* mask,
                 const uint32_t* offsets, void* values);

// The keep-mask, one byte per weight [rows, cols].
void unpack_mask(const uint32_t* mask, int64_t rows, int64_t cols, uint8_t* keep);

enum class Fault : int32_t { none = 0, start = 1, count = 2, outside = 3 };

struct Finding {
  Fault fault;
  int64_t tile;
};

// The first tile whose offsets do not say what its mask says, or which keeps a weight outside [rows, cols]. Reads mask
// and offsets only.
Finding check(const uint32_t* mask, const uint32_t* offsets, int64_t rows, int64_t cols, Dtype dtype);

// Bits set.
int64_t count_bits(const uint32_t* words, int64_t count);

}  // namespace alphaprune
