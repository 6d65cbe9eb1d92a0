// SBT on AVX2 with VNNI, as Intel's CPUs without AVX-512 have it from Alder Lake on: int8 beside activations that are
// integers; everything else is computed as without VNNI.
#include "bytes.h"
#include "nonzeros.h"
#include "over.h"

namespace alphaprune {
namespace {

struct Bytewise {
  static const Isa& lesser() { return kAvx2; }

  // Of 16 bits only where that is faster than to skip the zeros: cycles per 8 weights as measured on a Zen 5, where a
  // panel costs 1.65 and 0.26 per token.
  static bool takes(const Activations& x, const sbt::View& weight) {
    if (!rounds(x, weight)) return false;
    const auto passes = static_cast<double>(ceil_div(x.tokens, kPanelPass)), tokens = static_cast<double>(x.tokens);
    return weight.to_bytes || nonzeros::cycles(weight, x.tokens, 8) >= 1.65 * passes + 0.26 * tokens;
  }
  static void product(const Product& p, int64_t begin, int64_t end, void* scratch) {
    bytes::product(p, begin, end, scratch);
  }
  static void prepare(const Activations& x, const sbt::View& weight, int64_t first, int64_t last, void* to) {
    bytes::prepare(x, weight, first, last, to);
  }
};

}  // namespace

const Isa kAvxvnni = Over<Bytewise>::isa("avxvnni", &kStepAvx2);

}  // namespace alphaprune
