#include "delta_spmv.cuh"
#include "launch.cuh"

namespace alphaprune::cuda {
namespace {

// use(the kernel).
template <class Value, int kTokens, class Use>
Status with(bool fifth, const Use& use) {
  return fifth ? use(delta_spmv<Value, kTokens, true>) : use(delta_spmv<Value, kTokens, false>);
}

template <class Value, class Use>
Status by_tokens(int64_t tokens, bool fifth, const Use& use) {
  if (tokens == 1) return with<Value, 1>(fifth, use);
  if (tokens == 2) return with<Value, 2>(fifth, use);
  return with<Value, 4>(fifth, use);
}

}  // namespace

int delta_threads() { return kDeltaThreads; }

Status allow_delta_spmv(int bytes) {
  const auto allow = [bytes](auto kernel) { return allow_shared(kernel, bytes); };
  for (const int tokens : {1, 2, 4})
    for (const bool fifth : {false, true}) {
      if (const Status status = by_tokens<Bfloat16>(tokens, fifth, allow)) return status;
      if (const Status status = by_tokens<Float16>(tokens, fifth, allow)) return status;
    }
  return 0;
}

int64_t delta_most_tokens(const DeltaView& weight, const Device& device) {
  const size_t all =
      delta_shared_bytes(kMostDeltaTokens, static_cast<int>(weight.block_cols), static_cast<int>(weight.share_rows));
  return all <= static_cast<size_t>(device.shared_bytes) ? kMostDeltaTokens : 2;
}

bool delta_takes_norm(const DeltaView& weight) { return weight.block_cols >= weight.cols; }

Status delta_spmv(const DeltaView& weight, const Device& device, const Call& call, const Norm& norm) {
  int lanes_log = weight.pairs ? 4 : 5;
  while (weight.share_rows << lanes_log > kDeltaThreads) --lanes_log;
  const DeltaProblem p{static_cast<const uint4*>(weight.values),
                       weight.deltas,
                       weight.fifths,
                       weight.begins,
                       weight.starts,
                       weight.counts,
                       weight.sums,
                       weight.rows_of,
                       static_cast<const uint16_t*>(call.x),
                       static_cast<const uint16_t*>(norm.weight),
                       norm.epsilon,
                       output_of(call),
                       static_cast<int>(weight.cols),
                       static_cast<int>(call.tokens),
                       static_cast<int>(weight.share_rows),
                       static_cast<int>(weight.lines),
                       static_cast<int>(weight.words),
                       static_cast<int>(ceil_div(weight.cols, weight.block_cols)),
                       static_cast<int>(weight.block_cols),
                       lanes_log,
                       (reinterpret_cast<uintptr_t>(call.x) | reinterpret_cast<uintptr_t>(norm.weight)) % 16 == 0 &&
                           weight.cols % 8 == 0,
                       weight.pairs};
  const size_t shared = delta_shared_bytes(p.tokens, p.block_cols, p.share_rows);
  const auto run = [&](auto kernel) {
    if (device.capability < 90) return start(kernel, weight.shares, kDeltaThreads, shared, call.stream, p);
    return start_early(kernel, weight.shares, kDeltaThreads, shared, call.stream, p);
  };
  return call.dtype == Dtype::bfloat16 ? by_tokens<Bfloat16>(call.tokens, weight.fifths, run)
                                       : by_tokens<Float16>(call.tokens, weight.fifths, run);
}

}  // namespace alphaprune::cuda
