#include "pack.h"

#include <atomic>
#include <cstring>
#include <type_traits>

#include "dispatch.h"

namespace alphaprune {
namespace {

int64_t popcount(uint64_t v) {  // portable: the baseline has no POPCNT
  v -= (v >> 1) & 0x5555555555555555u;
  v = (v & 0x3333333333333333u) + ((v >> 2) & 0x3333333333333333u);
  v = (v + (v >> 4)) & 0x0f0f0f0f0f0f0f0fu;
  return static_cast<int64_t>((v * 0x0101010101010101u) >> 56);
}

int64_t units(const uint32_t* mask, Dtype dtype) {
  const int64_t pad = sbt::pad_of(dtype);
  return ceil_div(count_bits(mask, sbt::kWords), pad) * (pad / sbt::kUnit);
}

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Shifting out the sign of a float leaves zero for +0 and -0 only.
bool is_nonzero(uint32_t bits) { return bits << 1 != 0; }
bool is_nonzero(uint16_t bits) { return (bits & 0x7fffu) != 0; }
bool is_nonzero(uint8_t integer) { return integer != 0; }

// Calls work with a null pointer to the unsigned integer that has the size of `dtype`.
template <class Work>
void by_size(Dtype dtype, Work work) {
  if (dtype == Dtype::float32) return work(static_cast<uint32_t*>(nullptr));
  if (dtype == Dtype::int8) return work(static_cast<uint8_t*>(nullptr));
  work(static_cast<uint16_t*>(nullptr));
}

template <class T>
void mask_of_tile(const T* weight, const uint8_t* keep, int64_t rows, int64_t cols, int64_t row0, int64_t col0,
                  uint32_t* mask) {
  for (int64_t w = 0; w < sbt::kWords; ++w) mask[w] = 0;
  const int64_t row_end = least(sbt::kTileRows, rows - row0);
  for (int64_t row = 0; row < row_end; ++row) {
    const int64_t at = (row0 + row) * cols + col0;
    for (int64_t step = 0; step < sbt::kSteps; ++step) {
      const int64_t col = step * sbt::kStepCols;
      const int64_t here = least(sbt::kStepCols, cols - col0 - col);
      uint32_t bits = 0;
      for (int64_t i = 0; i < here; ++i) {
        const bool kept = keep ? keep[at + col + i] != 0 : is_nonzero(weight[at + col + i]);
        bits |= static_cast<uint32_t>(kept) << i;
      }
      mask[sbt::word_of(row, col)] |= bits << sbt::bit_of(row, 0);
    }
  }
}

template <class T>
void values_of_tile(const T* weight, int64_t cols, int64_t row0, int64_t col0, const uint32_t* mask, T* values,
                    T* values_end) {
  for (int64_t w = 0; w < sbt::kWords; ++w) {
    const T* pair = weight + (row0 + w % sbt::kPairs * 2) * cols + col0 + w / sbt::kPairs * sbt::kStepCols;
    for (uint32_t bits = mask[w]; bits; bits &= bits - 1) {
      const int bit = __builtin_ctz(bits);
      *values++ = pair[(bit / sbt::kStepCols) * cols + bit % sbt::kStepCols];
    }
  }
  while (values < values_end) *values++ = 0;
}

// Bits of word w that lie inside a tile of which only `rows` x `cols` belong to the weight.
uint32_t inside(int64_t w, int64_t rows, int64_t cols) {
  const int64_t row = w % sbt::kPairs * 2, left = cols - w / sbt::kPairs * sbt::kStepCols;
  if (left <= 0 || row >= rows) return 0;
  const uint32_t columns = left >= sbt::kStepCols ? 0xffffu : (1u << left) - 1;
  return columns | (row + 1 < rows ? columns << sbt::kStepCols : 0);
}

}  // namespace

int64_t count_bits(const uint32_t* words, int64_t count) {
  int64_t bits = 0;
  int64_t i = 0;
  for (; i + 2 <= count; i += 2) {
    uint64_t two;
    std::memcpy(&two, words + i, 8);
    bits += popcount(two);
  }
  return i < count ? bits + popcount(words[i]) : bits;
}

bool pack_mask(const void* weight, const uint8_t* keep, int64_t rows, int64_t cols, Dtype dtype, uint32_t* mask,
               uint32_t* offsets) {
  const int64_t row_tiles = ceil_div(rows, sbt::kTileRows), col_tiles = ceil_div(cols, sbt::kTileCols);
  parallel_for(row_tiles, threads_for(rows * cols), [&](int64_t r) {
    for (int64_t c = 0; c < col_tiles; ++c) {
      const int64_t tile = r * col_tiles + c, row0 = r * sbt::kTileRows, col0 = c * sbt::kTileCols;
      uint32_t* words = mask + tile * sbt::kWords;
      by_size(dtype, [&](auto* type) {
        mask_of_tile(static_cast<const std::remove_pointer_t<decltype(type)>*>(weight), keep, rows, cols, row0, col0,
                     words);
      });
      offsets[tile + 1] = static_cast<uint32_t>(units(words, dtype));
    }
  });
  uint64_t total = 0;
  offsets[0] = 0;
  for (int64_t tile = 1; tile <= row_tiles * col_tiles; ++tile) {
    total += offsets[tile];
    offsets[tile] = static_cast<uint32_t>(total);
  }
  return total <= UINT32_MAX;
}

void pack_values(const void* weight, int64_t rows, int64_t cols, Dtype dtype, const uint32_t* mask,
                 const uint32_t* offsets, void* values) {
  const int64_t row_tiles = ceil_div(rows, sbt::kTileRows), col_tiles = ceil_div(cols, sbt::kTileCols);
  parallel_for(row_tiles, threads_for(rows * cols), [&](int64_t r) {
    for (int64_t c = 0; c < col_tiles; ++c) {
      const int64_t tile = r * col_tiles + c, row0 = r * sbt::kTileRows, col0 = c * sbt::kTileCols;
      const int64_t begin = static_cast<int64_t>(offsets[tile]) * sbt::kUnit;
      const int64_t end = static_cast<int64_t>(offsets[tile + 1]) * sbt::kUnit;
      const uint32_t* words = mask + tile * sbt::kWords;
      by_size(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        auto* to = static_cast<T*>(values);
        values_of_tile(static_cast<const T*>(weight), cols, row0, col0, words, to + begin, to + end);
      });
    }
  });
}

