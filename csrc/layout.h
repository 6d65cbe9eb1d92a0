// The byte layout of the packed formats, written once. No torch, no Python, no ISA: included everywhere.
#pragma once

#include <cstddef>
#include <cstdint>

namespace alphaprune {

// The numbers cross into Python (alphaprune/formats/native.py), so they are fixed.
enum class Dtype : int32_t { float32 = 0, float16 = 1, bfloat16 = 2, int8 = 3 };

constexpr int64_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : dtype == Dtype::int8 ? 1 : 2; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// SBT, "sub-tile bitmap". W[N, K] is cut into macro tiles of 16 rows x 64 columns, ordered [row tile][column tile], so
// that one thread streams every array forwards. A macro tile is 32 mask words in the order [step of 16 columns][pair
// of rows]; bit b of a word is row (b >> 4) of the pair, column (b & 15) of the step. Kept values follow in bit order;
// each macro tile is padded with zeros to a multiple of 8 values (16 where they are int8: 16 bytes either way), and its
// start is stored in units of 8 values.
//
// Why this shape: one word is one vpexpandw (32 x 16 bit) or two vpexpandd, its 16 columns are one vector of
// activations for both rows, and four words are the A operand of mma.m16n8k16 with consecutive columns per lane. Two
// words of int8 are one vpexpandb.
namespace sbt {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileCols = 64;
constexpr int64_t kStepCols = 16;                       // columns of one mask word
constexpr int64_t kPairs = kTileRows / 2;               // mask words per step
constexpr int64_t kSteps = kTileCols / kStepCols;       // steps per macro tile
constexpr int64_t kWords = kTileRows * kTileCols / 32;  // mask words per macro tile
constexpr int64_t kUnit = 8;                            // values per unit of `offsets`
constexpr int64_t kTailBytes = 64;                      // readable bytes past the last value: one vector

static_assert(kWords == kSteps * kPairs, "a word is two rows of one step");
static_assert(kWords * 32 == kTileRows * kTileCols, "one bit per weight");
constexpr int64_t kScaleCols = 128;  // columns that share a scale where a row has several

// Values that a macro tile is padded to.
constexpr int64_t pad_of(Dtype dtype) { return dtype == Dtype::int8 ? 16 : 8; }

static_assert(kUnit * 2 == 16 && pad_of(Dtype::int8) == 16, "values of 16 and of 8 bits start on 16 bytes");
static_assert(kScaleCols % kTileCols == 0, "a macro tile has one scale per row");

constexpr int64_t word_of(int64_t row, int64_t col) { return (col / kStepCols) * kPairs + row / 2; }
constexpr int64_t bit_of(int64_t row, int64_t col) { return (row % 2) * kStepCols + col % kStepCols; }

static_assert(word_of(0, 0) == 0 && bit_of(1, 3) == 19, "rows of a pair sit in the two halves of a word");
static_assert(word_of(15, 63) == 31 && bit_of(15, 63) == 31, "the last weight is the last bit");

// A packed weight as it lies in memory; nothing is owned.
struct View {
  const void* values;       // [8 * offsets[tiles] + tail], in `dtype`
  const uint32_t* mask;     // [row_tiles, col_tiles, 32]
  const uint32_t* offsets;  // [tiles + 1], units of 8 values
  int64_t rows;             // N
  int64_t cols;             // K
  Dtype dtype;
  const float* scale = nullptr;  // int8: [N, groups], W = value * scale; null for floats
  int64_t groups = 0;            // int8: 1, or ceil(K / 128); 0 for floats
  bool to_bytes = false;         // int8: activations may be rounded to 8 bits

  // Whether scales change along a row, so that they cannot wait until a row is summed.
  bool grouped() const { return groups > 1; }
  float scale_at(int64_t row, int64_t col) const { return scale[row * groups + (groups > 1 ? col / kScaleCols : 0)]; }
  int64_t row_tiles() const { return ceil_div(rows, kTileRows); }
  int64_t col_tiles() const { return ceil_div(cols, kTileCols); }
  int64_t padded_cols() const { return col_tiles() * kTileCols; }
};

}  // namespace sbt
}  // namespace alphaprune
