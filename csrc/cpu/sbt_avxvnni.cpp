// SBT on AVX2 with VNNI, as Intel's CPUs without AVX-512 have it from Alder Lake on: int8 beside activations that are
// integers; everything else is computed as without VNNI.
#include "bytes.h"
#include "nonzeros.h"

namespace alphaprune {
namespace {

// Whether the product is one of integers. Of 16 bits only where that is faster than to skip the zeros: cycles per 8
// weights as measured on a Zen 5, where a panel costs 1.65 and 0.26 per token.
bool integers(const Activations& x, const sbt::View& weight) {
  if (!rounds(x, weight)) return false;
  const auto passes = static_cast<double>(ceil_div(x.tokens, kPanelPass)), tokens = static_cast<double>(x.tokens);
  return weight.to_bytes || nonzeros::cycles(weight, x.tokens, 8) >= 1.65 * passes + 0.26 * tokens;
}

void product(const Product& p, int64_t begin, int64_t end, void* scratch) {
  if (!integers(p.given, p.weight)) return kAvx2.product(p, begin, end, scratch);
  bytes::product(p, begin, end, scratch);
}

void expand(const sbt::View& weight, int64_t begin, int64_t end, Dtype out_dtype, void* out) {
  kAvx2.expand(weight, begin, end, out_dtype, out);
}

int64_t prepared_bytes(const Activations& x, const sbt::View& weight) {
  return integers(x, weight) ? integer_bytes(x, weight) : kAvx2.prepared_bytes(x, weight);
}

void prepare(const Activations& x, const sbt::View& weight, int64_t first, int64_t last, void* to) {
  if (!integers(x, weight)) return kAvx2.prepare(x, weight, first, last, to);
  bytes::prepare(x, weight, first, last, to);
}

// Beside those of AVX2.
constexpr int kBytesLayout = 3, kTwoBytesLayout = 4;
int layout(const Activations& x, const sbt::View& weight) {
  if (!integers(x, weight)) return kAvx2.layout(x, weight);
  return weight.to_bytes ? kBytesLayout : kTwoBytesLayout;
}

}  // namespace

const Isa kAvxvnni = {"avxvnni", product, expand, prepared_bytes, prepare, &kStepAvx2, layout};

}  // namespace alphaprune
