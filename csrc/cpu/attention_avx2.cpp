// Attention of a decode step on AVX2: half of its 16 registers are sums.
#include <immintrin.h>

#include "attention_loop.h"

namespace alphaprune {
namespace {

struct Half : Lanes<8, 8> {
  using Lanes::load;
  using Lanes::round;
  using Lanes::store;
  static V load(const Binary16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static void store(Binary16* p, V v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), halves(v)); }
  static V round(V v, Binary16) { return _mm256_cvtph_ps(halves(v)); }
  static __m128i halves(V v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
  static void sums(const V* v, float* to) {
    const __m256 four = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));  // in each half
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps(four, 1)));
  }
};

}  // namespace

const StepLoops kStepAvx2 = {AnyLoop<Half>::rotate, AnyLoop<Half>::chunk, AnyLoop<Half>::norm, AnyLoop<Half>::swiglu};

}  // namespace alphaprune
