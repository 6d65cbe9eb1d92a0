// Activations of int8 weights as integers, on AVX-512 with VNNI: to 16 bits, as any half-precision ones are, or to 8
// bits where whoever loaded the weight allows it. And what both products of them share.
//
// An expansion, Expanded(weight, begin, end, notes), goes once through macro tiles [begin, end); `notes` is its memory.
// After start(tile), for each in order, next(v) gives the weights of the next two words, 4 rows x 16 columns, where v
// counts from 0 to 7, twice, and is known to the compiler.
#pragma once

#include <algorithm>
#include <type_traits>

#include "avx512.h"
#include "rounding.h"

namespace alphaprune {
namespace {

// The two halves of a register and its four quarters of int8 as float32.
inline __m512 quarter(__m512i weights, int which) {
  const __m128i bytes = which == 0   ? _mm512_castsi512_si128(weights)
                        : which == 1 ? _mm512_extracti32x4_epi32(weights, 1)
                        : which == 2 ? _mm512_extracti32x4_epi32(weights, 2)
                                     : _mm512_extracti32x4_epi32(weights, 3);
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}

// An integer of 16 bits is 256 * high + low, signed bytes that multiply weights as they come out of the expansion: two
// instructions of 64 products, where weights widened to 16 bits cost three shuffles on top.
// vpdpbusd wants one side unsigned: 128 is added to the weights, zeros among them, and each lane of a sum begins with
// -128 times the sum of its activations, which is of x alone. As the sum of 128 products fits 32 bits, it does not
// matter what its parts overflow to.
struct RoundedGroup {
  float unit;          // NaN where the group cannot be rounded
  int32_t offsets[4];  // -128 * sum(integers), of each four columns of 16: of a lane of the product
};

// Rounds the columns of a group from `first` on to one byte each, or to two, of which the high ones go kGroupCols on;
// kPlus128: bytes are unsigned then, 128 more.
template <int kBytes, bool kPlus128 = false>
inline RoundedGroup round_group(const void* from, Dtype dtype, int64_t first, int64_t cols, int64_t padded,
                                uint8_t* to) {
  constexpr int64_t kVectors = kGroupCols / 16;
  __m512 v[kVectors];
  __m512i bits = _mm512_setzero_si512();
  for (int64_t i = 0; i < kVectors; ++i) {
    v[i] = widen16(from, first + i * 16, cols, dtype);
    const __m512i magnitude = _mm512_and_si512(_mm512_castps_si512(v[i]), _mm512_set1_epi32(0x7fffffff));
    bits = _mm512_max_epi32(bits, magnitude);
  }
  const Unit unit(static_cast<uint32_t>(_mm512_reduce_max_epi32(bits)), kBytes == 2 ? kLargestOf2 : kLargestOf1);
  __m512i sums = _mm512_setzero_si512();
  const auto store = [](uint8_t* at, __m512i q) {
    __m128i bytes = _mm512_cvtepi32_epi8(q);
    if (kPlus128) bytes = _mm_xor_si128(bytes, _mm_set1_epi8(static_cast<char>(0x80)));
    _mm_store_si128(reinterpret_cast<__m128i*>(at), bytes);
  };
  for (int64_t i = 0; i < kVectors && first + i * 16 < padded; ++i, to += 16) {
    __m512i q = _mm512_setzero_si512();
    if (unit.usable()) q = _mm512_cvtps_epi32(_mm512_mul_ps(v[i], _mm512_set1_ps(unit.inverse)));
    sums = _mm512_add_epi32(sums, q);
    store(to, q);
    if (kBytes == 2) store(to + kGroupCols, _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(128)), 8));
  }
  RoundedGroup made = {unit.unit, {}};
  alignas(64) int32_t lanes[16];
  _mm512_store_si512(lanes, sums);
  for (int i = 0; i < 16; ++i) made.offsets[i / 4] -= 128 * lanes[i];
  return made;
}

inline bool is_nan(float v) { return v != v; }

// Sixteen accumulators, one per row, into y.
inline void store_accumulators(const Product& p, int64_t row_tile, int64_t token, const __m512* sum) {
  store_sums(p, row_tile, token, sum_rows(sum));
}

// One token with int8 weights in float32 from the caller's own activations: what float32 asks for, and the way out for
// tokens that cannot be rounded.
template <class Expanded>
void exact_integers(const Product& p, int64_t begin, int64_t end, int64_t token) {
  const int64_t tiles = p.weight.col_tiles(), cols = p.weight.cols;
  typename Expanded::Notes notes;
  Expanded weights(p.weight, begin * tiles, end * tiles, notes);
  const void* x = static_cast<const char*>(p.given.data) + token * p.given.stride * size_of(p.given.dtype);
  for (int64_t row_tile = begin; row_tile < end; ++row_tile) {
    __m512 sum[sbt::kTileRows], scaled[sbt::kTileRows];
    for (int r = 0; r < sbt::kTileRows; ++r) sum[r] = scaled[r] = _mm512_setzero_ps();
    for (int64_t c = 0; c < tiles; ++c) {
      weights.start(row_tile * tiles + c);
      for (int64_t half = 0; half < 2; ++half) {
#pragma GCC unroll 2
        for (int s = 0; s < 2; ++s) {
          const __m512 a = widen16(x, c * sbt::kTileCols + (2 * half + s) * sbt::kStepCols, cols, p.given.dtype);
#pragma GCC unroll 4
          for (int v = 0; v < 4; ++v) {
            const __m512i w = weights.next(4 * s + v);
#pragma GCC unroll 4
            for (int r = 0; r < 4; ++r) sum[4 * v + r] = _mm512_fmadd_ps(quarter(w, r), a, sum[4 * v + r]);
          }
        }
      }
      if (!p.weight.grouped() || (c % 2 == 0 && c + 1 < tiles)) continue;
      alignas(64) float scales[sbt::kTileRows];
      _mm512_store_ps(scales, row_scales(p.weight, row_tile, c));
      for (int r = 0; r < sbt::kTileRows; ++r) {
        scaled[r] = _mm512_fmadd_ps(sum[r], _mm512_set1_ps(scales[r]), scaled[r]);
        sum[r] = _mm512_setzero_ps();
      }
    }
    store_accumulators(p, row_tile, token, p.weight.grouped() ? scaled : sum);
  }
}

