// SBT on AVX-512 with VBMI2 and VNNI: one vpexpandw per mask word of 16-bit values, two vpexpandd of float32, then FMA;
// one vpexpandb per two words of int8, then vpdpbusd.
#include "avx512.h"

namespace alphaprune {
namespace {

struct Float32Value;

// The two rows of a word as float32.
template <class Value>
inline void expand_pair(const uint16_t*& value, uint32_t mask, __m512& even, __m512& odd) {
  const __m512i dense = expand16(value, mask);
  even = Value::widen(_mm512_castsi512_si256(dense));
  odd = Value::widen(_mm512_extracti64x4_epi64(dense, 1));
}
template <class Value>
inline void expand_pair(const uint32_t*& value, uint32_t mask, __m512& even, __m512& odd) {
  even = _mm512_castsi512_ps(expand32(value, mask));
  odd = _mm512_castsi512_ps(expand32(value, mask >> 16));
}

// Activations and weights as float32; an accumulator is a row.
struct Float32 {
  using Vector = __m512;
  static constexpr int64_t kLanes = 16, kVectors = 16, kStep = 16, kPanelTiles = 4, kGroup = 4, kBlock = 6;

  static Vector load(const float* p) { return _mm512_load_ps(p); }
  static void store(float* p, Vector v) { _mm512_store_ps(p, v); }
  static Vector weights(const float* p) { return _mm512_load_ps(p); }
  static Vector activations(const float* p) { return _mm512_loadu_ps(p); }
  static Vector multiply(Vector w, Vector x, Vector sum) { return _mm512_fmadd_ps(w, x, sum); }

  template <class Value, class T>
  static void expand_tile(const sbt::View& weight, int64_t tile, float* panel) {
    const T* value = tile_values<T>(weight, tile);
    const uint32_t* mask = weight.mask + tile * sbt::kWords;
    prefetch(mask);
    prefetch(mask + 16);
    for (int64_t word = 0; word < sbt::kWords; ++word, panel += 32) {
      if (word % 2 == 0 || sizeof(T) == 4) prefetch(value);
      __m512 even, odd;
      expand_pair<Value>(value, mask[word], even, odd);
      _mm512_store_ps(panel, even);
      _mm512_store_ps(panel + 16, odd);
    }
  }
  static void expand_integers(const sbt::View& weight, int64_t tile, float* panel) {
    const uint8_t* value = tile_values<uint8_t>(weight, tile);
    const uint32_t* mask = weight.mask + tile * sbt::kWords;
    for (int64_t word = 0; word < sbt::kWords; word += 2, panel += 64) {
      const __m512i w = expand8(value, mask + word);
      for (int r = 0; r < 4; ++r) _mm512_store_ps(panel + r * 16, quarter(w, r));
    }
  }
  static void expand(const sbt::View& weight, int64_t tile, float* panel) {
    if (weight.dtype == Dtype::float32) return expand_tile<Float32Value, uint32_t>(weight, tile, panel);
    if (weight.dtype == Dtype::int8) return expand_integers(weight, tile, panel);
    expand_tile<Float16, uint16_t>(weight, tile, panel);
  }
  static void rows(const float* sums, float* out) {
    for (int64_t r = 0; r < sbt::kTileRows; ++r)
      out[r] = sum8(_mm256_add_ps(_mm256_load_ps(sums + r * 16), _mm256_load_ps(sums + r * 16 + 8)));
  }
};

// bfloat16 weights: the even columns of a word become float32 by a shift, the odd ones by clearing the low half, so an
// accumulator is a word, 8 lanes of the even row and 8 of the odd one. Activations lie in steps of [8 even][8 odd].
// VDPBF16PS would be one instruction, but on Sapphire Rapids it runs at a third of the FMA rate, and it flushes
// subnormals.
struct SplitBfloat16 {
  using Vector = __m512;
  struct Both {
    __m512 even, odd;
  };
  static constexpr int64_t kLanes = 16, kVectors = 8, kStep = 16, kPanelTiles = 4, kGroup = 4, kBlock = 4;

