#include "launch_mma.cuh"

namespace alphaprune::cuda {
namespace {

template <bool kGrouped>
struct OfIntegers {
  template <class Value>
  using Lane = IntegerLane<Value>;
  static constexpr int rows(int) { return 1; }
  static constexpr int other_rows(int) { return 1; }
  template <class Value, int kTiles, int kRows, Copies kCopies>
  static constexpr auto kernel() {
    return sbt_mma_int8<Value, kTiles, kRows, kCopies, kGrouped>;
  }
};

}  // namespace

Status allow_sbt_mma_int8(int bytes) {
  if (const Status status = allow_mma<OfIntegers<false>>(bytes)) return status;
  return allow_mma<OfIntegers<true>>(bytes);
}

Status sbt_mma_int8(const sbt::View* weights, uint32_t stage_units, const Device& device, const Call& call) {
  return weights->grouped() ? launch_mma<OfIntegers<true>>(weights, weights->cols, stage_units, 0, device, call)
                            : launch_mma<OfIntegers<false>>(weights, weights->cols, stage_units, 0, device, call);
}

}  // namespace alphaprune::cuda
