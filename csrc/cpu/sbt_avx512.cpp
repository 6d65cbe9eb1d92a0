// SBT on AVX-512 with VBMI2 and VNNI: one vpexpandw per mask word of 16-bit values, two vpexpandd of float32, then FMA;
// one vpexpandb per two words of int8, then vpdpbusd.
#include "integer.h"
#include "vbmi2.h"

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
  using Element = float;
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
  static void finish(const Product& p, int64_t row_tile, int64_t token, const float* sums) {
    store_sums(p, row_tile, token, sum_rows(Vectors<kVectors>(sums).v));
  }
};

// bfloat16 weights: the even columns of a word become float32 by a shift, the odd ones by clearing the low half, so an
// accumulator is a word, 8 lanes of the even row and 8 of the odd one. Activations lie in steps of [8 even][8 odd].
// VDPBF16PS would be one instruction (sbt_avx512bf16.cpp), but on Sapphire Rapids it runs at a third of the FMA rate.
struct SplitBfloat16 {
  using Element = float;
  using Vector = __m512;
  struct Both {
    __m512 even, odd;
  };
  static constexpr int64_t kLanes = 16, kVectors = 8, kStep = 16, kPanelTiles = 4, kGroup = 4, kBlock = 4;
  static constexpr int kMostFused = 6;  // tokens straight from registers, as long as that is the fastest

  static bool narrow(const uint32_t*) { return false; }
  static Vector load(const float* p) { return _mm512_load_ps(p); }
  static void store(float* p, Vector v) { _mm512_store_ps(p, v); }
  static Both dense(__m512i w) {
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
      const Both w = dense(expand16(value, mask[word]));
      _mm512_store_ps(panel, w.even);
      _mm512_store_ps(panel + 16, w.odd);
    }
  }
  static void finish(const Product& p, int64_t row_tile, int64_t token, const float* sums) {
    store_sums(p, row_tile, token, sum_eights(Vectors<kVectors>(sums).v));
  }
};

template <class Value, class T>
void fused_float32(const Product& p, int64_t begin, int64_t end) {
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
    store_sums(p, row_tile, 0, sum_rows(sum));
  }
}

// Whether the zeros are skipped as they are without VBMI2, whose expansion makes the panel cheaper: up to the density
// at which both take as long on a Zen 4, a fifth at 16 tokens and a half at 64.
bool skips_zeros(const Activations& x, const sbt::View& weight) {
  if (x.tokens < kTokenBlock || rounds(x, weight) || !kAvx512bw.layout(x, weight)) return false;
  const double tokens = static_cast<double>(x.tokens) / static_cast<double>(ceil_div(x.tokens, kTokensPerPass));
  return density_of(weight) < (0.4 + 0.11 * tokens) / (9 + 0.1 * tokens);
}

void product(const Product& p, int64_t begin, int64_t end, void* scratch) {
  if (skips_zeros(p.given, p.weight)) return kAvx512bw.product(p, begin, end, scratch);
  if (p.weight.dtype == Dtype::bfloat16) {
    if (p.tokens > SplitBfloat16::kMostFused) return Panel<SplitBfloat16>::product(p, begin, end, scratch);
    if (p.tokens <= 4) return fused_few<SplitBfloat16, AsksNear<>, 1, 4>(p, begin, end, scratch);
    // Of which rows take turns.
    return fused_few<SplitBfloat16, AsksNear<true>, 5, SplitBfloat16::kMostFused>(p, begin, end, scratch);
  }
  if (rounds(p.given, p.weight)) return integer_product<NearBytes>(p, begin, end, scratch);
  if (p.tokens > 1) return Panel<Float32>::product(p, begin, end, scratch);
  if (p.weight.dtype == Dtype::int8) return exact_integers<NearBytes>(p, begin, end, 0);
  if (p.weight.dtype == Dtype::float32) return fused_float32<Float32Value, uint32_t>(p, begin, end);
  fused_float32<Float16, uint16_t>(p, begin, end);
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
  if (skips_zeros(x, weight)) return kAvx512bw.prepared_bytes(x, weight);
  if (rounds(x, weight)) return integer_bytes(x, weight);
  if (weight.dtype != Dtype::bfloat16) return row_bytes(x, weight);
  return x.tokens * weight.padded_cols() * static_cast<int64_t>(sizeof(float));
}

void prepare(const Activations& x, const sbt::View& weight, int64_t first, int64_t last, void* to) {
  if (skips_zeros(x, weight)) return kAvx512bw.prepare(x, weight, first, last, to);
  if (rounds(x, weight)) return prepare_integers(x, weight, first, last, to);
  if (weight.dtype == Dtype::bfloat16) return prepare_rows<convert<true>>(x, weight, first, last, to);
  prepare_rows<convert<false>>(x, weight, first, last, to);
}

void dense(const Product& p, int64_t begin, int64_t end, void* scratch) { kAvx512bw.dense(p, begin, end, scratch); }
DenseRows dense_rows(Dtype dtype) { return kAvx512bw.dense_rows(dtype); }

int layout(const Activations& x, const sbt::View& weight) {
  return weight.to_bytes ? kBytesLayout : skips_zeros(x, weight);
}

}  // namespace

const Isa kAvx512 = {"avx512", product, expand_any<Words>, prepared_bytes, prepare, &kStepAvx512bw,
                     layout,   dense,   dense_rows,        convert<false>};

}  // namespace alphaprune