  static Vector load(const float* p) { return _mm512_load_ps(p); }
  static void store(float* p, Vector v) { _mm512_store_ps(p, v); }
  static Both split(__m512i w) {
    const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(w, 16)), _mm512_castsi512_ps(_mm512_and_si512(w, high))};
  }
  static Both weights(const float* p) { return {_mm512_load_ps(p), _mm512_load_ps(p + 16)}; }
  static Both activations(const float* p) {
    return {_mm512_broadcast_f32x8(_mm256_loadu_ps(p)), _mm512_broadcast_f32x8(_mm256_loadu_ps(p + 8))};
  }
  static Vector multiply(const Both& w, const Both& x, Vector sum) {
    return _mm512_fmadd_ps(w.odd, x.odd, _mm512_fmadd_ps(w.even, x.even, sum));
  }
  static void expand(const sbt::View& weight, int64_t tile, float* panel) {
    const uint16_t* value = tile_values<uint16_t>(weight, tile);
    const uint32_t* mask = weight.mask + tile * sbt::kWords;
    prefetch(mask);
    prefetch(mask + 16);
    for (int64_t word = 0; word < sbt::kWords; ++word, panel += 32) {
      if (word % 2 == 0) prefetch(value);
      const Both w = split(expand16(value, mask[word]));
      _mm512_store_ps(panel, w.even);
      _mm512_store_ps(panel + 16, w.odd);
    }
  }
  static void rows(const float* sums, float* out) {
    for (int64_t r = 0; r < sbt::kTileRows; ++r) out[r] = sum8(_mm256_load_ps(sums + r * 8));
  }
};

// A few tokens straight from the expanded registers, without a panel; the sums are those of the panel, bit for bit.
// The registers hold the sums of 8 words x 2 tokens or of 4 x 4: then the tile's rows 0-7 (half 0) and 8-15 take turns
// along K, and the second turn finds the values in L2.
template <int T, int Words>
inline void fused_half(const Product& p, int64_t row_tile, int first, float* sums) {
  const int64_t tiles = p.weight.col_tiles();
  __m512 sum[Words][T];
  for (auto& pair : sum)
    for (auto& v : pair) v = _mm512_setzero_ps();
  const uint32_t* mask = p.weight.mask + row_tile * tiles * sbt::kWords;
  for (int64_t c = 0; c < tiles; ++c, mask += sbt::kWords) {
    const uint16_t* value = tile_values<uint16_t>(p.weight, row_tile * tiles + c);
    prefetch(mask);
    prefetch(mask + 16);
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s) {
      const auto skip = [&](int from, int to) {
        for (int q = from; q < to; ++q) value += __builtin_popcount(mask[s * 8 + q]);
      };
      SplitBfloat16::Both a[T];
      for (int t = 0; t < T; ++t)
        a[t] = SplitBfloat16::activations(p.rows() + t * p.x_stride + c * sbt::kTileCols + s * 16);
      if (Words < 8 && first) skip(0, Words);
#pragma GCC unroll 8
      for (int q = 0; q < Words; ++q) {
        if (Words < 8 || q % 2 == 0) prefetch(value);
        const SplitBfloat16::Both w = SplitBfloat16::split(expand16(value, mask[s * 8 + first + q]));
        for (int t = 0; t < T; ++t) sum[q][t] = SplitBfloat16::multiply(w, a[t], sum[q][t]);
      }
      if (Words < 8 && !first) skip(Words, 8);
    }
  }
  for (int t = 0; t < T; ++t)
    for (int q = 0; q < Words; ++q) _mm512_store_ps(sums + t * 128 + (first + q) * 16, sum[q][t]);
}

template <int T>
void fused_bfloat16(const Product& p, int64_t begin, int64_t end, void* scratch) {
  auto* sums = static_cast<float*>(scratch);
  for (int64_t row_tile = begin; row_tile < end; ++row_tile) {
    if constexpr (T <= 2) {
      fused_half<T, 8>(p, row_tile, 0, sums);
    } else {
      fused_half<T, 4>(p, row_tile, 0, sums);
      fused_half<T, 4>(p, row_tile, 4, sums);
    }
    for (int t = 0; t < T; ++t) Panel<SplitBfloat16>::finish(p, row_tile, t, sums + t * 128);
  }
}

