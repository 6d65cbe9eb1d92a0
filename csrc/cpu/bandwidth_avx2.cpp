// Read loops of 32-byte loads.
#include <immintrin.h>

#include "read_loop.h"

namespace alphaprune {
namespace {

struct Wide {
  using Vector = __m256i;
  static constexpr int kBytes = 32;
  static Vector zero() { return _mm256_setzero_si256(); }
  static Vector add(Vector sum, const char* p) {
    return _mm256_add_epi64(sum, _mm256_load_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static uint64_t total(Vector sum) {
    alignas(32) uint64_t words[4];
    _mm256_store_si256(reinterpret_cast<__m256i*>(words), sum);
    return words[0] + words[1] + words[2] + words[3];
  }
};

const ReadLoop kPlain = {"32-byte loads", read<Wide, Prefetch::none>};
const ReadLoop kNear = {"32-byte loads, prefetch into L1", read<Wide, Prefetch::near>};
const ReadLoop kFar = {"32-byte loads, prefetch into L2", read<Wide, Prefetch::far>};

}  // namespace

const ReadLoop* const kReadAvx2[] = {&kPlain, &kNear, &kFar, nullptr};

}  // namespace alphaprune
