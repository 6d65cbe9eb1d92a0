#include "delta_spmv.cuh"
#include "launch.cuh"

namespace alphaprune::cuda {
namespace {

template <class Value, int kTokens>
Status run(const DeltaProblem& p, void* stream) {
  return start(delta_spmv<Value, kTokens>, ceil_div(p.slot_count, kDeltaWarps), kDeltaThreads,
               delta_shared_bytes(kTokens, p.block_cols), stream, p);
}

template <class Value>
Status by_tokens(const DeltaProblem& p, void* stream) {
  if (p.tokens == 1) return run<Value, 1>(p, stream);
  if (p.tokens == 2) return run<Value, 2>(p, stream);
  return run<Value, 4>(p, stream);
}

template <class Value>
Status allow(int bytes) {
  for (const Status status : {allow_shared(delta_spmv<Value, 1>, bytes), allow_shared(delta_spmv<Value, 2>, bytes),
                              allow_shared(delta_spmv<Value, 4>, bytes)})
    if (status) return status;
  return 0;
}

}  // namespace

Status allow_delta_spmv(int bytes) {
  if (const Status status = allow<Bfloat16>(bytes)) return status;
  return allow<Float16>(bytes);
}

Status delta_spmv(const DeltaView& weight, const Call& call) {
  const DeltaProblem p{static_cast<const uint4*>(weight.values),
                       weight.deltas,
                       weight.first,
                       weight.starts,
                       weight.slots,
                       weight.row_of,
                       static_cast<const uint16_t*>(call.x),
                       {call.bias, static_cast<const uint16_t*>(call.residual), static_cast<uint16_t*>(call.y),
                        static_cast<int>(weight.rows), static_cast<int>(call.bias_dtype)},
                       static_cast<int>(weight.cols),
                       static_cast<int>(call.tokens),
                       static_cast<int>(weight.slot_count),
                       static_cast<int>(ceil_div(weight.cols, weight.block_cols)),
                       static_cast<int>(weight.block_cols),
                       reinterpret_cast<uintptr_t>(call.x) % 16 == 0 && weight.cols % 8 == 0};
  return call.dtype == Dtype::bfloat16 ? by_tokens<Bfloat16>(p, call.stream) : by_tokens<Float16>(p, call.stream);
}

}  // namespace alphaprune::cuda