template <class Value, class T>
void fused_float32(const Product& p, int64_t begin, int64_t end, void* scratch) {
  auto* sums = static_cast<float*>(scratch);
  const int64_t tiles = p.weight.col_tiles();
  for (int64_t row_tile = begin; row_tile < end; ++row_tile) {
    __m512 sum[16];
    for (auto& v : sum) v = _mm512_setzero_ps();
    const uint32_t* mask = p.weight.mask + row_tile * tiles * sbt::kWords;
    for (int64_t c = 0; c < tiles; ++c, mask += sbt::kWords) {
      const T* value = tile_values<T>(p.weight, row_tile * tiles + c);
      prefetch(mask);
      prefetch(mask + 16);
      for (int s = 0; s < 4; ++s) {
        const __m512 a = _mm512_loadu_ps(p.rows() + c * sbt::kTileCols + s * 16);
#pragma GCC unroll 8
        for (int q = 0; q < 8; ++q) {
          if (q % 2 == 0 || sizeof(T) == 4) prefetch(value);
          __m512 even, odd;
          expand_pair<Value>(value, mask[s * 8 + q], even, odd);
          sum[2 * q] = _mm512_fmadd_ps(even, a, sum[2 * q]);
          sum[2 * q + 1] = _mm512_fmadd_ps(odd, a, sum[2 * q + 1]);
        }
      }
    }
    for (int r = 0; r < 16; ++r) _mm512_store_ps(sums + r * 16, sum[r]);
    Panel<Float32>::finish(p, row_tile, 0, sums);
  }
}

// A token of rounded activations: high bytes + 128, low bytes, a unit per group, and whether the token must be computed
// exactly.
struct Rounded {
  explicit Rounded(const sbt::View& weight)
      : padded(weight.padded_cols()),
        groups(ceil_div(padded, kGroupCols)),
        stride(2 * padded + ceil_div((groups + 1) * 4, 64) * 64) {}

  const uint8_t* high(const void* base, int64_t token) const {
    return static_cast<const uint8_t*>(base) + token * stride;
  }
  const float* units(const void* base, int64_t token) const {
    return reinterpret_cast<const float*>(high(base, token) + 2 * padded);
  }
  bool exact(const void* base, int64_t token) const { return units(base, token)[groups] != 0; }

  void prepare(const Activations& x, int64_t cols, int64_t token, void* base) const {
    auto* bytes = static_cast<uint8_t*>(base) + token * stride;
    auto* unit = reinterpret_cast<float*>(bytes + 2 * padded);
    const char* from = static_cast<const char*>(x.data) + token * x.stride * size_of(x.dtype);
    unit[groups] = 0;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = g * kGroupCols;
      unit[g] = round_group<0x80>(from, x.dtype, first, cols, padded, bytes + first, bytes + padded + first);
      if (!is_nan(unit[g])) continue;
      unit[g] = 0;
      unit[groups] = 1;
    }
  }

  int64_t padded, groups, stride;
};

// int8 weights and rounded activations, a group of 128 columns at a time. A vector of weights is 4 rows x 16 columns,
// so an accumulator has 4 lanes per row, and all 16 rows are 4 accumulators. vpdpbusd wants one side unsigned: the high
// bytes carry + 128, and 128 * sum(weights), a third product that all tokens share, is taken off again.
struct Integer {
  static constexpr int kVectors = 4;
  static constexpr int64_t kSums = kVectors * 16;                      // floats per token
  static constexpr int64_t kGroupBytes = sbt::kTileRows * kGroupCols;  // of the panel

  // Where a group's weights come from: straight from the expansion, with the correction on the way, or from a panel.
  struct Expansion {
    static constexpr bool kFirst = true;
    Expansion(const sbt::View& weight, int64_t tile)
        : value(tile_values<uint8_t>(weight, tile)), mask(weight.mask + tile * sbt::kWords) {
      prefetch(mask);
      prefetch(mask + 16);
    }
    __m512i next(int64_t vector) {
      if (vector % 2 == 0) prefetch(value);
      const __m512i w = expand8(value, mask);
      mask += 2;
      return w;
    }
    const uint8_t* value;
    const uint32_t* mask;
  };
  struct Panel {
    static constexpr bool kFirst = false;
    __m512i next(int64_t) {
      const __m512i w = _mm512_load_si512(at);
      at += 64;
      return w;
    }
    const uint8_t* at;
  };

