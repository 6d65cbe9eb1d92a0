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

// On a Zen 5 an expansion takes both units that shuffle, and every second product beside it goes to one of them,
// whatever waits there. So a word takes 1 cycle, what fills its mask register from memory half a one, and each product
// half a one more: with one load for two masks 1024 weights take 40 cycles and 16 for each token, which fits what up to
// 6 tokens were measured to take (bench/in_cache.py). Loads, two a cycle, are as many: that of a whole vector of values
// takes both where it crosses a cache line.

// How many weights two words keep, by one load.
struct Kept {
  int of[2];

  explicit Kept(const uint32_t* words) {
    uint64_t both;
    std::memcpy(&both, words, sizeof both);
    asm("" : "+r"(both));  // or the compiler would count in memory, twice
    of[0] = __builtin_popcount(static_cast<uint32_t>(both));
    of[1] = __builtin_popcount(static_cast<uint32_t>(both >> 32));
  }
};

// Which weights they keep, by one load, too: shifting a mask register takes none of those units.
struct TwoMasks {
  __mmask32 of[2];

  explicit TwoMasks(const uint32_t* words) {
#if defined(__AVX512F__)
    __mmask64 both, second;
    asm("kmovq %1, %0" : "=k"(both) : "m"(*reinterpret_cast<const uint32_t (*)[2]>(words)));
    asm("kshiftrq $32, %1, %0" : "=k"(second) : "k"(both));
    of[0] = static_cast<__mmask32>(both);
    of[1] = static_cast<__mmask32>(second);
#else
    of[0] = words[0];
    of[1] = words[1];
#endif
  }
};

// What an expansion takes its values from. Narrow: 32 bytes, which cross a cache line half as often, for a word that
// keeps no more than 16 of 16 bits, or two that keep no more than 32 of 8; what lies behind them is anything.
template <bool kNarrow>
inline __m512i values_at(const void* value) {
  if (!kNarrow) return _mm512_loadu_si512(value);
#if defined(__AVX512F__)
  __m512i values;  // by an instruction that knows all registers; the compiler's does not, and copies
  asm("vmovdqu64 %1, %t0" : "=v"(values) : "m"(*static_cast<const uint8_t (*)[32]>(value)));
  return values;
#else
  return _mm512_castsi256_si512(_mm256_loadu_si256(static_cast<const __m256i*>(value)));
#endif
}

// The 32 weights of a word, zeros where the mask has none. The load is a whole vector, or half of one: the values end
// in a readable tail of 64 bytes.
template <bool kNarrow = false>
inline __m512i expanded16(const uint16_t* value, __mmask32 mask) {
  return _mm512_mask_expand_epi16(fresh_zeros(), mask, values_at<kNarrow>(value));
}
inline __m512i expand16(const uint16_t*& value, uint32_t mask) {
  const __m512i dense = expanded16(value, mask);
  value += __builtin_popcount(mask);
  return dense;
}

inline __m512i expand32(const uint32_t*& value, uint32_t mask) {
  const __m512i dense =
      _mm512_mask_expand_epi32(fresh_zeros(), static_cast<__mmask16>(mask), _mm512_loadu_si512(value));
  value += __builtin_popcount(mask & 0xffffu);
  return dense;
}

// The 64 weights of two words of int8: 4 rows x 16 columns.
template <bool kNarrow = false>
inline __m512i expand8(const uint8_t*& value, const uint32_t* words) {
  uint64_t mask;
  std::memcpy(&mask, words, 8);
  const __m512i dense = _mm512_mask_expand_epi8(fresh_zeros(), mask, values_at<kNarrow>(value));
  value += __builtin_popcountll(mask);
  return dense;
}

// No tile's words are expanded from halves of vectors (values_at).
struct NeverNarrow {
  static bool narrow(const uint32_t*) { return false; }
};

// The int8 weights of a macro tile, 64 at a time: what integer.h wants of an expansion. Narrow::narrow(mask): whether
// no two words of a tile keep more than 32 weights.
template <class Asks, class Narrow = NeverNarrow>
class ExpandedBytes {
 public:
  struct Notes {};
  using There = ExpandedBytes<typename Asks::There, Narrow>;  // whose `start` is told what to ask for
  ExpandedBytes(const sbt::View& weight, int64_t, int64_t, Notes&) : weight_(weight) {}

