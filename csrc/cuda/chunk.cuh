// SBT's decoding, shared by its kernels: a warp takes kChunk neighbouring macro tiles of a row tile at a time. Their
// values come into shared memory by asynchronous copies; each mask word is stored beside the address of its first
// value, so that a lane finds its four weights of a sub-tile with one count of bits.
#pragma once

#include <type_traits>

#include "../layout.h"
#include "device.cuh"

namespace alphaprune::cuda {

constexpr int kChunk = 2;                             // macro tiles
constexpr int kChunkCols = kChunk * sbt::kTileCols;   // columns
constexpr int kChunkSteps = kChunk * sbt::kSteps;     // steps of 16 columns
constexpr int kUnitBytes = 16;                        // of an asynchronous copy
constexpr int kMetaBytes = kChunk * sbt::kWords * 8;  // {mask word, address} for each word
constexpr int kStepMeta = sbt::kPairs * 8;

static_assert(kChunk * sbt::kWords == 2 * kWarp, "a lane holds two neighbouring mask words");

// What the size of a value, 4 bytes, 2 or 1, makes of a chunk of kTiles macro tiles.
template <int kBytes, int kTiles = kChunk>
struct Values {
  static constexpr int kOffsetBytes = sbt::kUnit * kBytes;  // of the 8 values that an offset counts
  // Offsets that a unit of a copy has, or units that an offset has.
  static constexpr int kUnitOffsets = kOffsetBytes > kUnitBytes ? 1 : kUnitBytes / kOffsetBytes;
  static constexpr int kOffsetUnits = kOffsetBytes > kUnitBytes ? kOffsetBytes / kUnitBytes : 1;
  static constexpr int kMostUnits = kTiles * 16 * 64 * kBytes / kUnitBytes;
  // Added to addresses, so that the copies' offsets fit into their 12 signed bits.
  static constexpr int kBias = kMostUnits * kUnitBytes / 2;
};

// Where the values of a chunk's macro tiles lie, in units of 8 values.
struct Chunk {
  uint32_t first, middle, last;
};

// What a warp walks along: the macro tiles of one row tile, a chunk of every `stride` macro tiles, and those of row
// tiles behind it side by side.
template <bool kWhole, int kTiles = kChunk>
struct Row {
  using Words = std::conditional_t<kTiles == 1, uint32_t, uint2>;  // that a lane has of a chunk
  static constexpr int kTileLanes = kWarp / kTiles;                // which have a macro tile
  const Words* mask;            // of this lane in the chunk whose mask is loaded next
  const uint32_t* offsets;      // of the first macro tile of the chunk whose offsets are loaded next
  int mask_left, offsets_left;  // macro tiles from there on; 0 or less past the last row tile
  int stride;

  // From macro tile `first` on; `left` of them are there.
  ALPHAPRUNE_DEVICE void start(const uint32_t* masks, const uint32_t* all_offsets, size_t first, int left, int lane,
                               int further = kTiles) {
    stride = further;
    mask = reinterpret_cast<const Words*>(masks + first * sbt::kWords) + lane;
    offsets = all_offsets + first;
    mask_left = left - lane / kTileLanes;
    offsets_left = left;
  }

