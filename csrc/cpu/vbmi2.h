// Expansion of mask words on AVX-512 with VBMI2.
#pragma once

#include "ahead.h"

namespace alphaprune {
namespace {

// Zeros that the compiler does not know. On Zen 4 an expansion waits for whatever its destination held before, even
// where the mask zeroes it: expanding into zeros, which cost no execution, one does not wait for the last (5 cycles
// each).
inline __m512i fresh_zeros() {
  __m512i zeros = _mm512_setzero_si512();
#if defined(__AVX512F__)
  asm("" : "+v"(zeros));
#endif
  return zeros;
}

// The 32 weights of a word, zeros where the mask has none. The load is a whole vector: the values end in a readable
// tail of 64 bytes.
inline __m512i expanded16(const uint16_t* value, uint32_t mask) {
  return _mm512_mask_expand_epi16(fresh_zeros(), mask, _mm512_loadu_si512(value));
}
inline __m512i expand16(const uint16_t*& value, uint32_t mask) {
  const __m512i dense = expanded16(value, mask);
  value += __builtin_popcount(mask);
  return dense;
}

// How many weights two words keep, by one load: loads are what bounds an expansion on a Zen 5, two a cycle, of which
// that of the values takes both where it crosses a cache line.
struct Kept {
  int first, second;

  explicit Kept(const uint32_t* mask) {
    uint64_t both;
    std::memcpy(&both, mask, sizeof both);
    asm("" : "+r"(both));  // or the compiler would count in memory, twice
    first = __builtin_popcount(static_cast<uint32_t>(both));
    second = __builtin_popcount(static_cast<uint32_t>(both >> 32));
  }
};

inline __m512i expand32(const uint32_t*& value, uint32_t mask) {
  const __m512i dense =
      _mm512_mask_expand_epi32(fresh_zeros(), static_cast<__mmask16>(mask), _mm512_loadu_si512(value));
  value += __builtin_popcount(mask & 0xffffu);
  return dense;
}

// The 64 weights of two words of int8: 4 rows x 16 columns.
inline __m512i expand8(const uint8_t*& value, const uint32_t* words) {
  uint64_t mask;
  std::memcpy(&mask, words, 8);
  const __m512i dense = _mm512_mask_expand_epi8(fresh_zeros(), mask, _mm512_loadu_si512(value));
  value += __builtin_popcountll(mask);
  return dense;
}

// The int8 weights of a macro tile, 64 at a time: what integer.h wants of an expansion.
template <class Asks>
class ExpandedBytes {
 public:
  struct Notes {};
  using There = ExpandedBytes<typename Asks::There>;  // whose `start` is told what to ask for
  ExpandedBytes(const sbt::View& weight, int64_t, int64_t, Notes&) : weight_(weight) {}

  void start(int64_t tile) { start(tile, tile); }
  void start(int64_t tile, int64_t asked) {
    value_ = tile_values<uint8_t>(weight_, tile);
    mask_ = weight_.mask + tile * sbt::kWords;
    const uint8_t* values = tile_values<uint8_t>(weight_, asked);
    asks_.start(weight_.mask + asked * sbt::kWords, values, tile_values<uint8_t>(weight_, asked + 1) - values);
  }
  __m512i next(int vector) {
    asks_.word(2 * vector, value_);
    const __m512i w = expand8(value_, mask_);
    mask_ += 2;
    return w;
  }

