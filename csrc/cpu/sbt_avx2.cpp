// SBT on AVX2 with FMA and F16C: in float32, but for int8 weights beside some activations of 16 bits, which are rounded
// to integers where the zeros are not skipped.
#include "dense_floats.h"
#include "expand8.h"
#include "nonzeros.h"
#include "words.h"

namespace alphaprune {
namespace {

// A step is 8 columns here, so the panel is [step of 8][16 rows][8]; an accumulator is a row.
struct Float32 {
  using Element = float;
  using Vector = __m256;
  static constexpr int64_t kLanes = 8, kVectors = 16, kStep = 8, kPanelTiles = 4, kGroup = 4, kBlock = 3;
  static constexpr int64_t kStepElements = sbt::kTileRows * kStep;

  static Vector load(const float* p) { return _mm256_load_ps(p); }
  static void store(float* p, Vector v) { _mm256_store_ps(p, v); }
  static Vector weights(const float* p) { return _mm256_load_ps(p); }
  static Vector activations(const float* p) { return _mm256_loadu_ps(p); }
  static Vector multiply(Vector w, Vector x, Vector sum) { return _mm256_fmadd_ps(w, x, sum); }

  static void expand(const sbt::View& weight, int64_t tile, float* panel) {
    by_value(weight.dtype, [&](auto value) {
      each_eight<decltype(value)>(weight, tile, [&](int64_t byte, __m256 w) {
        // Mask bytes come as [step of 16][row][half of the 16 columns].
        const int64_t step = byte / 32 * 2 + byte % 2, row = byte / 2 % 16;
        _mm256_store_ps(panel + step * kStepElements + row * kStep, w);
      });
    });
  }
  static void finish(const Product& p, int64_t row_tile, int64_t token, const float* sums) {
    float out[sbt::kTileRows];
    for (int64_t r = 0; r < sbt::kTileRows; ++r) out[r] = sum8(_mm256_load_ps(sums + r * kLanes));
    store_rows(p, row_tile, token, out);
  }
};

// Eight at a time: for a mask byte, which lanes of a vector are kept, in order.
struct Kept {
  alignas(8) uint8_t lanes[256][8];
  constexpr Kept() : lanes() {
    for (int mask = 0; mask < 256; ++mask)
      for (int lane = 0, next = 0; lane < 8; ++lane)
        if (mask >> lane & 1) lanes[mask][next++] = static_cast<uint8_t>(lane);
  }
};
constexpr Kept kKept;

struct Sparse {
  using Vector = __m256;
  static constexpr int64_t kLanes = 8, kMostSums = 8;

  static Vector load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Vector v) { _mm256_storeu_ps(p, v); }
  static Vector zero() { return _mm256_setzero_ps(); }
  static Vector broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
  static Vector multiply(Vector w, Vector x, Vector sum) { return _mm256_fmadd_ps(w, x, sum); }

  // Byte offsets of the columns of half a step.
  struct Columns {
    __m256i half[2 * sbt::kSteps];
    explicit Columns(int32_t column) {
      const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
      for (int h = 0; h < 2 * sbt::kSteps; ++h)
        half[h] = _mm256_mullo_epi32(_mm256_add_epi32(lanes, _mm256_set1_epi32(8 * h)), _mm256_set1_epi32(column));
    }
  };