  // Tiles past the last one are empty, and all of those `apart` macro tiles behind where they are not there. Where all
  // chunks are whole, past the last chunk nothing is asked for.
  ALPHAPRUNE_DEVICE void offsets_of(Chunk& to, int apart = 0, bool there = true) const {
    const auto at = [&](int tile) {
      return kWhole ? tile : !there ? 0 : apart + (tile <= offsets_left ? tile : offsets_left);
    };
    to.first = load_cached(offsets + at(0));
    to.middle = load_cached(offsets + at(1));
    to.last = kTiles == 1 ? to.middle : load_cached(offsets + at(2));
  }
  ALPHAPRUNE_DEVICE Words mask_of(int apart = 0, bool there = true) const {
    Words words{};
    if (kWhole || (there && mask_left > 0)) words = load_once(mask + apart * kTileLanes);
    return words;
  }
  // The lane's words of a chunk whose words lie in shared memory.
  static ALPHAPRUNE_DEVICE Words load(uint32_t from, int lane) {
    if constexpr (kTiles == 1) {
      return load_shared_u32(from + lane * 4);
    } else {
      return load_shared_u64(from + lane * 8);
    }
  }
  ALPHAPRUNE_DEVICE void pass_offsets() {
    offsets += stride;
    offsets_left -= stride;
  }
  ALPHAPRUNE_DEVICE void pass_mask() {
    mask += stride * kTileLanes;
    mask_left -= stride;
  }
};

// Copies `kCount` times 32 units, from the kFirst-th on. left: offsets behind this lane's first unit, or units where an
// offset has several.
template <class Of, int kFirst, int kCount>
ALPHAPRUNE_DEVICE void copy_units(uint32_t to, const unsigned char* from, int left) {
  if constexpr (kCount > 0) {
    copy_async<kFirst * kWarp * kUnitBytes - Of::kBias, kFirst * kWarp * Of::kUnitOffsets>(to, from, left);
    copy_units<Of, kFirst + 1, kCount - 1>(to, from, left);
  }
}

// Starts the copy of a chunk's values to `to`; what follows must commit.
template <int kBytes, int kTiles = kChunk>
ALPHAPRUNE_DEVICE void copy_values(const void* values, uint32_t first, uint32_t last, uint32_t to, int lane) {
  using Of = Values<kBytes, kTiles>;
  const auto* from = static_cast<const unsigned char*>(values) +
                     (static_cast<size_t>(first) * Of::kOffsetUnits + lane * Of::kUnitOffsets) *
                         (Of::kOffsetBytes / Of::kOffsetUnits) +
                     Of::kBias;
  const int left = static_cast<int>((last - first) * Of::kOffsetUnits) - lane * Of::kUnitOffsets;
  to += lane * kUnitBytes + Of::kBias;
  // As far as 3/4 of the weights are kept without a branch: instructions that are switched off cost less than a loop.
  constexpr int kAll = Of::kMostUnits / kWarp, kStraight = kAll * 3 / 4;
  copy_units<Of, 0, kStraight>(to, from, left);
  if ((last - first) * Of::kOffsetUnits > kStraight * kWarp * Of::kUnitOffsets)
    copy_units<Of, kStraight, kAll - kStraight>(to, from, left);
}

// Neighbouring pairs change places in every other two steps, so that what one store writes is in different banks.
ALPHAPRUNE_DEVICE constexpr uint32_t swap_of(int step) { return step / 2 % 2 * 16; }

// Stores the mask words 2 * lane and 2 * lane + 1 of a chunk with the addresses of their values, `start` and the next
// one's `bytes0` further on. Of a step, the words of one pair of rows and of the pair 8 rows below are neighbours, so
// that one load gives a lane both.
ALPHAPRUNE_DEVICE void store_words(uint2 mask, uint32_t start, uint32_t bytes0, uint32_t meta, int lane) {
  // Word 2 * lane: step lane / 4, half lane / 2 % 2, pair 2 * (lane % 2) of the half.
  const uint32_t to = lane / 4 * kStepMeta + (lane % 2 * 32 ^ swap_of(lane / 4)) + lane / 2 % 2 * 8;
  store_shared_u64(meta + to, {mask.x, start});
  store_shared_u64(meta + (to ^ 16), {mask.y, start + bytes0});
}
// The same of a chunk whose values start at `values`.
template <int kBytes>
ALPHAPRUNE_DEVICE void store_meta(uint2 mask, uint32_t first_tile_bytes, uint32_t values, uint32_t meta, int lane) {
  const uint32_t bytes0 = kBytes * popcount(mask.x), bytes = bytes0 + kBytes * popcount(mask.y);
  const uint32_t before = scan_inclusive<kWarp / kChunk>(bytes) - bytes;
  store_words(mask, values + before + (lane >= kWarp / kChunk ? first_tile_bytes : 0), bytes0, meta, lane);
}
// The same of a chunk of one macro tile, of which a lane has a word.
template <int kBytes>
ALPHAPRUNE_DEVICE void store_meta(uint32_t mask, uint32_t, uint32_t values, uint32_t meta, int lane) {
  const uint32_t bytes = kBytes * popcount(mask), before = scan_inclusive<kWarp>(bytes) - bytes;
  const int pair = lane % static_cast<int>(sbt::kPairs);
  store_shared_u64(meta + lane / static_cast<int>(sbt::kPairs) * kStepMeta + pair % 4 * 16 + pair / 4 * 8,
                   {mask, values + before});
}

// What a lane does with the words of every step: its weights become the operand a of mma.m16n8k16, with the step's
// columns 4t … 4t + 3 in the places 2t, 2t + 1, 2t + 8 and 2t + 9 of k: they are neighbours, and so are the activations
// that the lane needs for b.
struct LaneBase {
  static constexpr int kMacroTiles = kChunk;  // of a chunk
  static constexpr int kProducts = 1;         // of 16 columns, in a step
  uint32_t pair, below;
  // Numbers shuffled from the lane itself are numbers that the compiler keeps, instead of computing them in the loop.
  explicit ALPHAPRUNE_DEVICE LaneBase(int lane) : pair(lane / 8 * 16), below(shuffle((1u << lane % 8 * 4) - 1, lane)) {}

  // The words of this lane's rows in a step of a chunk, and where their values start.
  ALPHAPRUNE_DEVICE uint4 words(uint32_t meta, int step) const {
    return load_shared_u128(meta + step * kStepMeta + (pair ^ swap_of(step)));
  }
};

// Of values that are loaded one by one.
struct FourLane : LaneBase {
  static constexpr uint32_t kTableBytes = 0, kBeyond = 0;
  uint32_t bits[4];
  Opaque number;

  ALPHAPRUNE_DEVICE FourLane(int lane, Opaque numbers) : LaneBase(lane), number(numbers) {
    ALPHAPRUNE_UNROLL
    for (int i = 0; i < 4; ++i) bits[i] = shuffle(1u << (lane % 8 * 4 + i), lane);
  }

