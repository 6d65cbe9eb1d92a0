// The product of many tokens with weights as 16-bit numbers on AVX-512 in which expansion hides behind arithmetic:
// while a panel is multiplied with its first two blocks of tokens, the next one is expanded into a second panel, a few
// words an iteration. Products and expansions have different units of the core to wait for. The sums are those of
// Panel, bit for bit.
#pragma once

#include <algorithm>

#include "block.h"

namespace alphaprune {
namespace {

// The expansion of the macro tiles of a panel, one after the other. Asks: see ahead.h.
template <class Math, class Asks>
class Expansion {
 public:
  explicit Expansion(const sbt::View& weight) : weight_(&weight) {}

  void start(int64_t tile, int64_t tiles, uint16_t* panel) {
    tile_ = tile;
    to_ = panel;
    left_ = tiles;
  }
  bool left() const { return left_ > 0; }
  // The next tile; whether it may be expanded from halves of vectors (values_at).
  inline bool begin() {
    value_ = tile_values<typename Math::Value>(*weight_, tile_);
    mask_ = weight_->mask + tile_ * sbt::kWords;
    ++tile_;
    --left_;
    const auto bytes = (tile_values<typename Math::Value>(*weight_, tile_) - value_) * sizeof(typename Math::Value);
    ahead_.start(mask_, value_, static_cast<int64_t>(bytes));
    return Math::narrow(mask_);
  }
  // See ahead.h.
  inline void apart() {
    ahead_.apart();
    asm volatile("" : "+r"(mask_), "+r"(value_), "+r"(to_));
  }
  // The i-th and the next of the words to come.
  template <bool kNarrow>
  inline void two(int i) {
    ahead_.word(i, value_);
    ahead_.word(i + 1, value_);
    __m512i w[2];
    Math::template two<kNarrow>(value_, mask_ + i, w);
    _mm512_store_si512(to_ + i * 32, w[0]);
    _mm512_store_si512(to_ + i * 32 + 32, w[1]);
  }
  // So many of them are done.
  inline void end(int64_t words) {
    mask_ += words;
    to_ += words * 32;
  }
  void rest() {
    while (left()) {
      begin();
#pragma GCC unroll 4
      for (int i = 0; i < sbt::kWords; i += 2) two<false>(i);
      end(sbt::kWords);
    }
  }

 private:
  const sbt::View* weight_;
  const typename Math::Value* value_ = nullptr;
  const uint32_t* mask_ = nullptr;
  uint16_t* to_ = nullptr;
  int64_t tile_ = 0, left_ = 0;
  Asks ahead_;
};

// `Math` as Block has it; Asks: see ahead.h.
template <class Math, class Asks>
struct Pipeline {
  using Of = Block<Math>;
  using Element = typename Of::Element;
  using Further = Expansion<Math, Asks>;
  template <int T>
  using Sums = typename Of::template Sums<T>;
  // Of a panel. With fewer, sums go through memory more often; with 8, two panels fill an L1 of 32 KB, which still was
  // the fastest of 3, 4, 6 and 8 on a Zen 4, and of 4, 8 and 12 on a Zen 5.
  static constexpr int64_t kMostTiles = 8, kPanel = kMostTiles * Of::kTileElements;
  static constexpr int64_t kStepElements = sbt::kTileRows * Math::kStep, kVector = kStepElements / Math::kVectors;
  static constexpr int kAlong = 2;       // words that are expanded at a step,
  static constexpr int kTilesAlong = 4;  // so that a tile is while so many are multiplied with half of their rows

  static_assert(2 * kPanel * sizeof(Element) + kTokensPerPass * (Of::kSums + Of::kHalves) * sizeof(float) <=
                    kScratchBytes,
                "panels and sums fit the scratch");
  static_assert(kAlong * sbt::kSteps * kTilesAlong == sbt::kWords && kTilesAlong == 2 * 2,
                "two blocks of tokens, each half after half, expand as many tiles as they multiply");

  // Half of the rows of a tile times T tokens; kWith: beside each step the next words are expanded.
  template <int T, bool kWith, bool kNarrow>
  __attribute__((always_inline)) static inline void tile(const Element* w, const Element* x, int64_t x_stride,
                                                         Sums<T>& sum, Further& further) {
#pragma GCC unroll 4
    for (int s = 0; s < sbt::kSteps; ++s, w += kStepElements) {
      __m512i here[Of::kGroup];
#pragma GCC unroll 8
      for (int g = 0; g < Of::kGroup; ++g) here[g] = Math::weights(w + g * kVector);
      if (kWith) further.template two<kNarrow>(s * kAlong);
      Of::template step<T>(here, x + s * Math::kStep, x_stride, sum);
    }
    if (kWith) further.end(sbt::kSteps * kAlong);
  }