  static __m256 widen(const uint16_t* p, Bfloat16) { return Bfloat16::widen(load16(p)); }
  static __m256 widen(const uint16_t* p, Float16) { return Float16::widen(load16(p)); }
  static __m256 widen(const uint32_t* p, Float32Value) { return _mm256_loadu_ps(reinterpret_cast<const float*>(p)); }
  static __m256 widen(const uint8_t* p, Integer) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(load8(p))); }

  static void append(const sbt::View& weight, int64_t tile, const Columns& columns, int32_t offset,
                     nonzeros::Lists& lists) {
    by_value(weight.dtype, [&](auto kind) {
      const auto* value = tile_values<typename decltype(kind)::Stored>(weight, tile);
      const auto* mask = reinterpret_cast<const uint8_t*>(weight.mask + tile * sbt::kWords);
      for (int64_t byte = 0; byte < 4 * sbt::kWords; ++byte) {
        const int64_t row = byte / 2 % sbt::kTileRows, half = byte / 32 * 2 + byte % 2;
        const int32_t count = lists.count[row], more = __builtin_popcount(mask[byte]);
        const __m256i kept = _mm256_cvtepu8_epi32(load8(kKept.lanes[mask[byte]]));
        _mm256_storeu_ps(lists.value[row] + count, widen(value, kind));
        _mm256_storeu_si256(
            reinterpret_cast<__m256i*>(lists.offset[row] + count),
            _mm256_add_epi32(_mm256_permutevar8x32_epi32(columns.half[half], kept), _mm256_set1_epi32(offset)));
        value += more;
        lists.count[row] = count + more;
      }
    });
  }
};
using Many = nonzeros::Nonzeros<Sparse>;

// Up to so many tokens the product straight from registers is the fastest, of integers up to so many: as measured on a
// Zen 5. With 7 of bfloat16 the panel takes 1.2 times as long, with 8 less.
constexpr int kMostFused = 7;
constexpr int64_t kMostFusedIntegers = 3;

// In cycles per 8 weights, as measured on a Zen 5: a panel costs 3 and 0.55 per token, of integers 1.6 and 0.33.
bool skips_zeros(const Activations& x, const sbt::View& weight) {
  const bool integers = words::takes(x, weight);
  if (x.tokens <= (integers ? 4 : kMostFused)) return false;
  const auto tokens = static_cast<double>(x.tokens);
  const auto passes = static_cast<double>(ceil_div(x.tokens, integers ? kPanelPass : kTokensPerPass));
  const double panel = integers ? 1.6 * passes + 0.33 * tokens : 3 * passes + 0.55 * tokens;
  return nonzeros::cycles(weight, x.tokens, Sparse::kLanes) < panel;
}

// How a product is computed, which is the layout of its activations.
enum class Way { rows, nonzeros, words };
Way way_of(const Activations& x, const sbt::View& weight) {
  if (skips_zeros(x, weight)) return Way::nonzeros;
  return words::takes(x, weight) && x.tokens > kMostFusedIntegers ? Way::words : Way::rows;
}

void product(const Product& p, int64_t begin, int64_t end, void* scratch) {
  const Way way = way_of(p.given, p.weight);
  if (way == Way::nonzeros) return Many::product(p, begin, end, scratch);
  if (way == Way::words) return words::product(p, begin, end, scratch);
  if (p.tokens > kMostFused) return Panel<Float32>::product(p, begin, end, scratch);
  product_fused<kMostFused>(p, begin, end, scratch, Float32::finish);
}

int64_t prepared_bytes(const Activations& x, const sbt::View& weight) {
  const Way way = way_of(x, weight);
  if (way == Way::nonzeros) return Many::bytes(x, weight);
  return way == Way::words ? words::Made(weight, x.tokens).bytes() : row_bytes(x, weight);
}

void prepare(const Activations& x, const sbt::View& weight, int64_t first, int64_t last, void* to) {
  const Way way = way_of(x, weight);
  if (way == Way::nonzeros) return Many::prepare(x, weight, first, to, convert);
  if (way == Way::words) return words::prepare(x, weight, first, last, to);
  prepare_rows<convert>(x, weight, first, last, to);
}

int layout(const Activations& x, const sbt::View& weight) { return static_cast<int>(way_of(x, weight)); }

template <class Value>
struct Wide {
  static __m256 load(const uint16_t* p) { return Value::widen(load16(p)); }
};
constexpr auto* dense = dense_floats<Float32, Wide<Bfloat16>, Wide<Float16>>;

}  // namespace

const Isa kAvx2 = {"avx2", product, expand_any<Words8>, prepared_bytes, prepare, &kStepAvx2,
                   layout, dense,   dense_as_floats,    convert};

}  // namespace alphaprune