  template <int T>
  struct Accumulators {
    __m512i high[kVectors][T], low[kVectors][T], offset[kVectors];
  };

  static __m512i offset(__m512i sum, __m512i w) {
    return _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(static_cast<char>(128)), w);
  }

  // One macro tile; `x` points to the tokens' high bytes of its columns, `low` bytes from there to the low ones.
  template <int T, class Weights>
  static inline void tile(Weights& weights, const uint8_t* x, int64_t x_stride, int64_t low, Accumulators<T>& sum) {
#pragma GCC unroll 4
    for (int64_t s = 0; s < sbt::kSteps; ++s) {
      __m512i h[T], l[T];
      for (int t = 0; t < T; ++t) {
        const auto* at = reinterpret_cast<const __m128i*>(x + t * x_stride + s * sbt::kStepCols);
        h[t] = _mm512_broadcast_i32x4(_mm_load_si128(at));
        l[t] = _mm512_broadcast_i32x4(
            _mm_load_si128(reinterpret_cast<const __m128i*>(x + t * x_stride + low + s * sbt::kStepCols)));
      }
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const __m512i w = weights.next(v);
        if (Weights::kFirst) sum.offset[v] = offset(sum.offset[v], w);
        for (int t = 0; t < T; ++t) {
          sum.high[v][t] = _mm512_dpbusd_epi32(sum.high[v][t], h[t], w);
          sum.low[v][t] = _mm512_dpbusd_epi32(sum.low[v][t], l[t], w);
        }
      }
    }
  }

  // Adds a group's sums to those of the tokens; `scales` of the rows or null.
  template <int T>
  static inline void fold(const Accumulators<T>& sum, const float* units, int64_t units_stride, const __m512* scales,
                          float* sums) {
    const __m512i row_of_lane = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    for (int v = 0; v < kVectors; ++v) {
      __m512 scale = _mm512_set1_ps(1);
      if (scales) scale = _mm512_permutexvar_ps(_mm512_add_epi32(row_of_lane, _mm512_set1_epi32(4 * v)), *scales);
      for (int t = 0; t < T; ++t) {
        const __m512i high = _mm512_slli_epi32(_mm512_sub_epi32(sum.high[v][t], sum.offset[v]), 8);
        const __m512 total = _mm512_cvtepi32_ps(_mm512_add_epi32(high, sum.low[v][t]));
        const __m512 unit = _mm512_set1_ps(units[t * units_stride]);
        float* to = sums + t * kSums + v * 16;
        const __m512 factor = scales ? _mm512_mul_ps(unit, scale) : unit;
        _mm512_store_ps(to, _mm512_fmadd_ps(total, factor, _mm512_load_ps(to)));
      }
    }
  }

  // The sums of 4 lanes per row as 16 rows.
  static __m512 rows(const float* sums) {
    const __m512 v0 = _mm512_load_ps(sums), v1 = _mm512_load_ps(sums + 16);
    const __m512 v2 = _mm512_load_ps(sums + 32), v3 = _mm512_load_ps(sums + 48);
    const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(v0, v1), _mm512_unpackhi_ps(v0, v1));
    const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(v2, v3), _mm512_unpackhi_ps(v2, v3));
    const __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
    const __m512 out = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(c, d)),
                                     _mm512_castpd_ps(_mm512_unpackhi_pd(c, d)));  // [row % 4][row / 4]
    return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), out);
  }

  template <int T>
  static inline void clear(Accumulators<T>& sum) {
    for (int v = 0; v < kVectors; ++v)
      for (int t = 0; t < T; ++t) sum.high[v][t] = sum.low[v][t] = _mm512_setzero_si512();
  }

  // A few tokens straight from the expansion.
  template <int T>
  static void fused(const Product& p, int64_t begin, int64_t end, void* scratch) {
    const Rounded rounded(p.weight);
    const int64_t tiles = p.weight.col_tiles();
    auto* sums = static_cast<float*>(scratch);
    for (int64_t row_tile = begin; row_tile < end; ++row_tile) {
      std::memset(sums, 0, T * kSums * sizeof(float));
      for (int64_t c = 0; c < tiles; c += 2) {
        Accumulators<T> sum;
        clear(sum);
        for (auto& v : sum.offset) v = _mm512_setzero_si512();
        for (int64_t i = c; i < tiles && i < c + 2; ++i) {
          Expansion weights(p.weight, row_tile * tiles + i);
          tile<T>(weights, rounded.high(p.x, 0) + i * sbt::kTileCols, rounded.stride, rounded.padded, sum);
        }
        const __m512 scales = p.weight.grouped() ? row_scales(p.weight, row_tile, c) : _mm512_setzero_ps();
        fold<T>(sum, rounded.units(p.x, 0) + c / 2, rounded.stride / 4, p.weight.grouped() ? &scales : nullptr, sums);
      }
      for (int t = 0; t < T; ++t) store_sums(p, row_tile, t, rows(sums + t * kSums));
    }
  }

  template <int T>
  static void block(const uint8_t* panel, const __m512i* offsets, int64_t tiles, const Rounded& rounded, const void* x,
                    int64_t token, int64_t col_tile, const __m512* scales, float* sums) {
    Accumulators<T> sum;
    clear(sum);
    for (int v = 0; v < kVectors; ++v) sum.offset[v] = offsets[v];
    Panel weights{panel};
    for (int64_t i = 0; i < tiles; ++i)
      tile<T>(weights, rounded.high(x, token) + (col_tile + i) * sbt::kTileCols, rounded.stride, rounded.padded, sum);
    fold<T>(sum, rounded.units(x, token) + col_tile / 2, rounded.stride / 4, scales, sums);
  }

  // Many tokens, from a panel of one group.
  static void panel(const Product& p, int64_t begin, int64_t end, void* scratch) {
    const Rounded rounded(p.weight);
    const int64_t tiles = p.weight.col_tiles();
    auto* to = static_cast<uint8_t*>(scratch);
    auto* sums = reinterpret_cast<float*>(to + kGroupBytes);
    for (int64_t row_tile = begin; row_tile < end; ++row_tile) {
      for (int64_t token = 0; token < p.tokens; token += kTokensPerPass) {
        const int64_t pass = p.tokens - token < kTokensPerPass ? p.tokens - token : kTokensPerPass;
        std::memset(sums, 0, static_cast<size_t>(pass * kSums) * sizeof(float));
        for (int64_t c = 0; c < tiles; c += 2) {
          const int64_t width = tiles - c < 2 ? 1 : 2;
          __m512i offsets[kVectors];
          for (auto& v : offsets) v = _mm512_setzero_si512();
          for (int64_t i = 0; i < width; ++i) {
            Expansion weights(p.weight, row_tile * tiles + c + i);
            for (int64_t at = 0; at < sbt::kWords / 2; ++at) {
              const __m512i w = weights.next(at);
              offsets[at % kVectors] = offset(offsets[at % kVectors], w);
              _mm512_store_si512(to + (i * sbt::kWords / 2 + at) * 64, w);
            }
          }
          const __m512 scales = p.weight.grouped() ? row_scales(p.weight, row_tile, c) : _mm512_setzero_ps();
          const __m512* factor = p.weight.grouped() ? &scales : nullptr;
          int64_t t = 0;
          for (; t + 3 <= pass; t += 3)
            block<3>(to, offsets, width, rounded, p.x, token + t, c, factor, sums + t * kSums);
          if (t + 2 == pass) block<2>(to, offsets, width, rounded, p.x, token + t, c, factor, sums + t * kSums);
          if (t + 1 == pass) block<1>(to, offsets, width, rounded, p.x, token + t, c, factor, sums + t * kSums);
        }
        for (int64_t t = 0; t < pass; ++t) store_sums(p, row_tile, token + t, rows(sums + t * kSums));
      }
    }
  }

  static void product(const Product& p, int64_t begin, int64_t end, void* scratch) {
    if (p.tokens == 1) {
      fused<1>(p, begin, end, scratch);
    } else if (p.tokens == 2) {
      fused<2>(p, begin, end, scratch);
    } else {
      panel(p, begin, end, scratch);
    }
    const Rounded rounded(p.weight);
    for (int64_t t = 0; t < p.tokens; ++t)
      if (rounded.exact(p.x, t)) exact_integers(p, begin, end, t);
  }
};
static_assert(Integer::kGroupBytes + kTokensPerPass * Integer::kSums * 4 <= kScratchBytes, "panel and sums fit");
static_assert(kGroupCols == 2 * sbt::kTileCols, "a group is two macro tiles");

