// The product of many tokens with weights as 16-bit numbers on AVX-512 in which expansion hides behind arithmetic:
// while a panel is multiplied with its first two blocks of tokens, the next one is expanded into a second panel, a few
// words an iteration. Products and expansions have different units of the core to wait for. The sums are those of
// Panel, bit for bit.
#pragma once

#include <algorithm>

#include "vbmi2.h"

namespace alphaprune {
namespace {

// The expansion of the macro tiles of a panel, two words at a time.
template <class Math>
class Expansion {
 public:
  static constexpr int kFew = 2;

  explicit Expansion(const sbt::View& weight) : weight_(&weight), lines_(density_of(weight) < kFewLines ? 1 : 2) {}

  void start(int64_t tile, int64_t tiles, uint16_t* panel) {
    tile_ = tile;
    to_ = panel;
    left_ = tiles * (sbt::kWords / kFew);
  }
  // The next few words, where some are left.
  inline void few() {
    if (left_ == 0) return;
    if (left_ % (sbt::kWords / kFew) == 0) {
      value_ = tile_values<typename Math::Value>(*weight_, tile_);
      mask_ = weight_->mask + tile_ * sbt::kWords;
      ++tile_;
      const auto bytes = (tile_values<typename Math::Value>(*weight_, tile_) - value_) * sizeof(typename Math::Value);
      ahead_.start(mask_, value_, static_cast<int64_t>(bytes), lines_ * sbt::kWords / kFew);
    }
    ahead_.more();
    if (lines_ == 2) ahead_.more();
    Math::two(value_, mask_, to_);
    mask_ += kFew;
    to_ += kFew * 32;
    --left_;
  }
  void rest() {
    while (left_ > 0) few();
  }

 private:
  const sbt::View* weight_;
  const typename Math::Value* value_ = nullptr;
  const uint32_t* mask_ = nullptr;
  uint16_t* to_ = nullptr;
  int64_t tile_ = 0, left_ = 0;
  int64_t lines_;  // asked for at every few words
  Far ahead_;
};

// `Math` as Panel has it, with 8 vectors of weights per step of 16 columns, each two rows; but
//   Value, and two(value, mask, panel): from two mask words their weights, where `value` goes on;
//   finish(p, row_tile, token, v): stores the 16 sums of one token.
template <class Math>
struct Pipeline {
  using Element = uint16_t;
  using Vector = typename Math::Vector;
  // Of a panel. With fewer, sums go through memory more often; with 8, two panels fill an L1 of 32 KB, which still was
  // the fastest of 3, 4, 6 and 8 on a Zen 4.
  static constexpr int64_t kMostTiles = 8;
  static constexpr int64_t kTileElements = sbt::kTileRows * sbt::kTileCols, kPanel = kMostTiles * kTileElements;
  static constexpr int64_t kSums = Math::kVectors * Math::kLanes;  // floats per token
  static constexpr int64_t kHalves = 2 * Math::kLanes;             // at last
  static constexpr int64_t kStepElements = sbt::kTileRows * Math::kStep, kVector = kStepElements / Math::kVectors;

  static_assert(2 * kPanel * sizeof(Element) + kTokensPerPass * (kSums + kHalves) * sizeof(float) <= kScratchBytes,
                "panels and sums fit the scratch");
  static_assert(Math::kVectors == 2 * Math::kGroup && Math::kGroup == 4, "a group is half of the rows");
  static_assert(Math::kVectors / Math::kGroup * (sbt::kTileCols / Math::kStep) * 2 * Expansion<Math>::kFew ==
                    sbt::kWords,
                "two blocks of tokens expand as many tiles as they multiply");

  struct Sums {
    bool fresh, last;  // whether they begin here; end here
    float *all, *halves;

    Sums from(int64_t token) const { return {fresh, last, all + token * kSums, halves + token * kHalves}; }
  };

