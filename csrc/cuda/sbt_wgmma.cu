#include "launch_wide.cuh"

namespace alphaprune::cuda {
namespace {

struct WideFloats {
  using Lane = WideLane;
  static constexpr int kLeast = 32, kMost = 256;  // tokens
  template <class Value, int kTokens>
  static constexpr auto kernel() {
    return sbt_wgmma<Value, kTokens>;
  }
};

}  // namespace

Status allow_sbt_wgmma(int bytes) { return allow_wide<WideFloats>(bytes); }

Status sbt_wgmma(const sbt::View* weights, uint32_t stage_units, WideWays wanted, const Device& device,
                 const Call& call, int64_t x_stride) {
  return launch_wide<WideFloats>(weights, stage_units, wanted, device, call, x_stride);
}

}  // namespace alphaprune::cuda
