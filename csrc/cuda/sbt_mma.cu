#include "launch.cuh"
#include "sbt_mma.cuh"

namespace alphaprune::cuda {
namespace {

template <class Value, int kTiles, int kRows>
Status run(MmaProblem p, bool whole, const Device& device, void* stream) {
  const auto kernel = whole ? sbt_mma<Value, kTiles, kRows, true> : sbt_mma<Value, kTiles, kRows, false>;
  const auto shared = [&] { return mma_shared_bytes(kRows, kTiles, p.warps, p.value_bytes); };
  while (p.warps > 1 && shared() > static_cast<size_t>(device.shared_bytes)) --p.warps;
  return start(kernel, ceil_div(p.row_tiles, kRows), p.warps * kWarp, shared(), stream, p);
}

// More tokens let a block take several row tiles, so that it loads each activation fewer times; four where there are
// blocks enough for the device.
template <class Value>
Status by_tokens(const MmaProblem& p, bool whole, const Device& device, void* stream) {
  const bool many = ceil_div(p.row_tiles, 4) >= device.multiprocessors;
  if (p.tokens <= 8) return run<Value, 1, 1>(p, whole, device, stream);
  if (p.tokens <= 16) return run<Value, 2, 1>(p, whole, device, stream);
  if (p.tokens <= 32)
    return many ? run<Value, 4, 4>(p, whole, device, stream) : run<Value, 4, 2>(p, whole, device, stream);
  return many ? run<Value, 8, 4>(p, whole, device, stream) : run<Value, 8, 2>(p, whole, device, stream);
}

template <class Value, int kTiles, int kRows>
Status allow(int bytes) {
  if (const Status status = allow_shared(sbt_mma<Value, kTiles, kRows, true>, bytes)) return status;
  return allow_shared(sbt_mma<Value, kTiles, kRows, false>, bytes);
}

template <class Value>
Status allow_all(int bytes) {
  for (const Status status : {allow<Value, 1, 1>(bytes), allow<Value, 2, 1>(bytes), allow<Value, 4, 2>(bytes),
                              allow<Value, 8, 2>(bytes), allow<Value, 4, 4>(bytes), allow<Value, 8, 4>(bytes)})
    if (status) return status;
  return 0;
}

}  // namespace

int chunk_tiles() { return kChunk; }

Status allow_sbt_mma(int bytes) {
  if (const Status status = allow_all<Bfloat16>(bytes)) return status;
  return allow_all<Float16>(bytes);
}

Status sbt_mma(const sbt::View& weight, uint32_t stage_units, int warps, const Device& device, const Call& call) {
  const auto address = reinterpret_cast<uintptr_t>(call.x);
  const Output out{call.bias, static_cast<const uint16_t*>(call.residual), static_cast<uint16_t*>(call.y),
                   static_cast<int>(weight.rows), static_cast<int>(call.bias_dtype)};
  const MmaProblem p{static_cast<const uint16_t*>(weight.values),
                     weight.mask,
                     weight.offsets,
                     static_cast<const uint16_t*>(call.x),
                     out,
                     static_cast<int>(weight.cols),
                     static_cast<int>(call.tokens),
                     static_cast<int>(weight.row_tiles()),
                     static_cast<int>(weight.col_tiles()),
                     warps,
                     stage_units * kUnitBytes,
                     address % 8 == 0 && weight.cols % 4 == 0,
                     {1, 2}};
  const bool whole = p.fours && weight.cols % kChunkCols == 0;
  return call.dtype == Dtype::bfloat16 ? by_tokens<Bfloat16>(p, whole, device, call.stream)
                                       : by_tokens<Float16>(p, whole, device, call.stream);
}

}  // namespace alphaprune::cuda
