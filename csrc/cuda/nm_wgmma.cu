#include <algorithm>

#include "launch_sm90.cuh"
#include "nm_wgmma.cuh"

namespace alphaprune::cuda {
namespace {

template <int kTileTokens, int kRowGroups>
struct NmWideTile {
  static constexpr int kTokens = kTileTokens, kGroups = kRowGroups;
};

// use(a tile, its name) for each that there is a kernel of; the first status that is not 0.
template <class Use>
Status for_tiles(const Use& use) {
  if (const Status status = use(NmWideTile<128, 2>(), NmTile::tokens128)) return status;
  if (const Status status = use(NmWideTile<256, 2>(), NmTile::tokens256)) return status;
  return use(NmWideTile<128, 4>(), NmTile::tokens128_rows256);
}

// Sets how the work is shared out; false where fewer than two stages fit the device.
template <class Tile>
bool arrange(NmWideProblem* p, const Device& device) {
  p->row_units = static_cast<int>(ceil_div(p->row_panels, kNmPair * nm_wide_panels(Tile::kGroups)));
  p->token_units = static_cast<int>(ceil_div(p->nm.tokens, Tile::kTokens));
  p->clusters = std::min(std::max(device.multiprocessors / kNmPair, 1), p->units());
  p->stages = nm_wide_stages(Tile::kTokens, device.shared_bytes);
  return p->stages >= 2;
}

// Clocks of shared memory for 32 columns, by which the slowest block is done: b of every product, x brought, the
// weight, which passes there on its way to registers. A prediction: NOT MEASURED.
template <class Tile>
int64_t clocks_of(const NmWideProblem& p) {
  constexpr int kRows = 64 * Tile::kGroups, kBytes = 128;  // a clock
  constexpr int kWeight = kRows * 36, kActivations = Tile::kTokens * 64;
  return ceil_div(p.units(), p.clusters) * ((Tile::kGroups + 1) * kActivations + kWeight) / kBytes;
}

template <class Value, class Tile>
Status run(const NmWideProblem& p, const Call& call) {
  TensorMap x;
  const Matrix matrix{call.x, call.tokens, p.nm.cols, int64_t{p.nm.cols} * 2};
  if (const Status status = map_matrix(matrix, Tile::kTokens / kNmPair, kNmBox, call.dtype, &x)) return status;
  return start_cluster(nm_wgmma<Value, Tile::kTokens, Tile::kGroups>, int64_t{p.clusters} * kNmPair, kNmPair,
                       nm_wide_threads(Tile::kGroups), p.shared_bytes(Tile::kTokens), true, call.stream, p, x);
}

template <class Value>
Status poison(const NmWideProblem& p, const Call& call) {
  return start_early(poison_not_finite<Value>, call.tokens, kPoisonThreads, 0, call.stream, p.nm, p.row_panels);
}

}  // namespace

Status allow_nm_wgmma(int bytes) {
  return for_tiles([&](auto tile, NmTile) {
    using Tile = decltype(tile);
    if (const Status status = allow_shared(nm_wgmma<Bfloat16, Tile::kTokens, Tile::kGroups>, bytes)) return status;
    return allow_shared(nm_wgmma<Float16, Tile::kTokens, Tile::kGroups>, bytes);
  });
}

Status nm_wgmma(const NmView& weight, NmTile wanted, const Device& device, const Call& call) {
  NmWideProblem p{};
  p.nm = nm_problem(weight, call);
  p.row_panels = nm_row_panels(call);
  p.fours = stores_fours(call);
  const bool bfloat16 = call.dtype == Dtype::bfloat16;

  int64_t least = -1;
  NmTile best = NmTile::chosen;
  for_tiles([&](auto tile, NmTile name) {
    using Tile = decltype(tile);
    if (wanted != NmTile::chosen && wanted != name) return 0;
    if (!arrange<Tile>(&p, device)) return 0;
    const int64_t clocks = clocks_of<Tile>(p);
    if (least < 0 || clocks < least) least = clocks, best = name;
    return 0;
  });
  if (best == NmTile::chosen) return 1;
  const Status status = for_tiles([&](auto tile, NmTile name) {
    using Tile = decltype(tile);
    if (name != best) return 0;
    arrange<Tile>(&p, device);
    return bfloat16 ? run<Bfloat16, Tile>(p, call) : run<Float16, Tile>(p, call);
  });
  if (status) return status;
  return bfloat16 ? poison<Bfloat16>(p, call) : poison<Float16>(p, call);
}

}  // namespace alphaprune::cuda
