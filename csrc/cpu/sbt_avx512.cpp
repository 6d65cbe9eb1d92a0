// SBT on AVX-512 with VBMI2: one vpexpandw per mask word of 16-bit values, two vpexpandd of float32; VDPBF16PS where
// weights and activations are bfloat16 and the CPU has it (dispatch.cpp asks; nothing else here needs AVX512_BF16).
#include <immintrin.h>

#include "panel.h"

namespace alphaprune {
namespace {

template <class T>
inline const T* tile_values(const sbt::View& weight, int64_t tile) {
  return static_cast<const T*>(weight.values) + static_cast<int64_t>(weight.offsets[tile]) * sbt::kUnit;
}

// The 32 weights of a word, zeros where the mask has none. The load is a whole vector: the values end in a readable
// tail of 64 bytes.
inline __m512i expand16(const uint16_t*& value, uint32_t mask) {
  const __m512i dense = _mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(value));
  value += __builtin_popcount(mask);
  return dense;
}

inline __m512i expand32(const uint32_t*& value, uint32_t mask) {
  const __m512i dense = _mm512_maskz_expand_epi32(static_cast<__mmask16>(mask), _mm512_loadu_si512(value));
  value += __builtin_popcount(mask & 0xffffu);
  return dense;
}

struct Bfloat16 {
  static __m512 widen(__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }
};
struct Float16 {
  static __m512 widen(__m256i v) { return _mm512_cvtph_ps(v); }
};

// The two rows of a word as float32.
template <class Value>
inline void expand_pair(const uint16_t*& value, uint32_t mask, __m512& even, __m512& odd) {
  const __m512i dense = expand16(value, mask);
  even = Value::widen(_mm512_castsi512_si256(dense));
  odd = Value::widen(_mm512_extracti64x4_epi64(dense, 1));
}
struct Float32Value;
template <class Value>
inline void expand_pair(const uint32_t*& value, uint32_t mask, __m512& even, __m512& odd) {
  even = _mm512_castsi512_ps(expand32(value, mask));
  odd = _mm512_castsi512_ps(expand32(value, mask >> 16));
}

inline float sum8(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

// Activations and weights as float32; an accumulator is a row.
struct Float32 {
  using Vector = __m512;
  using Element = float;
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
    for (int64_t word = 0; word < sbt::kWords; ++word, panel += 32) {
      __m512 even, odd;
      expand_pair<Value>(value, mask[word], even, odd);
      _mm512_store_ps(panel, even);
      _mm512_store_ps(panel + 16, odd);
    }
  }
  static void expand(const sbt::View& weight, int64_t tile, float* panel) {
    if (weight.dtype == Dtype::float32) return expand_tile<Float32Value, uint32_t>(weight, tile, panel);
    if (weight.dtype == Dtype::bfloat16) return expand_tile<Bfloat16, uint16_t>(weight, tile, panel);
    expand_tile<Float16, uint16_t>(weight, tile, panel);
  }
  static void rows(const float* sums, float* out) {
    for (int64_t r = 0; r < sbt::kTileRows; ++r)
      out[r] = sum8(_mm256_add_ps(_mm256_load_ps(sums + r * 16), _mm256_load_ps(sums + r * 16 + 8)));
  }
};

// bfloat16 pairs; an accumulator is a word: 8 lanes of the even row, 8 of the odd one, each lane two columns.
struct DotBfloat16 {
  using Vector = __m512;
  using Element = uint16_t;
  static constexpr int64_t kLanes = 16, kVectors = 8, kStep = 16, kPanelTiles = 8, kGroup = 4, kBlock = 6;

  static Vector load(const float* p) { return _mm512_load_ps(p); }
  static void store(float* p, Vector v) { _mm512_store_ps(p, v); }
  static __m512i weights(const uint16_t* p) { return _mm512_load_si512(p); }
  static __m512i activations(const uint16_t* p) {
    return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static Vector multiply(__m512i w, __m512i x, Vector sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(x));
  }
  static void expand(const sbt::View& weight, int64_t tile, uint16_t* panel) {
    const uint16_t* value = tile_values<uint16_t>(weight, tile);
    const uint32_t* mask = weight.mask + tile * sbt::kWords;
    for (int64_t word = 0; word < sbt::kWords; ++word)
      _mm512_store_si512(panel + word * 32, expand16(value, mask[word]));
  }
  static void rows(const float* sums, float* out) {
    for (int64_t r = 0; r < sbt::kTileRows; ++r) out[r] = sum8(_mm256_load_ps(sums + r * 8));
  }
};

// Asks for what lies `kAhead` bytes on, one cache line per two words: at half density exactly the lines to come.
constexpr int64_t kAhead = 4096;
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p) + kAhead, _MM_HINT_T0); }

