// SBT on AVX2 with FMA and F16C: eight mask bits at a time through a table, vpshufb for 16-bit values, vpermd for 32.
#include <immintrin.h>

#include "panel.h"

namespace alphaprune {
namespace {

template <class T>
inline const T* tile_values(const sbt::View& weight, int64_t tile) {
  return static_cast<const T*>(weight.values) + static_cast<int64_t>(weight.offsets[tile]) * sbt::kUnit;
}

// For every 8-bit mask: lane -> index of its value, 0x80 where there is none. vpshufb writes zero for an index with
// the top bit set, so the 16-bit table expands and clears in one instruction.
struct Tables {
  alignas(32) uint8_t bytes16[256][16];
  alignas(32) int8_t lanes32[256][8];
  constexpr Tables() : bytes16(), lanes32() {
    for (int mask = 0; mask < 256; ++mask) {
      int next = 0;
      for (int lane = 0; lane < 8; ++lane) {
        const bool kept = mask >> lane & 1;
        bytes16[mask][2 * lane] = static_cast<uint8_t>(kept ? 2 * next : 0x80);
        bytes16[mask][2 * lane + 1] = static_cast<uint8_t>(kept ? 2 * next + 1 : 0x80);
        lanes32[mask][lane] = static_cast<int8_t>(kept ? next : -128);
        next += kept;
      }
    }
  }
};
constexpr Tables kTables;

inline __m128i expand16(const uint16_t*& value, uint32_t mask) {
  const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(value));
  value += __builtin_popcount(mask);
  return _mm_shuffle_epi8(packed, _mm_load_si128(reinterpret_cast<const __m128i*>(kTables.bytes16[mask])));
}

inline __m256i expand32(const uint32_t*& value, uint32_t mask) {
  const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(value));
  const __m256i lanes = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kTables.lanes32[mask])));
  value += __builtin_popcount(mask);
  return _mm256_andnot_si256(_mm256_srai_epi32(lanes, 31), _mm256_permutevar8x32_epi32(packed, lanes));
}

// Asks for what lies `kAhead` bytes on; with 16-bit values at half density, one cache line per two words is all of it.
constexpr int64_t kAhead = 4096;
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p) + kAhead, _MM_HINT_T0); }

struct Float32Value {
  using Stored = uint32_t;
  static __m256 eight(const uint32_t*& value, uint32_t mask) { return _mm256_castsi256_ps(expand32(value, mask)); }
};
struct Bfloat16 {
  using Stored = uint16_t;
  static __m256 widen(__m128i v) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16)); }
  static __m256 eight(const uint16_t*& value, uint32_t mask) { return widen(expand16(value, mask)); }
};
struct Float16 {
  using Stored = uint16_t;
  static __m256 widen(__m128i v) { return _mm256_cvtph_ps(v); }
  static __m256 eight(const uint16_t*& value, uint32_t mask) { return widen(expand16(value, mask)); }
};

inline float sum8(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

// A step is 8 columns here, so the panel is [step of 8][16 rows][8]; an accumulator is a row.
struct Float32 {
  using Vector = __m256;
  static constexpr int64_t kLanes = 8, kVectors = 16, kStep = 8, kPanelTiles = 4, kGroup = 4, kBlock = 3;
  static constexpr int64_t kStepElements = sbt::kTileRows * kStep;

  static Vector load(const float* p) { return _mm256_load_ps(p); }
  static void store(float* p, Vector v) { _mm256_store_ps(p, v); }
  static Vector weights(const float* p) { return _mm256_load_ps(p); }
  static Vector activations(const float* p) { return _mm256_loadu_ps(p); }
  static Vector multiply(Vector w, Vector x, Vector sum) { return _mm256_fmadd_ps(w, x, sum); }

  template <class Value>
  static void expand_tile(const sbt::View& weight, int64_t tile, float* panel) {
    const auto* value = tile_values<typename Value::Stored>(weight, tile);
    const uint32_t* mask = weight.mask + tile * sbt::kWords;
    prefetch(mask);
    prefetch(mask + 16);
    for (int64_t step = 0; step < sbt::kSteps; ++step, panel += 2 * kStepElements) {
      for (int64_t pair = 0; pair < sbt::kPairs; ++pair) {
        if (pair % 2 == 0 || sizeof(*value) == 4) prefetch(value);
        const uint32_t word = *mask++;
        float* to = panel + 2 * pair * kStep;
        _mm256_store_ps(to, Value::eight(value, word & 0xff));
        _mm256_store_ps(to + kStepElements, Value::eight(value, word >> 8 & 0xff));
        _mm256_store_ps(to + kStep, Value::eight(value, word >> 16 & 0xff));
        _mm256_store_ps(to + kStepElements + kStep, Value::eight(value, word >> 24));
      }
    }
  }
  static void expand(const sbt::View& weight, int64_t tile, float* panel) {
    if (weight.dtype == Dtype::float32) return expand_tile<Float32Value>(weight, tile, panel);
    if (weight.dtype == Dtype::bfloat16) return expand_tile<Bfloat16>(weight, tile, panel);
    expand_tile<Float16>(weight, tile, panel);
  }
  static void rows(const float* sums, float* out) {
    for (int64_t r = 0; r < sbt::kTileRows; ++r) out[r] = sum8(_mm256_load_ps(sums + r * 8));
  }
};

struct Words {
  static void expand(const sbt::View& weight, int64_t tile, uint16_t* to) {
    const uint16_t* value = tile_values<uint16_t>(weight, tile);
    const auto* mask = reinterpret_cast<const uint8_t*>(weight.mask + tile * sbt::kWords);
    for (int64_t byte = 0; byte < 4 * sbt::kWords; ++byte, to += 8)
      _mm_store_si128(reinterpret_cast<__m128i*>(to), expand16(value, mask[byte]));
  }
  static void expand(const sbt::View& weight, int64_t tile, uint32_t* to) {
    const uint32_t* value = tile_values<uint32_t>(weight, tile);
    const auto* mask = reinterpret_cast<const uint8_t*>(weight.mask + tile * sbt::kWords);
    for (int64_t byte = 0; byte < 4 * sbt::kWords; ++byte, to += 8)
      _mm256_store_si256(reinterpret_cast<__m256i*>(to), expand32(value, mask[byte]));
  }
};

void expand(const sbt::View& weight, int64_t begin, int64_t end, void* out) {
  if (weight.dtype == Dtype::float32)
    return expand_rows<uint32_t, Words>(weight, begin, end, static_cast<uint32_t*>(out));
  expand_rows<uint16_t, Words>(weight, begin, end, static_cast<uint16_t*>(out));
}

void prepare(const void* from, Dtype dtype, int64_t count, int64_t padded, Dtype, float* to) {
  int64_t i = 0;
  if (dtype != Dtype::float32) {
    const auto* halves = static_cast<const uint16_t*>(from);
    for (; i + 8 <= count; i += 8) {
      const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(halves + i));
      _mm256_storeu_ps(to + i, dtype == Dtype::bfloat16 ? Bfloat16::widen(v) : Float16::widen(v));
    }
  }
  for (; i < count; ++i) to[i] = load_float(from, i, dtype);
  for (; i < padded; ++i) to[i] = 0;
}

bool as_they_are(Dtype) { return true; }

}  // namespace

const Isa kAvx2 = {"avx2", Panel<Float32>::product, expand, prepare, as_they_are};

}  // namespace alphaprune