  void start(int64_t tile) { start(tile, tile); }
  void start(int64_t tile, int64_t asked) {
    value_ = tile_values<uint8_t>(weight_, tile);
    mask_ = weight_.mask + tile * sbt::kWords;
    const uint8_t* values = tile_values<uint8_t>(weight_, asked);
    asks_.start(weight_.mask + asked * sbt::kWords, values, tile_values<uint8_t>(weight_, asked + 1) - values);
  }
  bool narrow() const { return Narrow::narrow(mask_); }
  void apart() {
    asks_.apart();
    asm volatile("" : "+r"(mask_), "+r"(value_));
  }
  template <bool kNarrow = false>
  __m512i next(int vector) {
    asks_.word(2 * vector, value_);
    const __m512i w = expand8<kNarrow>(value_, mask_);
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

// So many words of a step, times the tokens, have their sums in registers, or, where that is faster than another turn,
// some of them in memory. Where they are fewer than 8, the rows of a tile take turns along K, and the later turns find
// the values in L2.
constexpr int fused_words(int tokens) { return tokens <= 4 ? 8 : 4; }

// A macro tile times a few tokens straight from the expanded registers; `value` goes on. kNarrow: see values_at.
template <class Math, int T, int Words, int First, bool kNarrow, class Asks>
__attribute__((always_inline)) inline void fused_tile(const uint32_t* mask, const uint16_t* value, Asks& asks,
                                                      const typename Math::Element* x, int64_t x_stride,
                                                      __m512 (&sum)[Words][T]) {
  asks.apart();
  asm volatile("" : "+r"(mask), "+r"(value));
#pragma GCC unroll 4
  for (int s = 0; s < 4; ++s) {
    const uint32_t* words = mask + s * 8;
    const auto skip = [&](int from, int to) {
      for (int q = from; q < to; ++q) value += __builtin_popcount(words[q]);
    };
    decltype(Math::activations(x)) a[T];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) a[t] = Math::activations(x + t * x_stride + s * 16);
    if (Words < 8) skip(0, First);
#pragma GCC unroll 4
    for (int two = 0; two < Words; two += 2) {
      const Kept kept(words + First + two);
      const TwoMasks masks(words + First + two);
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        if (First == 0 || Asks::kAgain) asks.word(two + i, value);
        const auto w = Math::dense(expanded16<kNarrow>(value, masks.of[i]));
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) sum[two + i][t] = Math::multiply(w, a[t], sum[two + i][t]);
        value += kept.of[i];
      }
    }
    if (Words < 8) skip(First + Words, 8);
  }
}

// A few tokens of bfloat16 weights straight from the expanded registers, without a panel; the sums are those of the
// panel, bit for bit. Besides what Panel asks of it, `Math` has dense(word), the 32 weights of a word as multiply takes
// them, and narrow(mask), whether the words of a tile may be expanded from half a vector.
template <class Math, class Asks, int T, int Words, int First>
__attribute__((noinline)) void fused_turn(const Product& p, int64_t row_tile, float* sums) {
  const int64_t tiles = p.weight.col_tiles();
  const auto* x = static_cast<const typename Math::Element*>(p.x);
  __m512 sum[Words][T];
#pragma GCC unroll 8
  for (int q = 0; q < Words; ++q)
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) sum[q][t] = _mm512_setzero_ps();
  const uint32_t* mask = p.weight.mask + row_tile * tiles * sbt::kWords;
  for (int64_t c = 0; c < tiles; ++c, mask += sbt::kWords, x += sbt::kTileCols) {
    const uint16_t* value = tile_values<uint16_t>(p.weight, row_tile * tiles + c);
    Asks asks;
    if (First == 0 || Asks::kAgain)
      asks.start(mask, value, (tile_values<uint16_t>(p.weight, row_tile * tiles + c + 1) - value) * 2);
    if (Math::narrow(mask)) {
      fused_tile<Math, T, Words, First, true>(mask, value, asks, x, p.x_stride, sum);
    } else {
      fused_tile<Math, T, Words, First, false>(mask, value, asks, x, p.x_stride, sum);
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 8
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

// p.tokens: from kFewest to kMost.
template <class Math, class Asks, int kFewest, int kMost>
void fused_few(const Product& p, int64_t begin, int64_t end, void* scratch) {
  known<kFewest, kMost>(p.tokens,
                        [&](auto tokens) { fused_rows<Math, Asks, decltype(tokens)::value>(p, begin, end, scratch); });
}

}  // namespace
}  // namespace alphaprune
