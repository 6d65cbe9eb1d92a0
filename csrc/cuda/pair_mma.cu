#include "launch_mma.cuh"

namespace alphaprune::cuda {
namespace {

struct OfPairs {
  template <class Value>
  using Lane = PairLane;
  static constexpr int rows(int token_tiles) { return token_tiles <= 4 ? 1 : 2; }
  static constexpr int other_rows(int token_tiles) { return rows(token_tiles); }
  template <class Value, int kTiles, int kRows, Copies kCopies>
  static constexpr auto kernel() {
    return pair_mma<Value, kTiles, kRows, kCopies>;
  }
};

}  // namespace

Status allow_pair_mma(int bytes) { return allow_mma<OfPairs>(bytes); }

Status pair_mma(const sbt::View* weights, int64_t cols, uint32_t stage_units, const Device& device, const Call& call) {
  return launch_mma<OfPairs>(weights, cols, stage_units, 0, device, call);
}

}  // namespace alphaprune::cuda
