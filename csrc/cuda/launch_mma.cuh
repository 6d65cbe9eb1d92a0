// Which variant of sbt_mma a product takes, and how it is started: the same for all kinds of values.
#pragma once

#include "launch.cuh"
#include "sbt_mma.cuh"

namespace alphaprune::cuda {

// Kernels: Lane<Value>, kernel<Value, kTiles, kRows, kWhole>() and kMostRows, the most row tiles that a block takes, 2
// or 4.
template <class Kernels, class Value, int kTiles, int kRows>
Status run_mma(MmaProblem p, bool whole, const Device& device, void* stream) {
  using Lane = typename Kernels::template Lane<Value>;
  const auto kernel = whole ? Kernels::template kernel<Value, kTiles, kRows, true>()
                            : Kernels::template kernel<Value, kTiles, kRows, false>();
  const auto shared = [&] { return mma_shared_bytes<Lane>(kRows, kTiles, p.warps, p.value_bytes); };
  constexpr int kSharers = mma_sharers(kTiles);
  p.warps = p.warps > kSharers ? p.warps / kSharers * kSharers : kSharers;
  while (p.warps > kSharers && shared() > static_cast<size_t>(device.shared_bytes)) p.warps -= kSharers;
  return start(kernel, ceil_div(p.row_tiles, kRows), p.warps * kWarp, shared(), stream, p);
}

// More tokens let a block take several row tiles, so that it loads each activation fewer times; the most where there
// are blocks enough for the device.
//
// Past 64 tokens teams of two warps decode each weight once. Per 1024 weights of bfloat16 and 128 tokens (sm_80,
// bench/cubins.py) that issues 390 instructions where two passes issue 579, so 97 clocks of the four schedulers under
// the 128 that the tensor cores take, and the packed weight is read once. One warp for all tokens would have 256 sums
// for four row tiles, more than there are registers; with two it would load x twice as often.
template <class Kernels, class Value>
Status mma_by_tokens(const MmaProblem& p, bool whole, const Device& device, void* stream) {
  constexpr int kMost = Kernels::kMostRows;
  const bool many = ceil_div(p.row_tiles, kMost) >= device.multiprocessors;
  if (p.tokens <= 8) return run_mma<Kernels, Value, 1, 1>(p, whole, device, stream);
  if (p.tokens <= 16) return run_mma<Kernels, Value, 2, 1>(p, whole, device, stream);
  if (p.tokens <= 32)
    return many ? run_mma<Kernels, Value, 4, kMost>(p, whole, device, stream)
                : run_mma<Kernels, Value, 4, 2>(p, whole, device, stream);
  if (p.tokens <= 64)
    return many ? run_mma<Kernels, Value, 8, kMost>(p, whole, device, stream)
                : run_mma<Kernels, Value, 8, 2>(p, whole, device, stream);
  return many ? run_mma<Kernels, Value, 16, kMost>(p, whole, device, stream)
              : run_mma<Kernels, Value, 16, 2>(p, whole, device, stream);
}

template <class Kernels>
Status launch_mma(const sbt::View& weight, uint32_t stage_units, int warps, const Device& device, const Call& call) {
  constexpr int kOffsetBytes = Values<Kernels::template Lane<Bfloat16>::kBytes>::kOffsetBytes;
  const auto address = reinterpret_cast<uintptr_t>(call.x);
  const Output out{call.bias, static_cast<const uint16_t*>(call.residual), static_cast<uint16_t*>(call.y),
                   static_cast<int>(weight.rows), static_cast<int>(call.bias_dtype)};
  const MmaProblem p{weight.values,
                     weight.mask,
                     weight.offsets,
                     static_cast<const uint16_t*>(call.x),
                     out,
                     static_cast<int>(weight.cols),
                     static_cast<int>(call.tokens),
                     static_cast<int>(weight.row_tiles()),
                     static_cast<int>(weight.col_tiles()),
                     warps,
                     stage_units * kOffsetBytes,
                     address % 8 == 0 && weight.cols % 4 == 0,
                     {1, 2},
                     weight.scale,
                     static_cast<int>(weight.groups)};
  const bool whole = p.fours && weight.cols % kChunkCols == 0;
  return call.dtype == Dtype::bfloat16 ? mma_by_tokens<Kernels, Bfloat16>(p, whole, device, call.stream)
                                       : mma_by_tokens<Kernels, Float16>(p, whole, device, call.stream);
}

template <class Kernels, class Value, int kTiles, int kRows>
Status allow_variant(int bytes) {
  if (const Status status = allow_shared(Kernels::template kernel<Value, kTiles, kRows, true>(), bytes)) return status;
  return allow_shared(Kernels::template kernel<Value, kTiles, kRows, false>(), bytes);
}

template <class Kernels, class Value>
Status allow_variants(int bytes) {
  for (const Status status :
       {allow_variant<Kernels, Value, 1, 1>(bytes), allow_variant<Kernels, Value, 2, 1>(bytes),
        allow_variant<Kernels, Value, 4, 2>(bytes), allow_variant<Kernels, Value, 4, Kernels::kMostRows>(bytes),
        allow_variant<Kernels, Value, 8, 2>(bytes), allow_variant<Kernels, Value, 8, Kernels::kMostRows>(bytes),
        allow_variant<Kernels, Value, 16, 2>(bytes), allow_variant<Kernels, Value, 16, Kernels::kMostRows>(bytes)})
    if (status) return status;
  return 0;
}

template <class Kernels>
Status allow_mma(int bytes) {
  if (const Status status = allow_variants<Kernels, Bfloat16>(bytes)) return status;
  return allow_variants<Kernels, Float16>(bytes);
}

}  // namespace alphaprune::cuda