 protected:
  // Of the words of both rows, and where the lane's values of kBytes start.
  template <int kBytes>
  ALPHAPRUNE_DEVICE void find(const uint4& words, uint32_t (&mask)[2], uint32_t (&start)[2]) const {
    mask[0] = words.x, mask[1] = words.z;
    start[0] = words.y + kBytes * popcount(words.x & below);
    start[1] = words.w + kBytes * popcount(words.z & below);
  }
};

// Of 16-bit floats.
struct FloatLane : FourLane {
  static constexpr int kBytes = 2;
  uint32_t spare[4] = {};

  ALPHAPRUNE_DEVICE FloatLane(int lane, Opaque numbers, uint32_t = 0) : FourLane(lane, numbers) {}
  ALPHAPRUNE_DEVICE void decode(const uint4& words, uint32_t (&a)[1][4]) {
    uint32_t mask[2], start[2];
    find<kBytes>(words, mask, start);
    expand(mask, bits, start, number, spare, a[0]);
  }
};

// Of pairs of neighbouring 16-bit floats of which at least one is kept, with zeros where the other is not: the packed
// matrix has half of the columns, a bit for each pair. A pair is a register of the operand a as it lies in memory. Of a
// step of 16 pairs a lane has four of a row, t, t + 4, t + 8 and t + 12, which are neighbours in the packed matrix: two
// of each product, as the operand a has them, so that x stays as it is.
struct PairLane : FourLane {
  static constexpr int kMacroTiles = 1, kProducts = 2, kBytes = 4;

  ALPHAPRUNE_DEVICE PairLane(int lane, Opaque numbers, uint32_t = 0) : FourLane(lane, numbers) {}
  ALPHAPRUNE_DEVICE uint4 words(uint32_t meta, int step) const {
    return load_shared_u128(meta + step * kStepMeta + pair);
  }
  ALPHAPRUNE_DEVICE void decode(const uint4& words, uint32_t (&a)[2][4]) {
    uint32_t mask[2], start[2];
    find<kBytes>(words, mask, start);
    expand_words(mask, bits, start, number, a);
  }
};

// Of 8-bit integers n, as floats n / kFactor for activations in `Value`. Of the four weights of a word the lane loads
// the bytes of the kept ones together. A table says for each of the 16 sets of kept ones which byte goes where; with
// n's sign bit turned over, a byte below the upper byte of kZero is a float in a straight line with all others:
//   bfloat16  0x00 (n + 128) is (n + 128) · 2⁻¹³³, subnormal below 128; times 2¹²⁷ minus 2 it is n / 64
//   float16   0x64 (n + 128) is 1024 + n + 128; minus 1152 it is n
// so that one multiply-add makes two weights, exactly.
template <class Value>
struct IntegerLane : LaneBase {
  static constexpr bool kBfloat = Value::code == Bfloat16::code;
  static constexpr int kBytes = 1;
  static constexpr uint32_t kTableBytes = 16 * 8;  // at a multiple of its size
  static constexpr uint32_t kBeyond = 16;          // bytes that must be there past the last value
  static constexpr float kFactor = kBfloat ? 64.0f : 1.0f;
  static constexpr uint32_t kSigns = 0x80808080u, kZero = kBfloat ? 0x0080u : 0x6480u;
  static constexpr uint32_t kTimes = kBfloat ? 0x7f007f00u : 0x3c003c00u, kPlus = kBfloat ? 0xc000c000u : 0xe480e480u;
  uint32_t turn, table;

  ALPHAPRUNE_DEVICE IntegerLane(int lane, Opaque, uint32_t table_at)
      : LaneBase(lane), turn(shuffle((lane % 8 * 4 + 29) % 32, lane)), table(table_at) {}

  // Of each set two selectors, of the lower and of the upper two weights: bytes 0 to 3 are the kept ones, 4 and 5 those
  // of kZero.
  static ALPHAPRUNE_DEVICE void fill(uint32_t table, int lane) {
    const uint32_t set = lane / 2;
    uint32_t selector = 0x5050u;
    ALPHAPRUNE_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int place = lane % 2 * 2 + i;
      selector |= (set >> place & 1 ? popcount(set & ((1u << place) - 1)) : 4u) << 8 * i;
    }
    store_shared_u32(table + lane * 4, selector);
  }
  ALPHAPRUNE_DEVICE void decode(const uint4& words, uint32_t (&a)[1][4]) const {
    four(words.x, words.y, a[0][0], a[0][2]);
    four(words.z, words.w, a[0][1], a[0][3]);
  }

 private:
  ALPHAPRUNE_DEVICE void four(uint32_t mask, uint32_t start, uint32_t& low, uint32_t& high) const {
    const uint32_t set = rotate_right(mask, turn) & 0x78u;  // the lane's four bits, times 8
    const uint2 selectors = load_shared_u64(table | set);
    const uint32_t bytes = load_shared_bytes(start + popcount(mask & below), popcount(set)) ^ kSigns;
    low = fma_pair<Value>(pick_bytes(bytes, kZero, selectors.x), kTimes, kPlus);
    high = fma_pair<Value>(pick_bytes(bytes, kZero, selectors.y), kTimes, kPlus);
  }
};

}  // namespace alphaprune::cuda
