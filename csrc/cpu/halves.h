// The product of 4 to 6 tokens on AVX-512 straight from the expanded registers, which have room for the sums of half of
// the rows: one half after the other, some tiles at a time, so that the second finds the values in L1. The first half
// notes where the values of the second one are. The sums are those of Panel, bit for bit.
#pragma once

#include <algorithm>

#include "block.h"

namespace alphaprune {
namespace {

// `Math` as Block has it; Asks: see ahead.h.
template <class Math, class Asks>
struct Halves {
  using Of = Block<Math>;
  using Value = typename Math::Value;
  static constexpr int64_t kTiles = 8;  // at a time
  using Places = const Value * [kTiles * sbt::kSteps];

  // A group of the rows of a tile. places: of each step, where the values of its second group begin.
  template <int T, int kSecond, bool kNarrow>
  __attribute__((always_inline)) static inline void tile(const Value* value, const Value** places, const uint32_t* mask,
                                                         const uint16_t* x, int64_t x_stride,
                                                         typename Of::template Sums<T>& sum, Asks& asks) {
    asks.apart();
    asm volatile("" : "+r"(value), "+r"(mask));
#pragma GCC unroll 4
    for (int s = 0; s < sbt::kSteps; ++s, mask += sbt::kPairs, x += sbt::kStepCols) {
      __m512i w[Of::kGroup];
      if (kSecond) value = places[s];
#pragma GCC unroll 2
      for (int i = 0; i < Of::kGroup; i += 2) {
        const int word = kSecond * Of::kGroup + i;
        asks.word(word, value);
        asks.word(word + 1, value);
        Math::template two<kNarrow>(value, mask + word, w + i);
      }
      if (!kSecond) {
        places[s] = value;
#pragma GCC unroll 2
        for (int i = Of::kGroup; i < sbt::kPairs; i += 2) {
          const Kept kept(mask + i);
          value += kept.of[0] + kept.of[1];
        }
      }
      Of::template step<T>(w, x, x_stride, sum);
    }
  }

  // A group of the rows of some tiles.
  template <int T, int kSecond>
  __attribute__((noinline)) static void some(const sbt::View& weight, int64_t first, int64_t tiles, const Of& block,
                                             const Value** places) {
    typename Of::template Sums<T> sum;
    block.template begin<T>(kSecond, sum);
    const uint32_t* mask = weight.mask + first * sbt::kWords;
    const uint16_t* x = block.x;
    for (int64_t i = first; i < first + tiles; ++i) {
      const Value* value = tile_values<Value>(weight, i);
      Asks asks;
      asks.start(mask, value, (tile_values<Value>(weight, i + 1) - value) * static_cast<int64_t>(sizeof(Value)),
                 kSecond);
      if (Math::narrow(mask)) {
        tile<T, kSecond, true>(value, places, mask, x, block.x_stride, sum, asks);
      } else {
        tile<T, kSecond, false>(value, places, mask, x, block.x_stride, sum, asks);
      }
      mask += sbt::kWords;
      x += sbt::kTileCols;
      places += sbt::kSteps;
    }
    block.template end<T>(kSecond, sum);
  }

  template <int T>
  static void product_of(const Product& p, int64_t begin, int64_t end, void* scratch) {
    auto* sums = static_cast<float*>(scratch);
    const int64_t tiles = p.weight.col_tiles();
    Places places;
    for (int64_t row_tile = begin; row_tile < end; ++row_tile) {
      Of block{static_cast<const uint16_t*>(p.x), p.x_stride, true, false, sums, sums + T * Of::kSums};
      for (int64_t first = 0; first < tiles; first += kTiles) {
        const int64_t width = std::min(kTiles, tiles - first);
        block.last = first + width == tiles;
        some<T, 0>(p.weight, row_tile * tiles + first, width, block, places);
        some<T, 1>(p.weight, row_tile * tiles + first, width, block, places);
        block.fresh = false;
        block.x += width * sbt::kTileCols;
      }
      block.finish(p, row_tile, 0, T);
    }
  }

  // p.tokens: from Fewest to Most.
  template <int Fewest, int Most>
  static void product(const Product& p, int64_t begin, int64_t end, void* scratch) {
    known<Fewest, Most>(p.tokens, [&](auto tokens) { product_of<decltype(tokens)::value>(p, begin, end, scratch); });
  }
};

}  // namespace
}  // namespace alphaprune