  // kAlong: the expansion goes on.
  template <int T, bool kAlong>
  static void block(const Element* panel, int64_t steps, const Element* x, int64_t x_stride, const Sums& sums,
                    Expansion<Math>& further) {
    Expansion<Math> next = further;  // in registers
    for (int64_t first = 0; first < Math::kVectors; first += Math::kGroup) {
      Vector sum[Math::kGroup][T];
      for (int g = 0; g < Math::kGroup; ++g)
        for (int t = 0; t < T; ++t)
          sum[g][t] = sums.fresh ? _mm512_setzero_ps() : Math::load(sums.all + t * kSums + (first + g) * Math::kLanes);
      const Element* w = panel + first * kVector;
      for (int64_t s = 0; s < steps; ++s, w += kStepElements) {
        for (int t = 0; t < T; ++t) {
          const auto a = Math::activations(x + t * x_stride + s * Math::kStep);
          for (int g = 0; g < Math::kGroup; ++g)
            sum[g][t] = Math::multiply(Math::weights(w + g * kVector), a, sum[g][t]);
        }
        if (kAlong) next.few();
      }
      if (sums.last) {
        for (int t = 0; t < T; ++t)
          Math::store(sums.halves + t * kHalves + first * Math::kLanes / Math::kGroup,
                      half_fours(half_eights(sum[0][t], sum[1][t]), half_eights(sum[2][t], sum[3][t])));
      } else {
        for (int g = 0; g < Math::kGroup; ++g)
          for (int t = 0; t < T; ++t) Math::store(sums.all + t * kSums + (first + g) * Math::kLanes, sum[g][t]);
      }
    }
    if (kAlong) further = next;
  }

  template <bool kAlong, int T = 1>
  static void block_of(int64_t width, const Element* panel, int64_t steps, const Element* x, int64_t x_stride,
                       const Sums& sums, Expansion<Math>& further) {
    if (width == T) {
      block<T, kAlong>(panel, steps, x, x_stride, sums, further);
    } else if constexpr (T < Math::kBlock) {
      block_of<kAlong, T + 1>(width, panel, steps, x, x_stride, sums, further);
    }
  }

  static void blocks(const Element* panel, int64_t steps, const Element* x, int64_t x_stride, int64_t tokens,
                     const Sums& sums, Expansion<Math>& further) {
    const int64_t count = ceil_div(tokens, Math::kBlock);
    for (int64_t b = 0, t = 0; b < count; ++b) {
      const int64_t width = (tokens - t) / (count - b);  // spread evenly: 16 as 5 + 5 + 6, never 6 + 6 + 4
      const Element* xs = x + t * x_stride;
      if (b < 2) {
        block_of<true>(width, panel, steps, xs, x_stride, sums.from(t), further);
      } else {
        block_of<false>(width, panel, steps, xs, x_stride, sums.from(t), further);
      }
      t += width;
    }
  }

  static void product(const Product& p, int64_t begin, int64_t end, void* scratch) {
    auto* panels = static_cast<Element*>(scratch);
    auto* sums = reinterpret_cast<float*>(panels + 2 * kPanel);
    float* halves = sums + kTokensPerPass * kSums;
    const int64_t tiles = p.weight.col_tiles(), count = ceil_div(tiles, kMostTiles);
    Expansion<Math> further(p.weight);
    const auto start = [&](int64_t row_tile, int64_t i, Element* to) {
      const int64_t first = tiles * i / count;
      further.start(row_tile * tiles + first, tiles * (i + 1) / count - first, to);
    };
    int64_t side = 0;
    if (begin < end) start(begin, 0, panels);
    further.rest();
    for (int64_t row_tile = begin; row_tile < end; ++row_tile) {
      for (int64_t token = 0; token < p.tokens; token += kTokensPerPass) {
        const int64_t pass = std::min(p.tokens - token, kTokensPerPass);
        const bool again = token + pass < p.tokens;
        for (int64_t i = 0; i < count; ++i) {
          const bool last = i + 1 == count, stays = again && count == 1;
          const int64_t next = row_tile + (last && !again);
          if (next < end && !stays) start(next, last ? 0 : i + 1, panels + (1 - side) * kPanel);
          const int64_t first = tiles * i / count, width = tiles * (i + 1) / count - first;
          const auto* x = static_cast<const Element*>(p.x) + token * p.x_stride + first * sbt::kTileCols;
          blocks(panels + side * kPanel, width * (sbt::kTileCols / Math::kStep), x, p.x_stride, pass,
                 {i == 0, last, sums, halves}, further);
          further.rest();
          if (!stays) side = 1 - side;
        }
        for (int64_t t = 0; t < pass; ++t) {
          const float* of_token = halves + t * kHalves;
          Math::finish(p, row_tile, token + t, sum_halves(Math::load(of_token), Math::load(of_token + Math::kLanes)));
        }
      }
    }
  }
};

}  // namespace
}  // namespace alphaprune