// Rounded activations, [group of 128 columns][token][byte][column]: what a panel meets lies together. After them
// [group][token] units, per token whether it must be computed exactly, [group][token] four offsets, and their sums.
template <int kBytes>
struct Rounded {
  static constexpr int64_t kTokenBytes = kBytes * kGroupCols;

  Rounded(const sbt::View& weight, int64_t tokens)
      : tokens(tokens), padded(weight.padded_cols()), groups(ceil_div(padded, kGroupCols)) {}

  int64_t bytes() const { return groups * tokens * kTokenBytes + ceil_div((6 * groups + 1) * tokens * 4, 64) * 64; }
  const uint8_t* columns(const void* base, int64_t group, int64_t token) const {
    return static_cast<const uint8_t*>(base) + (group * tokens + token) * kTokenBytes;
  }
  const float* units(const void* base, int64_t group, int64_t token) const {
    return reinterpret_cast<const float*>(columns(base, groups, 0)) + group * tokens + token;
  }
  bool exact(const void* base, int64_t token) const { return *units(base, groups, token) != 0; }
  const int32_t* offsets(const void* base, int64_t group, int64_t token) const {
    return reinterpret_cast<const int32_t*>(units(base, groups + 1, 0)) + (group * tokens + token) * 4;
  }
  const int32_t* offset(const void* base, int64_t group, int64_t token) const {
    return offsets(base, groups, 0) + group * tokens + token;
  }

  template <bool kPlus128 = false>
  void prepare(const Activations& x, int64_t cols, int64_t token, void* base) const {
    const char* from = static_cast<const char*>(x.data) + token * x.stride * size_of(x.dtype);
    const auto writable = [](auto* p) {
      return const_cast<std::remove_const_t<std::remove_pointer_t<decltype(p)>>*>(p);
    };
    float exact = 0;
    for (int64_t g = 0; g < groups; ++g) {
      uint8_t* to = writable(columns(base, g, token));
      const auto made = round_group<kBytes, kPlus128>(from, x.dtype, g * kGroupCols, cols, padded, to);
      if (is_nan(made.unit)) exact = 1;
      *writable(units(base, g, token)) = is_nan(made.unit) ? 0 : made.unit;
      int32_t* each = writable(offsets(base, g, token));
      std::copy(made.offsets, made.offsets + 4, each);
      *writable(offset(base, g, token)) = each[0] + each[1] + each[2] + each[3];
    }
    *writable(units(base, groups, token)) = exact;
  }

  int64_t tokens, padded, groups;
};

// sum + the products of four bytes in each lane. GCC's intrinsic has vectors of 32-bit integers where __m512i has such
// of 64, for which it copies sums around a loop or keeps them in memory: with 24 of them a Zen 5 made 0.7 products a
// cycle instead of 1.75.
inline __m512i add_products(__m512i sum, __m512i unsigned_bytes, __m512i signed_bytes) {
#if defined(__AVX512VNNI__)
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_bytes), "v"(signed_bytes));
  return sum;
#else
  return _mm512_dpbusd_epi32(sum, unsigned_bytes, signed_bytes);
#endif
}

inline __m512i flip() { return _mm512_set1_epi8(static_cast<char>(0x80)); }

// The sum of products as a float, from those of each byte of the activations.
template <int kBytes>
inline __m512 total(const __m512i* sum) {
  if (kBytes == 1) return _mm512_cvtepi32_ps(sum[0]);
  return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(sum[kBytes - 1], 8), sum[0]));
}

// The tokens that could not be rounded.
template <class Expanded, int kBytes>
void exact_tokens(const Product& p, int64_t begin, int64_t end, const Rounded<kBytes>& rounded) {
  for (int64_t t = 0; t < p.tokens; ++t)
    if (rounded.exact(p.x, t)) exact_integers<Expanded>(p, begin, end, t);
}

// Whether the product is taken from rounded activations.
inline bool rounds(const Activations& x, const sbt::View& weight) {
  return weight.dtype == Dtype::int8 && (x.dtype != Dtype::float32 || weight.to_bytes);
}
// Isa::layout of activations of 8 bits; of 16, and after it of 8 bits, 128 more.
constexpr int kBytesLayout = 3, kSlotsLayout = 4;

// use(the layout of the activations).
template <class Use>
auto with_rounded(const sbt::View& weight, int64_t tokens, const Use& use) {
  return weight.to_bytes ? use(Rounded<1>(weight, tokens)) : use(Rounded<2>(weight, tokens));
}
inline int64_t integer_bytes(const Activations& x, const sbt::View& weight) {
  return with_rounded(weight, x.tokens, [](const auto& rounded) { return rounded.bytes(); });
}
template <bool kPlus128 = false>
void prepare_integers(const Activations& x, const sbt::View& weight, int64_t first, int64_t last, void* to) {
  with_rounded(weight, x.tokens, [&](const auto& rounded) {
    for (int64_t t = first; t < last; ++t) rounded.template prepare<kPlus128>(x, weight.cols, t, to);
  });
}

}  // namespace
}  // namespace alphaprune