bool rounds(const Activations& x, const sbt::View& weight) {
  return weight.dtype == Dtype::int8 && x.dtype != Dtype::float32;
}

void product(const Product& p, int64_t begin, int64_t end, void* scratch) {
  if (p.weight.dtype == Dtype::bfloat16) {
    if (p.tokens == 1) return fused_bfloat16<1>(p, begin, end, scratch);
    if (p.tokens == 2) return fused_bfloat16<2>(p, begin, end, scratch);
    if (p.tokens == 3) return fused_bfloat16<3>(p, begin, end, scratch);
    if (p.tokens == 4) return fused_bfloat16<4>(p, begin, end, scratch);
    return Panel<SplitBfloat16>::product(p, begin, end, scratch);
  }
  if (rounds(p.given, p.weight)) return Integer::product(p, begin, end, scratch);
  if (p.tokens > 1) return Panel<Float32>::product(p, begin, end, scratch);
  if (p.weight.dtype == Dtype::int8) return exact_integers(p, begin, end, 0);
  if (p.weight.dtype == Dtype::float32) return fused_float32<Float32Value, uint32_t>(p, begin, end, scratch);
  fused_float32<Float16, uint16_t>(p, begin, end, scratch);
}

struct Words {
  static void expand(const sbt::View& weight, int64_t tile, uint8_t* to) {
    const uint8_t* value = tile_values<uint8_t>(weight, tile);
    const uint32_t* mask = weight.mask + tile * sbt::kWords;
    for (int64_t word = 0; word < sbt::kWords; word += 2, to += 64) _mm512_store_si512(to, expand8(value, mask + word));
  }
  static void expand(const sbt::View& weight, int64_t tile, uint16_t* to) {
    const uint16_t* value = tile_values<uint16_t>(weight, tile);
    const uint32_t* mask = weight.mask + tile * sbt::kWords;
    for (int64_t word = 0; word < sbt::kWords; ++word, to += 32) _mm512_store_si512(to, expand16(value, mask[word]));
  }
  static void expand(const sbt::View& weight, int64_t tile, uint32_t* to) {
    const uint32_t* value = tile_values<uint32_t>(weight, tile);
    const uint32_t* mask = weight.mask + tile * sbt::kWords;
    for (int64_t word = 0; word < sbt::kWords; ++word, to += 32) {
      _mm512_store_si512(to, expand32(value, mask[word]));
      _mm512_store_si512(to + 16, expand32(value, mask[word] >> 16));
    }
  }
};