void unpack_mask(const uint32_t* mask, int64_t rows, int64_t cols, uint8_t* keep) {
  const int64_t col_tiles = ceil_div(cols, sbt::kTileCols);
  parallel_for(ceil_div(rows, sbt::kTileRows), threads_for(rows * cols), [&](int64_t r) {
    for (int64_t row = r * sbt::kTileRows; row < least((r + 1) * sbt::kTileRows, rows); ++row) {
      uint8_t* to = keep + row * cols;
      for (int64_t col = 0; col < cols; col += sbt::kStepCols) {
        const uint32_t* words = mask + (r * col_tiles + col / sbt::kTileCols) * sbt::kWords;
        const int64_t in_row = row % sbt::kTileRows, in_col = col % sbt::kTileCols;
        const uint32_t bits = words[sbt::word_of(in_row, in_col)] >> sbt::bit_of(in_row, in_col);
        for (int64_t i = 0; i < least(sbt::kStepCols, cols - col); ++i) to[col + i] = bits >> i & 1;
      }
    }
  });
}

Finding check(const uint32_t* mask, const uint32_t* offsets, int64_t rows, int64_t cols, Dtype dtype) {
  if (offsets[0] != 0) return {Fault::start, 0};
  const int64_t row_tiles = ceil_div(rows, sbt::kTileRows), col_tiles = ceil_div(cols, sbt::kTileCols);
  // The lowest faulty tile wins whatever thread finds it, so the message is the same in every run.
  std::atomic<int64_t> first{INT64_MAX};
  parallel_for(row_tiles, threads_for(rows * cols / 8), [&](int64_t r) {
    for (int64_t c = 0; c < col_tiles; ++c) {
      const int64_t tile = r * col_tiles + c;
      const uint32_t* words = mask + tile * sbt::kWords;
      Fault fault = Fault::none;
      const int64_t row_end = least(sbt::kTileRows, rows - r * sbt::kTileRows);
      const int64_t col_end = least(sbt::kTileCols, cols - c * sbt::kTileCols);
      if (row_end < sbt::kTileRows || col_end < sbt::kTileCols)
        for (int64_t w = 0; w < sbt::kWords; ++w)
          if (words[w] & ~inside(w, row_end, col_end)) fault = Fault::outside;
      if (static_cast<int64_t>(offsets[tile + 1]) - static_cast<int64_t>(offsets[tile]) != units(words, dtype))
        fault = Fault::count;
      if (fault == Fault::none) continue;
      const int64_t found = tile * 4 + static_cast<int64_t>(fault);
      for (int64_t seen = first; found < seen && !first.compare_exchange_weak(seen, found);) {
      }
      return;
    }
  });
  if (first == INT64_MAX) return {Fault::none, 0};
  return {static_cast<Fault>(first % 4), first / 4};
}

}  // namespace alphaprune
