// Attention of a decode step on AVX-512: 16 vectors of sums beside 16 of what is multiplied.
#include "attention_loop.h"
#include "avx512.h"

namespace alphaprune {
namespace {

struct Wide : Lanes<16, 16> {
  using Lanes::load;
  using Lanes::round;
  using Lanes::store;
  static V load(const uint16_t* p) { return Bfloat16::widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static V load(const Binary16* p) { return Float16::widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static void store(Binary16* p, V v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), halves(v)); }
  static V round(V v, Binary16) { return Float16::widen(halves(v)); }
  static __m256i halves(V v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static void sums(const V* v, float* to) {
    const __m512d ab = _mm512_castps_pd(half_fours(v[0], v[1])), cd = _mm512_castps_pd(half_fours(v[2], v[3]));
    const __m512 four = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)),
                                      _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));  // in each quarter
    const __m256 two = _mm256_add_ps(_mm512_castps512_ps256(four), _mm512_extractf32x8_ps(four, 1));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(two), _mm256_extractf128_ps(two, 1)));
  }
};

}  // namespace

const StepLoops kStepAvx512bw = {AnyLoop<Wide>::rotate, AnyLoop<Wide>::chunk, AnyLoop<Wide>::norm,
                                 AnyLoop<Wide>::swiglu};

}  // namespace alphaprune