// A few tokens straight from the expanded registers, without a panel; the sums are those of the panel, bit for bit.
template <int T>
void fused_dot(const Product& p, int64_t begin, int64_t end, void* scratch) {
  auto* sums = static_cast<float*>(scratch);
  const auto* x = static_cast<const uint16_t*>(p.x);
  const int64_t tiles = p.weight.col_tiles();
  for (int64_t row_tile = begin; row_tile < end; ++row_tile) {
    __m512 sum[8][T];
    for (auto& pair : sum)
      for (auto& v : pair) v = _mm512_setzero_ps();
    const uint32_t* mask = p.weight.mask + row_tile * tiles * sbt::kWords;
    for (int64_t c = 0; c < tiles; ++c, mask += sbt::kWords) {
      const uint16_t* value = tile_values<uint16_t>(p.weight, row_tile * tiles + c);
      prefetch(mask);
      prefetch(mask + 16);
#pragma GCC unroll 4
      for (int s = 0; s < 4; ++s) {
        __m512i a[T];
        for (int t = 0; t < T; ++t) a[t] = DotBfloat16::activations(x + t * p.x_stride + c * sbt::kTileCols + s * 16);
#pragma GCC unroll 8
        for (int q = 0; q < 8; ++q) {
          if (q % 2 == 0) prefetch(value);
          const __m512i w = expand16(value, mask[s * 8 + q]);
          for (int t = 0; t < T; ++t) sum[q][t] = DotBfloat16::multiply(w, a[t], sum[q][t]);
        }
      }
    }
    for (int t = 0; t < T; ++t) {
      for (int q = 0; q < 8; ++q) _mm512_store_ps(sums + q * 16, sum[q][t]);
      Panel<DotBfloat16>::finish(p, row_tile, t, sums);
    }
  }
}

template <class Value, class T>
void fused_float32(const Product& p, int64_t begin, int64_t end, void* scratch) {
  auto* sums = static_cast<float*>(scratch);
  const auto* x = static_cast<const float*>(p.x);
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
        const __m512 a = _mm512_loadu_ps(x + c * sbt::kTileCols + s * 16);
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

void product(const Product& p, int64_t begin, int64_t end, void* scratch) {
  if (p.dot_bf16) {
    if (p.tokens == 1) return fused_dot<1>(p, begin, end, scratch);
    if (p.tokens == 2) return fused_dot<2>(p, begin, end, scratch);
    return Panel<DotBfloat16>::product(p, begin, end, scratch);
  }
  if (p.tokens > 1) return Panel<Float32>::product(p, begin, end, scratch);
  if (p.weight.dtype == Dtype::float32) return fused_float32<Float32Value, uint32_t>(p, begin, end, scratch);
  if (p.weight.dtype == Dtype::bfloat16) return fused_float32<Bfloat16, uint16_t>(p, begin, end, scratch);
  fused_float32<Float16, uint16_t>(p, begin, end, scratch);
}

struct Words {
  static void expand(const sbt::View& weight, int64_t tile, uint16_t* to) { DotBfloat16::expand(weight, tile, to); }
  static void expand(const sbt::View& weight, int64_t tile, uint32_t* to) {
    const uint32_t* value = tile_values<uint32_t>(weight, tile);
    const uint32_t* mask = weight.mask + tile * sbt::kWords;
    for (int64_t word = 0; word < sbt::kWords; ++word, to += 32) {
      _mm512_store_si512(to, expand32(value, mask[word]));
      _mm512_store_si512(to + 16, expand32(value, mask[word] >> 16));
    }
  }
};

void expand(const sbt::View& weight, int64_t begin, int64_t end, void* out) {
  if (weight.dtype == Dtype::float32)
    return expand_rows<uint32_t, Words>(weight, begin, end, static_cast<uint32_t*>(out));
  expand_rows<uint16_t, Words>(weight, begin, end, static_cast<uint16_t*>(out));
}

void widen(const void* from, Dtype dtype, int64_t count, float* to) {
  int64_t i = 0;
  if (dtype != Dtype::float32) {
    const auto* halves = static_cast<const uint16_t*>(from);
    for (; i + 16 <= count; i += 16) {
      const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves + i));
      _mm512_storeu_ps(to + i, dtype == Dtype::bfloat16 ? Bfloat16::widen(v) : Float16::widen(v));
    }
  }
  for (; i < count; ++i) to[i] = load_float(from, i, dtype);
}

}  // namespace

const Isa kAvx512 = {"avx512", true, product, expand, widen};

}  // namespace alphaprune