  // Several, while one is expanded.
  template <int T, bool kNarrow>
  __attribute__((always_inline)) static inline void tiles_along(const Element* w, const Element* x, int64_t x_stride,
                                                                Sums<T>& sum, Further& further) {
    further.apart();
#pragma GCC unroll 1
    for (int i = 0; i < kTilesAlong; ++i, w += Of::kTileElements, x += sbt::kTileCols)
      tile<T, true, kNarrow>(w, x, x_stride, sum, further);
  }

  // kWith: while tiles of the next panel are left to be expanded.
  template <int T, bool kWith>
  __attribute__((noinline)) static void times(const Element* panel, int64_t tiles, const Of& block, Further& further) {
    Further next = further;  // in registers
    for (int group = 0; group < 2; ++group) {
      Sums<T> sum;
      block.template begin<T>(group, sum);
      const Element *w = panel + group * Of::kGroup * kVector, *x = block.x;
      int64_t left = tiles;
      for (; kWith && left >= kTilesAlong && next.left(); left -= kTilesAlong) {
        if (next.begin()) {
          tiles_along<T, true>(w, x, block.x_stride, sum, next);
        } else {
          tiles_along<T, false>(w, x, block.x_stride, sum, next);
        }
        w += kTilesAlong * Of::kTileElements;
        x += kTilesAlong * sbt::kTileCols;
      }
      for (; left > 0; --left, w += Of::kTileElements, x += sbt::kTileCols)
        tile<T, false, false>(w, x, block.x_stride, sum, next);
      block.template end<T>(group, sum);
    }
    if (kWith) further = next;
  }

  static void blocks(const Element* panel, int64_t tiles, int64_t tokens, const Of& all, Further& further) {
    const int64_t count = ceil_div(tokens, Math::kBlock);
    for (int64_t b = 0, t = 0; b < count; ++b) {
      const int64_t width = (tokens - t) / (count - b);  // spread evenly: 16 as 5 + 5 + 6, never 6 + 6 + 4
      known<1, Math::kBlock>(width, [&](auto of) {
        constexpr int kTokens = decltype(of)::value;
        if (b < 2) {
          times<kTokens, true>(panel, tiles, all.from(t), further);
        } else {
          times<kTokens, false>(panel, tiles, all.from(t), further);
        }
      });
      t += width;
    }
  }

  static void product(const Product& p, int64_t begin, int64_t end, void* scratch) {
    auto* panels = static_cast<Element*>(scratch);
    auto* sums = reinterpret_cast<float*>(panels + 2 * kPanel);
    const int64_t tiles = p.weight.col_tiles(), count = ceil_div(tiles, kMostTiles);
    const auto width_of = [&](int64_t i) { return std::min(kMostTiles, tiles - i * kMostTiles); };
    Further further(p.weight);
    const auto start = [&](int64_t row_tile, int64_t i, Element* to) {
      further.start(row_tile * tiles + i * kMostTiles, width_of(i), to);
    };
    int64_t side = 0;
    if (begin < end) start(begin, 0, panels);
    further.rest();
    for (int64_t row_tile = begin; row_tile < end; ++row_tile) {
      for (int64_t token = 0; token < p.tokens; token += kTokensPerPass) {
        const int64_t pass = std::min(p.tokens - token, kTokensPerPass);
        const bool again = token + pass < p.tokens;
        Of block{static_cast<const Element*>(p.x) + token * p.x_stride,
                 p.x_stride,
                 true,
                 false,
                 sums,
                 sums + kTokensPerPass * Of::kSums};
        for (int64_t i = 0; i < count; ++i) {
          block.last = i + 1 == count;
          const bool stays = again && count == 1;
          const int64_t next = row_tile + (block.last && !again);
          if (next < end && !stays) start(next, block.last ? 0 : i + 1, panels + (1 - side) * kPanel);
          blocks(panels + side * kPanel, width_of(i), pass, block, further);
          further.rest();
          if (!stays) side = 1 - side;
          block.fresh = false;
          block.x += kMostTiles * sbt::kTileCols;
        }
        block.finish(p, row_tile, token, pass);
      }
    }
  }
};

}  // namespace
}  // namespace alphaprune
