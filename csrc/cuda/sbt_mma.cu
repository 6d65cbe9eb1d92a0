#include "launch_mma.cuh"

namespace alphaprune::cuda {
namespace {

struct OfFloats {
  template <class Value>
  using Lane = FloatLane;
  static constexpr int rows(int token_tiles) { return token_tiles <= 4 ? 1 : 2; }
  template <class Value, int kTiles, int kRows, Copies kCopies>
  static constexpr auto kernel() {
    return sbt_mma<Value, kTiles, kRows, kCopies>;
  }
};

}  // namespace

int chunk_tiles() { return kChunk; }

Status allow_sbt_mma(int bytes) { return allow_mma<OfFloats>(bytes); }

Status sbt_mma(const sbt::View& weight, uint32_t stage_units, const Device& device, const Call& call) {
  return launch_mma<OfFloats>(weight, stage_units, device, call);
}

}  // namespace alphaprune::cuda
