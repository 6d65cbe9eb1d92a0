// Read loops of 64-byte loads.
#include <immintrin.h>

#include "read_loop.h"

namespace alphaprune {
namespace {

struct Wide {
  using Vector = __m512i;
  static constexpr int kBytes = 64;
  static Vector zero() { return _mm512_setzero_si512(); }
  static Vector add(Vector sum, const char* p) { return _mm512_add_epi64(sum, _mm512_load_si512(p)); }
  static uint64_t total(Vector sum) { return static_cast<uint64_t>(_mm512_reduce_add_epi64(sum)); }
};

const ReadLoop kPlain = {"64-byte loads", read<Wide, Prefetch::none>};
const ReadLoop kNear = {"64-byte loads, prefetch into L1", read<Wide, Prefetch::near>};
const ReadLoop kFar = {"64-byte loads, prefetch into L2", read<Wide, Prefetch::far>};

}  // namespace

const ReadLoop* const kReadAvx512bw[] = {&kPlain, &kNear, &kFar, nullptr};

}  // namespace alphaprune
