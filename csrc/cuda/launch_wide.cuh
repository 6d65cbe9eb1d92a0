// How sbt_wgmma shares out a product, and how it is started: the same for all kinds of values.
#pragma once

#include <algorithm>

#include "launch_sm90.cuh"
#include "sbt_wgmma.cuh"

namespace alphaprune::cuda {

// Clocks of an H200, fitted to what bench/wide.py measured (bench/wide_fit.py): to begin and end a block; to end a
// round, and, more, one whose sums go through the shared memory of a cluster, each for 8 tokens besides.
constexpr int64_t kBlock = 1855, kRound = 9461, kRoundTokens = 213, kCluster = 41, kClusterTokens = 1;
// For a chunk: of a row tile, by a warp alone; of a row tile, where all warps are busy, for 8 tokens besides; to order
// its copies, for four row tiles besides.
constexpr int64_t kAlone = 2155, kBusy = 142, kBusyTokens = 8, kOrder = 167, kOrderTiles = 550;
// Bytes that a multiprocessor gets in a clock: of weights, from memory, and of x, from the cache.
constexpr int64_t kWeightBytes = 18, kActivationBytes = 100;

// Chooses the ring; false where fewer than two stages of each slice fit the device.
inline bool arrange(WideProblem* p, int box, const Device& device) {
  p->stage_bytes = p->tiles() * p->tile_bytes();
  for (p->stages = kWideMostStages / p->slices * p->slices; p->stages >= 2 * p->slices; p->stages -= p->slices)
    if (p->shared_bytes(box) <= static_cast<size_t>(device.shared_bytes)) return true;
  return false;
}

// Clocks until the slowest block is done.
inline int64_t clocks_of(const WideProblem& p, int box, int all_chunks) {
  const int64_t tiles = ceil_div(p.row_tiles, p.clusters), rounds = ceil_div(tiles, int64_t{p.tiles()});
  const int64_t chunks = ceil_div(all_chunks, p.splits), eights = box / 8;
  const int64_t alone = rounds * ceil_div(chunks, p.slices) * kAlone;
  const int64_t busy = tiles * chunks * (kBusy + eights * kBusyTokens);
  const int64_t order = chunks * (rounds * kOrder + ceil_div(tiles, 4) * kOrderTiles);
  const int64_t weight = tiles * chunks * p.tile_bytes() / kWeightBytes;
  const int64_t x = rounds * chunks * p.x_bytes(box) / kActivationBytes;
  const int64_t ends =
      kBlock + rounds * (kRound + eights * kRoundTokens) + (p.splits > 1 ? kCluster + eights * kClusterTokens : 0);
  return std::max({alone, busy, order, weight, x}) + ends;
}

// The best of all ways to share the work, of so many chunks of columns; false where there is none.
inline bool share(WideProblem* p, int box, int chunks, const Device& device, WideWays wanted) {
  WideProblem best;
  int64_t least = -1;
  const int most = wide_groups(box);
  const auto tries = [](int want, int value) { return !want || want == value; };
  for (p->groups = 1; p->groups <= most; ++p->groups)
    for (p->slices = 1; p->groups * p->slices <= most; ++p->slices)
      for (p->splits = 1; p->splits <= kWideMostSplits && p->splits <= chunks; p->splits *= 2) {
        if (!tries(wanted.groups, p->groups) || !tries(wanted.slices, p->slices) || !tries(wanted.splits, p->splits))
          continue;
        // Clusters of more than two blocks do not fill all groups of multiprocessors.
        const int processors = p->splits <= 2 ? device.multiprocessors : device.multiprocessors * 13 / 16;
        p->clusters = std::min(std::max(processors / p->splits, 1), p->row_tiles);
        // Where a cluster shares the columns, each does one round: nobody brings on while others add up.
        if (p->splits > 1 && p->repeats()) p->clusters = static_cast<int>(ceil_div(p->row_tiles, p->tiles()));
        if (!arrange(p, box, device)) continue;
        const int64_t waves = ceil_div(int64_t{p->clusters} * p->splits, std::max(processors, 1));
        const int64_t clocks = waves * clocks_of(*p, box, chunks);
        if (least >= 0 && clocks >= least) continue;
        best = *p;
        least = clocks;
      }
  if (least >= 0) *p = best;
  return least >= 0;
}

// use(a number): of tokens, the smallest of a product that has so many, from kLeast to kMost.
template <int kLeast, int kMost, class Use>
Status by_tokens(int64_t tokens, const Use& use) {
  if constexpr (kLeast < kMost) {
    if (tokens > kLeast) return by_tokens<2 * kLeast, kMost>(tokens, use);
  }
  return use(std::integral_constant<int, kLeast>());
}

// Kernels: Lane, kLeast and kMost tokens of a product, kernel<Value, kTokens>().
template <class Kernels, class Value, int kTokens>
Status run_wide(WideProblem p, const Device& device, const Call& call, WideWays wanted, int64_t x_stride) {
  const int chunks = static_cast<int>(ceil_div(p.col_tiles, int64_t{Kernels::Lane::kMacroTiles}));
  if (!share(&p, kTokens, chunks, device, wanted)) return 1;
  TensorMap x;
  const Matrix matrix{call.x, call.tokens, x_stride, x_stride * 2};
  if (const Status status = map_matrix(matrix, kTokens, kBoxCols, call.dtype, &x)) return status;
  return start_cluster(Kernels::template kernel<Value, kTokens>(), int64_t{p.clusters} * p.splits, p.splits,
                       wide_threads(p.groups * p.slices), p.shared_bytes(kTokens), true, call.stream, p, x);
}

template <class Kernels, class Value>
Status allow_wide_of(int bytes) {
  for (int tokens = Kernels::kLeast; tokens <= Kernels::kMost; tokens *= 2) {
    const auto allow = [&](auto box) { return allow_shared(Kernels::template kernel<Value, box()>(), bytes); };
    if (const Status status = by_tokens<Kernels::kLeast, Kernels::kMost>(tokens, allow)) return status;
  }
  return 0;
}
template <class Kernels>
Status allow_wide(int bytes) {
  if (const Status status = allow_wide_of<Kernels, Bfloat16>(bytes)) return status;
  return allow_wide_of<Kernels, Float16>(bytes);
}

// What a launch is of, before it is shared out. weights: as many as the call has members.
template <class Lane>
WideProblem wide_problem(const sbt::View* weights, uint32_t stage_units, const Call& call) {
  WideProblem p{};
  p.out = output_of(call, sbt::kTileRows);
  for (int i = 0; i < call.members; ++i) {
    const sbt::View& from = weights[i];
    p.of[i] = {static_cast<const unsigned char*>(from.values), from.mask, from.offsets};
    p.row_tiles += static_cast<int>(from.row_tiles());
  }
  p.tokens = static_cast<int>(call.tokens);
  p.col_tiles = static_cast<int>(weights[0].col_tiles());
  p.value_bytes = stage_units * Values<Lane::kBytes>::kOffsetBytes;
  p.mask_bytes = Lane::kMacroTiles * kWideTileMask;
  p.fours = stores_fours(call);
  p.number = {1, 2};
  return p;
}

template <class Kernels>
Status launch_wide(const sbt::View* weights, uint32_t stage_units, WideWays wanted, const Device& device,
                   const Call& call, int64_t x_stride) {
  const WideProblem p = wide_problem<typename Kernels::Lane>(weights, stage_units, call);
  return by_tokens<Kernels::kLeast, Kernels::kMost>(call.tokens, [&](auto box) {
    return call.dtype == Dtype::bfloat16 ? run_wide<Kernels, Bfloat16, box()>(p, device, call, wanted, x_stride)
                                         : run_wide<Kernels, Float16, box()>(p, device, call, wanted, x_stride);
  });
}

}  // namespace alphaprune::cuda
