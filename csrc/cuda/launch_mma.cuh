// Which variant of sbt_mma a product takes, how it is shared out, and how it is started: the same for all kinds of
// values.
#pragma once

#include "launch.cuh"
#include "sbt_mma.cuh"

namespace alphaprune::cuda {

// The share of the warps' time that is work where `splits` of them take turns with the chunks.
inline double mma_balance(int chunks, int splits) {
  return static_cast<double>(chunks) / (ceil_div(chunks, splits) * splits);
}

// A block for each multiprocessor, with as many warps as there may be. shared(plan) -> bytes.
template <class Shared>
MmaPlan plan_mma(const MmaProblem& p, int kRows, int most_warps, const Device& device, const Shared& shared) {
  const int chunks = static_cast<int>(ceil_div(p.cols, kChunkCols));
  MmaPlan plan{};
  plan.blocks = p.units < device.multiprocessors ? p.units : device.multiprocessors;
  const int groups = static_cast<int>(ceil_div(ceil_div(p.units, plan.blocks) * p.unit, kRows));
  for (int most = most_warps;; --most) {
    plan.teams = static_cast<int>(ceil_div(groups, ceil_div(groups, most)));
    // Of the numbers of warps that fit, the one that leaves the fewest of them without work at the end.
    const int limit = most / plan.teams < chunks ? most / plan.teams : chunks;
    plan.splits = limit;
    for (int splits = limit; splits > limit / 2 && splits > 0; --splits)
      if (mma_balance(chunks, splits) > mma_balance(chunks, plan.splits) + 0.02) plan.splits = splits;
    plan.slab_chunks = chunks;
    plan.slabs = 1;
    if (shared(plan) <= static_cast<size_t>(device.shared_bytes)) return plan;
    // Slabs of some turns of every warp, the longest that fit.
    for (int turns : {4, 2, 1}) {
      plan.slab_chunks = turns * plan.splits;
      plan.slabs = static_cast<int>(ceil_div(chunks, plan.slab_chunks));
      if (shared(plan) <= static_cast<size_t>(device.shared_bytes)) return plan;
    }
    if (most == 1) return plan;
  }
}

// Kernels: Lane<Value>, kernel<Value, kTiles, kRows, kCopies>(), rows(kTiles), the row tiles of a warp, and
// other_rows(kTiles), how many it has where they are asked for.
template <class Kernels, class Value, int kTiles, int kRows>
Status run_mma(MmaProblem p, const Device& device, const Call& call) {
  using Lane = typename Kernels::template Lane<Value>;
  p.unit = call.members > 1 ? kRows : 1;
  p.out = output_of(call, p.unit * kTileRows);
  for (int i = 0; i < call.members; ++i) p.units += static_cast<int>(ceil_div(call.out[i].rows, p.unit * kTileRows));
  const bool whole = p.cols % kChunkCols == 0,
             bulk = whole && p.eights && device.capability == 90;  // only its code has them
  const Copies copies = bulk ? Copies::bulk : whole ? Copies::whole : Copies::edges;
  const auto kernel = bulk    ? Kernels::template kernel<Value, kTiles, kRows, Copies::bulk>()
                      : whole ? Kernels::template kernel<Value, kTiles, kRows, Copies::whole>()
                              : Kernels::template kernel<Value, kTiles, kRows, Copies::edges>();
  const auto shared = [&](const MmaPlan& plan) {
    return mma_shared_bytes<Lane>(plan, kRows, kTiles, copies, p.tokens, p.value_bytes);
  };
  p.plan = plan_mma(p, kRows, mma_most_warps(kRows, kTiles, Lane::kBytes), device, shared);
  const int threads = p.plan.warps() * kWarp;
  return bulk ? start_early(kernel, p.plan.blocks, threads, shared(p.plan), call.stream, p)
              : start(kernel, p.plan.blocks, threads, shared(p.plan), call.stream, p);
}

template <class Kernels, class Value, int kTiles>
Status mma_by_rows(const MmaProblem& p, int row_tiles, const Device& device, const Call& call) {
  constexpr int kRows = Kernels::rows(kTiles), kOther = Kernels::other_rows(kTiles);
  if (row_tiles == kOther) return run_mma<Kernels, Value, kTiles, kOther>(p, device, call);
  return run_mma<Kernels, Value, kTiles, kRows>(p, device, call);
}

template <class Kernels, class Value>
Status mma_by_tokens(const MmaProblem& p, int row_tiles, const Device& device, const Call& call) {
  if (p.tokens <= 8) return mma_by_rows<Kernels, Value, 1>(p, row_tiles, device, call);
  if (p.tokens <= 16) return mma_by_rows<Kernels, Value, 2>(p, row_tiles, device, call);
  if (p.tokens <= 32) return mma_by_rows<Kernels, Value, 4>(p, row_tiles, device, call);
  return mma_by_rows<Kernels, Value, 8>(p, row_tiles, device, call);
}

// weights: as many as the call has members. cols: of x, which may be more than the packed matrices have.
template <class Kernels>
Status launch_mma(const sbt::View* weights, int64_t cols, uint32_t stage_units, int row_tiles, const Device& device,
                  const Call& call) {
  using Lane = typename Kernels::template Lane<Bfloat16>;
  constexpr int kOffsetBytes = Values<Lane::kBytes>::kOffsetBytes;
  MmaProblem p{};
  for (int i = 0; i < call.members; ++i)
    p.of[i] = {weights[i].values, weights[i].mask, weights[i].offsets, weights[i].scale};
  p.x = static_cast<const uint16_t*>(call.x);
  p.cols = static_cast<int>(cols);
  p.tokens = static_cast<int>(call.tokens);
  p.col_tiles = static_cast<int>(weights->col_tiles());
  p.value_bytes = stage_units * kOffsetBytes;
  p.eights = reinterpret_cast<uintptr_t>(call.x) % 16 == 0 && p.cols % 8 == 0;
  p.number = {1, 2};
  p.groups = static_cast<int>(weights->groups);
  return call.dtype == Dtype::bfloat16 ? mma_by_tokens<Kernels, Bfloat16>(p, row_tiles, device, call)
                                       : mma_by_tokens<Kernels, Float16>(p, row_tiles, device, call);
}

template <class Kernels, class Value, int kTiles, int kRows>
Status allow_variant(int bytes) {
  for (const Status status : {allow_shared(Kernels::template kernel<Value, kTiles, kRows, Copies::edges>(), bytes),
                              allow_shared(Kernels::template kernel<Value, kTiles, kRows, Copies::whole>(), bytes),
                              allow_shared(Kernels::template kernel<Value, kTiles, kRows, Copies::bulk>(), bytes)})
    if (status) return status;
  return 0;
}

template <class Kernels, class Value, int kTiles>
Status allow_tiles(int bytes) {
  if (const Status status = allow_variant<Kernels, Value, kTiles, Kernels::rows(kTiles)>(bytes)) return status;
  return allow_variant<Kernels, Value, kTiles, Kernels::other_rows(kTiles)>(bytes);
}

template <class Kernels, class Value>
Status allow_variants(int bytes) {
  for (const Status status : {allow_tiles<Kernels, Value, 1>(bytes), allow_tiles<Kernels, Value, 2>(bytes),
                              allow_tiles<Kernels, Value, 4>(bytes), allow_tiles<Kernels, Value, 8>(bytes)})
    if (status) return status;
  return 0;
}

template <class Kernels>
Status allow_mma(int bytes) {
  if (const Status status = allow_variants<Kernels, Bfloat16>(bytes)) return status;
  return allow_variants<Kernels, Float16>(bytes);
}

}  // namespace alphaprune::cuda
