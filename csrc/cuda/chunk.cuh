// SBT's decoding, shared by its kernels: a warp takes kChunk neighbouring macro tiles of a row tile at a time. Their
// values come into shared memory by asynchronous copies; each mask word is stored beside the address of its first
// value, so that a lane finds its four weights of a sub-tile with one count of bits.
#pragma once

#include "../layout.h"
#include "device.cuh"

namespace alphaprune::cuda {

constexpr int kChunk = 2;                             // macro tiles
constexpr int kChunkCols = kChunk * sbt::kTileCols;   // columns
constexpr int kChunkSteps = kChunk * sbt::kSteps;     // steps of 16 columns
constexpr int kUnitBytes = 16;                        // of the 8 values that an offset counts
constexpr int kMetaBytes = kChunk * sbt::kWords * 8;  // {mask word, address} for each word
constexpr int kMostUnits = kChunk * 16 * 64 * 2 / kUnitBytes;
constexpr int kStepMeta = sbt::kPairs * 8;
constexpr int kBias = kMostUnits * kUnitBytes / 2;  // so that the copies' offsets fit into their 12 signed bits

static_assert(kChunk * sbt::kWords == 2 * kWarp, "a lane holds two neighbouring mask words");

// Where the values of a chunk's macro tiles lie, in units of 8 values.
struct Chunk {
  uint32_t first, middle, last;
};

// What a warp walks along: the macro tiles of one row tile, a chunk at a time.
template <bool kWhole>
struct Row {
  const uint2* mask;            // of this lane in the chunk whose mask is loaded next
  const uint32_t* offsets;      // of the first macro tile of the chunk whose offsets are loaded next
  int mask_left, offsets_left;  // macro tiles from there on; 0 or less past the last row tile

  // From macro tile `first` on; `left` of them are there.
  ALPHAPRUNE_DEVICE void start(const uint32_t* masks, const uint32_t* all_offsets, size_t first, int left, int lane) {
    mask = reinterpret_cast<const uint2*>(masks + first * sbt::kWords) + lane;
    offsets = all_offsets + first;
    mask_left = left - lane / (kWarp / kChunk);
    offsets_left = left;
  }

  // Tiles past the last one are empty. Where all chunks are whole, past the last chunk nothing is asked for.
  ALPHAPRUNE_DEVICE void next_offsets(Chunk& to) {
    to.first = load_cached(offsets + at(0));
    to.middle = load_cached(offsets + at(1));
    to.last = load_cached(offsets + at(2));
    offsets += kChunk;
    offsets_left -= kChunk;
  }
  ALPHAPRUNE_DEVICE uint2 next_mask() {
    uint2 words{0, 0};
    if (kWhole || mask_left > 0) words = load_once(mask);
    mask += kWarp;
    mask_left -= kChunk;
    return words;
  }

 private:
  ALPHAPRUNE_DEVICE int at(int tile) const { return kWhole || tile <= offsets_left ? tile : offsets_left; }
};

// Copies `kCount` times 32 units, from the kFirst-th on.
template <int kFirst, int kCount>
ALPHAPRUNE_DEVICE void copy_units(uint32_t to, const unsigned char* from, int left) {
  if constexpr (kCount > 0) {
    copy_async<kFirst * kWarp * kUnitBytes - kBias, kFirst * kWarp>(to, from, left);
    copy_units<kFirst + 1, kCount - 1>(to, from, left);
  }
}

// Starts the copy of a chunk's values to `to`; what follows must commit.
ALPHAPRUNE_DEVICE void copy_values(const uint16_t* values, uint32_t first, uint32_t last, uint32_t to, int lane) {
  const auto* from =
      reinterpret_cast<const unsigned char*>(values) + (static_cast<size_t>(first) + lane) * kUnitBytes + kBias;
  const int left = static_cast<int>(last - first) - lane;
  to += lane * kUnitBytes + kBias;
  // As far as 3/4 of the weights are kept without a branch: instructions that are switched off cost less than a loop.
  constexpr int kAll = kMostUnits / kWarp, kStraight = kAll * 3 / 4;
  copy_units<0, kStraight>(to, from, left);
  if (last - first > kStraight * kWarp) copy_units<kStraight, kAll - kStraight>(to, from, left);
}

// Neighbouring pairs change places in every other two steps, so that what one store writes is in different banks.
ALPHAPRUNE_DEVICE constexpr uint32_t swap_of(int step) { return step / 2 % 2 * 16; }

// Stores the mask words 2 * lane and 2 * lane + 1 of a chunk with the addresses of their values, which start at
// `values`. Of a step, the words of one pair of rows and of the pair 8 rows below are neighbours, so that one load
// gives a lane both.
ALPHAPRUNE_DEVICE void store_meta(uint2 mask, uint32_t first_tile_bytes, uint32_t values, uint32_t meta, int lane) {
  const uint32_t bytes0 = 2 * popcount(mask.x), bytes = bytes0 + 2 * popcount(mask.y);
  const uint32_t before = scan_inclusive<kWarp / kChunk>(bytes) - bytes;
  const uint32_t start = values + before + (lane >= kWarp / 2 ? first_tile_bytes : 0);
  // Word 2 * lane: step lane / 4, half lane / 2 % 2, pair 2 * (lane % 2) of the half.
  const uint32_t to = lane / 4 * kStepMeta + (lane % 2 * 32 ^ swap_of(lane / 4)) + lane / 2 % 2 * 8;
  store_shared_u64(meta + to, {mask.x, start});
  store_shared_u64(meta + (to ^ 16), {mask.y, start + bytes0});
}

// Where a lane finds its part of every sub-tile.
struct Lane {
  uint32_t pair, below, bits[4], spare[4] = {};
  Opaque number;
  // Numbers shuffled from the lane itself are numbers that the compiler keeps, instead of computing them in the loop.
  ALPHAPRUNE_DEVICE Lane(int lane, Opaque numbers)
      : pair(lane / 8 * 16), below(shuffle((1u << lane % 8 * 4) - 1, lane)), number(numbers) {
    ALPHAPRUNE_UNROLL
    for (int i = 0; i < 4; ++i) bits[i] = shuffle(1u << (lane % 8 * 4 + i), lane);
  }

  // The words of this lane's rows in a step of a chunk, and where their values start.
  ALPHAPRUNE_DEVICE uint4 words(uint32_t meta, int step) const {
    return load_shared_u128(meta + step * kStepMeta + (pair ^ swap_of(step)));
  }

  // The operand a of mma.m16n8k16 for a step, with the step's columns 4t … 4t + 3 in the places 2t, 2t + 1, 2t + 8 and
  // 2t + 9 of k: a lane's weights are neighbours, and so are the activations that it needs for b.
  ALPHAPRUNE_DEVICE void decode(const uint4& words, uint32_t (&a)[4]) {
    const uint32_t mask[2] = {words.x, words.z};
    const uint32_t start[2] = {words.y + 2 * popcount(words.x & below), words.w + 2 * popcount(words.z & below)};
    expand(mask, bits, start, number, spare, a);
  }
};

}  // namespace alphaprune::cuda