 private:
  const sbt::View& weight_;
  const uint8_t* value_ = nullptr;
  const uint32_t* mask_ = nullptr;
  Asks asks_;
};

using NearBytes = ExpandedBytes<AsksNear<>>;

// Up to so many tokens of bfloat16 the product straight from registers is the fastest: on a Zen 5 5 take 0.7 of the
// time of the panel at 70 %, on AVX-512 alone.
constexpr int kMostFused = 6;

// So many words of a step, times the tokens, have their sums in registers, or, where that is faster than another turn,
// some of them in memory. Where they are fewer than 8, the rows of a tile take turns along K, and the later turns find
// the values in L2.
constexpr int fused_words(int tokens) { return tokens <= 4 ? 8 : 4; }

// A few tokens of bfloat16 weights straight from the expanded registers, without a panel; the sums are those of the
// panel, bit for bit. Besides what Panel asks of it, `Math` has dense(word), the 32 weights of a word as multiply takes
// them, and kFar, whether to ask far ahead.
template <class Math, class Asks, int T, int Words, int First>
inline void fused_turn(const Product& p, int64_t row_tile, float* sums) {
  const int64_t tiles = p.weight.col_tiles();
  const auto* x = static_cast<const typename Math::Element*>(p.x);
  __m512 sum[Words][T];
  for (auto& pair : sum)
    for (auto& v : pair) v = _mm512_setzero_ps();
  const uint32_t* mask = p.weight.mask + row_tile * tiles * sbt::kWords;
  for (int64_t c = 0; c < tiles; ++c, mask += sbt::kWords) {
    const uint16_t* value = tile_values<uint16_t>(p.weight, row_tile * tiles + c);
    Asks asks;
    if (First == 0 || Asks::kAgain)
      asks.start(mask, value, (tile_values<uint16_t>(p.weight, row_tile * tiles + c + 1) - value) * 2);
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s) {
      const uint32_t* words = mask + s * 8;
      const auto skip = [&](int from, int to) {
        for (int q = from; q < to; ++q) value += __builtin_popcount(words[q]);
      };
      decltype(Math::activations(x)) a[T];
      for (int t = 0; t < T; ++t) a[t] = Math::activations(x + t * p.x_stride + c * sbt::kTileCols + s * 16);
      if (Words < 8) skip(0, First);
#pragma GCC unroll 4
      for (int two = 0; two < Words; two += 2) {
        const Kept kept(words + First + two);
#pragma GCC unroll 2
        for (int q = two; q < two + 2; ++q) {
          if (First == 0 || Asks::kAgain) asks.word(q, value);
          const auto w = Math::dense(expanded16(value, words[First + q]));
          for (int t = 0; t < T; ++t) sum[q][t] = Math::multiply(w, a[t], sum[q][t]);
          value += q == two ? kept.first : kept.second;
        }
      }
      if (Words < 8) skip(First + Words, 8);
    }
  }
  for (int t = 0; t < T; ++t)
    for (int q = 0; q < Words; ++q) _mm512_store_ps(sums + t * 128 + (First + q) * 16, sum[q][t]);
}

// The turns of a row tile: which rows a turn is of has to be known to the compiler.
template <class Math, class Asks, int T, int First = 0>
inline void fused_turns(const Product& p, int64_t row_tile, float* sums) {
  constexpr int kWords = fused_words(T);
  fused_turn<Math, Asks, T, kWords, First>(p, row_tile, sums);
  if constexpr (First + kWords < 8) fused_turns<Math, Asks, T, First + kWords>(p, row_tile, sums);
}

template <class Math, class Asks, int T>
void fused_rows(const Product& p, int64_t begin, int64_t end, void* scratch) {
  auto* sums = static_cast<float*>(scratch);
  for (int64_t row_tile = begin; row_tile < end; ++row_tile) {
    fused_turns<Math, Asks, T>(p, row_tile, sums);
    for (int t = 0; t < T; ++t) Math::finish(p, row_tile, t, sums + t * 128);
  }
}

template <class Math, int T>
void fused_pairs(const Product& p, int64_t begin, int64_t end, void* scratch) {
  constexpr int kWords = fused_words(T), kOfTile = kWords * 4, kLines = kWords < 8 ? 16 : 24;
  using Near = AsksNear<(kWords < 8)>;
  if constexpr (!Math::kFar) {
    fused_rows<Math, Near, T>(p, begin, end, scratch);
  } else {
    const double density = density_of(p.weight);
    if (T > 2 && density < kHardlyWaits) return fused_rows<Math, Near, T>(p, begin, end, scratch);
    if (density < kFewLines) return fused_rows<Math, AsksFar<16, kOfTile>, T>(p, begin, end, scratch);
    fused_rows<Math, AsksFar<kLines, kOfTile>, T>(p, begin, end, scratch);
  }
}

// Of up to kMostFused tokens.
template <class Math>
void fused_few(const Product& p, int64_t begin, int64_t end, void* scratch) {
  known<1, kMostFused>(p.tokens,
                       [&](auto tokens) { fused_pairs<Math, decltype(tokens)::value>(p, begin, end, scratch); });
}

}  // namespace
}  // namespace alphaprune
