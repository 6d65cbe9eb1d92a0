#include "launch_mma.cuh"

namespace alphaprune::cuda {
namespace {

struct OfFloats {
  template <class Value>
  using Lane = FloatLane;
  // Two row tiles load x half as often, and have half as many chunks under way: an H200 was slower at 1 to 32 tokens.
  static constexpr int rows(int token_tiles) { return token_tiles <= 4 ? 1 : 2; }
  static constexpr int other_rows(int token_tiles) { return token_tiles == 1 ? 1 : 2; }
  template <class Value, int kTiles, int kRows, Copies kCopies>
  static constexpr auto kernel() {
    return sbt_mma<Value, kTiles, kRows, kCopies>;
  }
};

}  // namespace

int chunk_tiles() { return kChunk; }

Status allow_sbt_mma(int bytes) { return allow_mma<OfFloats>(bytes); }

Status sbt_mma(const sbt::View* weights, uint32_t stage_units, const Device& device, const Call& call, int row_tiles) {
  return launch_mma<OfFloats>(weights, weights->cols, stage_units, row_tiles, device, call);
}

}  // namespace alphaprune::cuda
