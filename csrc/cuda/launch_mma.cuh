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
  const int chunks = static_cast<int>(ceil_div(p.col_tiles, kChunk));
  MmaPlan plan{};
  plan.blocks = p.row_tiles < device.multiprocessors ? p.row_tiles : device.multiprocessors;
  const int groups = static_cast<int>(ceil_div(ceil_div(p.row_tiles, plan.blocks), kRows));
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

// Kernels: Lane<Value>, kernel<Value, kTiles, kRows, kCopies>() and rows(kTiles), the row tiles of a warp. With two,
// which load x half as often, an H200 was slower at 1 to 32 tokens: half as many chunks are under way.
template <class Kernels, class Value, int kTiles>
Status run_mma(MmaProblem p, const Device& device, void* stream) {
  using Lane = typename Kernels::template Lane<Value>;
  constexpr int kRows = Kernels::rows(kTiles);
  const bool whole = p.cols % kChunkCols == 0,
             bulk = whole && p.eights && device.capability == 90;  // only its code has them
  const Copies copies = bulk ? Copies::bulk : whole ? Copies::whole : Copies::edges;
  const auto kernel = bulk    ? Kernels::template kernel<Value, kTiles, kRows, Copies::bulk>()
                      : whole ? Kernels::template kernel<Value, kTiles, kRows, Copies::whole>()
                              : Kernels::template kernel<Value, kTiles, kRows, Copies::edges>();
  const auto shared = [&](const MmaPlan& plan) {
    return mma_shared_bytes<Lane>(plan, kRows, kTiles, copies, p.tokens, p.value_bytes);
  };
  p.plan = plan_mma(p, kRows, mma_most_warps(kRows, kTiles, Lane::kBytes == 1), device, shared);
  const int threads = p.plan.warps() * kWarp;
  return bulk ? start_early(kernel, p.plan.blocks, threads, shared(p.plan), stream, p)
              : start(kernel, p.plan.blocks, threads, shared(p.plan), stream, p);
}

template <class Kernels, class Value>
Status mma_by_tokens(const MmaProblem& p, const Device& device, void* stream) {
  if (p.tokens <= 8) return run_mma<Kernels, Value, 1>(p, device, stream);
  if (p.tokens <= 16) return run_mma<Kernels, Value, 2>(p, device, stream);
  if (p.tokens <= 32) return run_mma<Kernels, Value, 4>(p, device, stream);
  return run_mma<Kernels, Value, 8>(p, device, stream);
}

template <class Kernels>
Status launch_mma(const sbt::View& weight, uint32_t stage_units, const Device& device, const Call& call) {
  constexpr int kOffsetBytes = Values<Kernels::template Lane<Bfloat16>::kBytes>::kOffsetBytes;
  const MmaProblem p{weight.values,
                     weight.mask,
                     weight.offsets,
                     static_cast<const uint16_t*>(call.x),
                     output_of(call, sbt::kTileRows),
                     static_cast<int>(weight.cols),
                     static_cast<int>(call.tokens),
                     static_cast<int>(weight.row_tiles()),
                     static_cast<int>(weight.col_tiles()),
                     {},
                     stage_units * kOffsetBytes,
                     reinterpret_cast<uintptr_t>(call.x) % 16 == 0 && weight.cols % 8 == 0,
                     {1, 2},
                     weight.scale,
                     static_cast<int>(weight.groups)};
  return call.dtype == Dtype::bfloat16 ? mma_by_tokens<Kernels, Bfloat16>(p, device, call.stream)
                                       : mma_by_tokens<Kernels, Float16>(p, device, call.stream);
}

template <class Kernels, class Value, int kTiles>
Status allow_variant(int bytes) {
  constexpr int kRows = Kernels::rows(kTiles);
  for (const Status status : {allow_shared(Kernels::template kernel<Value, kTiles, kRows, Copies::edges>(), bytes),
                              allow_shared(Kernels::template kernel<Value, kTiles, kRows, Copies::whole>(), bytes),
                              allow_shared(Kernels::template kernel<Value, kTiles, kRows, Copies::bulk>(), bytes)})
    if (status) return status;
  return 0;
}

template <class Kernels, class Value>
Status allow_variants(int bytes) {
  for (const Status status : {allow_variant<Kernels, Value, 1>(bytes), allow_variant<Kernels, Value, 2>(bytes),
                              allow_variant<Kernels, Value, 4>(bytes), allow_variant<Kernels, Value, 8>(bytes)})
    if (status) return status;
  return 0;
}

template <class Kernels>
Status allow_mma(int bytes) {
  if (const Status status = allow_variants<Kernels, Bfloat16>(bytes)) return status;
  return allow_variants<Kernels, Float16>(bytes);
}

}  // namespace alphaprune::cuda
