// SBT on AVX-512 with BW, DQ and VL but without VBMI2, as Skylake and Cascade Lake servers have it: expansion through
// tables as on AVX2, the product of many tokens with vectors of 16.
#include "dense_floats.h"
#include "expand8.h"
#include "nonzeros.h"

namespace alphaprune {
namespace {

// An accumulator is a row.
struct Float32 {
  using Element = float;
  using Vector = __m512;
  static constexpr int64_t kLanes = 16, kVectors = 16, kStep = 16, kPanelTiles = 4, kGroup = 4, kBlock = 6;

  static Vector load(const float* p) { return _mm512_load_ps(p); }
  static void store(float* p, Vector v) { _mm512_store_ps(p, v); }
  static Vector weights(const float* p) { return _mm512_load_ps(p); }
  static Vector activations(const float* p) { return _mm512_loadu_ps(p); }
  static Vector multiply(Vector w, Vector x, Vector sum) { return _mm512_fmadd_ps(w, x, sum); }

  static void expand(const sbt::View& weight, int64_t tile, float* panel) {
    by_value(weight.dtype, [&](auto value) {
      each_eight<decltype(value)>(weight, tile, [&](int64_t byte, __m256 w) { _mm256_store_ps(panel + byte * 8, w); });
    });
  }
  static void finish(const Product& p, int64_t row_tile, int64_t token, const float* sums) {
    alignas(64) float out[sbt::kTileRows];
    for (int64_t r = 0; r < sbt::kTileRows; ++r)
      out[r] = sum8(_mm256_add_ps(_mm256_load_ps(sums + r * 16), _mm256_load_ps(sums + r * 16 + 8)));
    store_rows(p, row_tile, token, out);
  }
};

struct Sparse {
  using Vector = __m512;
  static constexpr int64_t kLanes = 16, kMostSums = 8;

  static Vector load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Vector v) { _mm512_storeu_ps(p, v); }
  static Vector zero() { return _mm512_setzero_ps(); }
  static Vector broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
  static Vector multiply(Vector w, Vector x, Vector sum) { return _mm512_fmadd_ps(w, x, sum); }

  // Byte offsets of the columns of a step.
  struct Columns {
    __m512i step[sbt::kSteps];
    explicit Columns(int32_t column) {
      const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      for (int s = 0; s < sbt::kSteps; ++s)
        step[s] = _mm512_mullo_epi32(_mm512_add_epi32(lanes, _mm512_set1_epi32(16 * s)), _mm512_set1_epi32(column));
    }
  };

  static __m512 widen(const uint16_t* p, Bfloat16) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
  }
  static __m512 widen(const uint16_t* p, Float16) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static __m512 widen(const uint32_t* p, Float32Value) { return _mm512_castsi512_ps(_mm512_loadu_si512(p)); }
  static __m512 widen(const uint8_t* p, Integer) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load16(p))); }

  static void append(const sbt::View& weight, int64_t tile, const Columns& columns, int32_t offset,
                     nonzeros::Lists& lists) {
    by_value(weight.dtype, [&](auto kind) {
      const auto* value = tile_values<typename decltype(kind)::Stored>(weight, tile);
      const uint32_t* mask = weight.mask + tile * sbt::kWords;
      for (int64_t step = 0; step < sbt::kSteps; ++step) {
        const __m512i here = _mm512_add_epi32(columns.step[step], _mm512_set1_epi32(offset));
        for (int64_t row = 0; row < sbt::kTileRows; ++row) {
          const auto bits = static_cast<__mmask16>(mask[step * sbt::kPairs + row / 2] >> (row % 2 * 16));
          const int32_t count = lists.count[row];
          _mm512_storeu_ps(lists.value[row] + count, widen(value, kind));
          _mm512_storeu_si512(lists.offset[row] + count, _mm512_maskz_compress_epi32(bits, here));
          const int32_t more = __builtin_popcount(bits);
          value += more;
          lists.count[row] = count + more;
        }
      }
    });
  }
};
using Many = nonzeros::Nonzeros<Sparse>;

// Up to so many tokens the product straight from registers is faster than the panel: on a Zen 5 4 of bfloat16 1.2
// times, 8 are not.
constexpr int kMostFused = 4;

// In cycles per 8 weights, as measured on Cascade Lake: a panel costs 4 and 0.47 per token.
bool skips_zeros(const sbt::View& weight, int64_t tokens) {
  if (tokens <= kMostFused) return false;
  const double panel =
      4 * static_cast<double>(nonzeros::Blocks(tokens, Sparse::kLanes).count) + 0.47 * static_cast<double>(tokens);
  return nonzeros::cycles(weight, tokens, Sparse::kLanes) < panel;
}

// A token whose sums have 8 lanes per row.
void finish8(const Product& p, int64_t row_tile, int64_t token, const float* sums) {
  alignas(64) float out[sbt::kTileRows];
  for (int64_t r = 0; r < sbt::kTileRows; ++r) out[r] = sum8(_mm256_load_ps(sums + r * 8));
  store_rows(p, row_tile, token, out);
}

void product(const Product& p, int64_t begin, int64_t end, void* scratch) {
  if (skips_zeros(p.weight, p.tokens)) return Many::product(p, begin, end, scratch);
  if (p.tokens > kMostFused) return Panel<Float32>::product(p, begin, end, scratch);
  product_fused<kMostFused>(p, begin, end, scratch, finish8);
}

int64_t prepared_bytes(const Activations& x, const sbt::View& weight) {
  return skips_zeros(weight, x.tokens) ? Many::bytes(x, weight) : row_bytes(x, weight);
}

void prepare(const Activations& x, const sbt::View& weight, int64_t first, int64_t last, void* to) {
  if (skips_zeros(weight, x.tokens)) return Many::prepare(x, weight, first, to, convert);
  prepare_rows<convert>(x, weight, first, last, to);
}

int layout(const Activations& x, const sbt::View& weight) { return skips_zeros(weight, x.tokens); }

template <class Value>
struct Wide {
  static __m512 load(const uint16_t* p) { return Sparse::widen(p, Value()); }
};
constexpr auto* dense = dense_floats<Float32, Wide<Bfloat16>, Wide<Float16>>;

}  // namespace

const Isa kAvx512bw = {"avx512bw", product, expand_any<Words8>, prepared_bytes, prepare, &kStepAvx512bw,
                       layout,     dense,   dense_as_floats,    convert};

}  // namespace alphaprune
