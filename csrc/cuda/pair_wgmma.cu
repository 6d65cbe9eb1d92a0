#include "launch_wide.cuh"

namespace alphaprune::cuda {
namespace {

struct OfPairs {
  using Lane = WidePairs;
  static constexpr int kLeast = 32, kMost = 64;  // tokens
  template <class Value, int kTokens>
  static constexpr auto kernel() {
    return pair_wgmma<Value, kTokens>;
  }
};

}  // namespace

Status allow_pair_wgmma(int bytes) { return allow_wide<OfPairs>(bytes); }

Status pair_wgmma(const sbt::View* weights, uint32_t stage_units, const Device& device, const Call& call,
                  int64_t x_stride) {
  return launch_wide<OfPairs>(weights, stage_units, {}, device, call, x_stride);
}

}  // namespace alphaprune::cuda
