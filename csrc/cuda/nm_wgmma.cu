#include <algorithm>

#include "launch_sm90.cuh"
#include "nm_wgmma.cuh"

namespace alphaprune::cuda {
namespace {

template <int kTileTokens, int kRowGroups>
struct NmWideTile {
  static constexpr int kTokens = kTileTokens, kGroups = kRowGroups;
};

// use(a tile) for each that there is a kernel of; the first status that is not 0.
template <class Use>
Status for_tiles(const Use& use) {
  if (const Status status = use(NmWideTile<128, 2>())) return status;
  if (const Status status = use(NmWideTile<256, 2>())) return status;
  return use(NmWideTile<128, 4>());
}

// Sets how the work is shared out; false where fewer than two stages fit the device. Of clusters of more blocks than
// two an H200 runs too few at a time: of four fewer than 31, and with 15 of eight it took 1.06 times as long.
template <class Tile>
bool arrange(NmWideProblem* p, const Device& device) {
  p->row_units = static_cast<int>(ceil_div(p->row_panels, kNmPair * nm_wide_panels(Tile::kGroups)));
  p->token_units = static_cast<int>(ceil_div(p->nm.tokens, Tile::kTokens));
  p->clusters = std::min(std::max(device.multiprocessors / kNmPair, 1), p->units());
  p->stages = nm_wide_stages(Tile::kTokens, Tile::kGroups, device.shared_bytes);
  return p->stages >= 2;
}

// Until the slowest block is done, in clocks of an H200 for 32 columns (bench/prompts.py).
template <class Tile>
int64_t clocks_of(const NmWideProblem& p) {
  constexpr int kUnit = Tile::kTokens == 256 ? 500 : Tile::kGroups == 4 ? 640 : 370;
  return ceil_div(p.units(), p.clusters) * kUnit;
}

template <class Value, class Tile>
Status run(const NmWideProblem& p, const Call& call) {
  TensorMap x;
  const Matrix matrix{call.x, call.tokens, p.nm.cols, int64_t{p.nm.cols} * 2};
  if (const Status status = map_matrix(matrix, Tile::kTokens / kNmPair, kNmBox, call.dtype, &x)) return status;
  return start_cluster(nm_wgmma<Value, Tile::kTokens, Tile::kGroups>, int64_t{p.clusters} * kNmPair, kNmPair,
                       nm_wide_threads(Tile::kGroups), p.shared_bytes(Tile::kTokens, Tile::kGroups), true, call.stream,
                       p, x);
}

template <class Value>
Status poison(const NmWideProblem& p, const Call& call) {
  return start_early(poison_not_finite<Value>, call.tokens, kPoisonThreads, 0, call.stream, p.nm, p.row_panels);
}

}  // namespace

Status allow_nm_wgmma(int bytes) {
  return for_tiles([&](auto tile) {
    using Tile = decltype(tile);
    if (const Status status = allow_shared(nm_wgmma<Bfloat16, Tile::kTokens, Tile::kGroups>, bytes)) return status;
    return allow_shared(nm_wgmma<Float16, Tile::kTokens, Tile::kGroups>, bytes);
  });
}

Status nm_wgmma(const NmView& weight, NmWays wanted, const Device& device, const Call& call) {
  NmWideProblem p{};
  p.nm = nm_problem(weight, call);
  p.row_panels = nm_row_panels(call);
  p.fours = stores_fours(call);
  const bool bfloat16 = call.dtype == Dtype::bfloat16;

  int64_t least = -1;
  NmWays best{};
  const auto tries = [](int want, int value) { return !want || want == value; };
  for_tiles([&](auto tile) {
    using Tile = decltype(tile);
    if (!tries(wanted.tokens, Tile::kTokens) || !tries(wanted.groups, Tile::kGroups)) return 0;
    if (!arrange<Tile>(&p, device)) return 0;
    const int64_t clocks = clocks_of<Tile>(p);
    if (least < 0 || clocks < least) least = clocks, best = {Tile::kTokens, Tile::kGroups};
    return 0;
  });
  if (least < 0) return 1;
  const Status status = for_tiles([&](auto tile) {
    using Tile = decltype(tile);
    if (best.tokens != Tile::kTokens || best.groups != Tile::kGroups) return 0;
    arrange<Tile>(&p, device);
    return bfloat16 ? run<Bfloat16, Tile>(p, call) : run<Float16, Tile>(p, call);
  });
  if (status) return status;
  return bfloat16 ? poison<Bfloat16>(p, call) : poison<Float16>(p, call);
}

}  // namespace alphaprune::cuda