// Splits every 16 activations into the even and the odd ones if kSplit.
template <bool kSplit>
void convert(const void* from, Dtype dtype, int64_t count, int64_t padded, float* to) {
  const __m512i split = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
  for (int64_t i = 0; i < padded; i += 16) {
    const __m512 v = widen16(from, i, count, dtype);
    _mm512_storeu_ps(to + i, kSplit ? _mm512_permutexvar_ps(split, v) : v);
  }
}

int64_t prepared_bytes(const Activations& x, const sbt::View& weight) {
  if (rounds(x, weight)) return x.tokens * Rounded(weight).stride;
  if (weight.dtype != Dtype::bfloat16) return row_bytes(x, weight);
  return x.tokens * weight.padded_cols() * static_cast<int64_t>(sizeof(float));
}

void prepare(const Activations& x, const sbt::View& weight, int64_t first, int64_t last, void* to) {
  if (rounds(x, weight)) {
    const Rounded rounded(weight);
    for (int64_t t = first; t < last; ++t) rounded.prepare(x, weight.cols, t, to);
    return;
  }
  if (weight.dtype == Dtype::bfloat16) return prepare_rows<convert<true>>(x, weight, first, last, to);
  prepare_rows<convert<false>>(x, weight, first, last, to);
}

}  // namespace

const Isa kAvx512 = {"avx512", product, expand_any<Words>, prepared_bytes, prepare};

}  // namespace alphaprune
