#include "delta_spmv.cuh"
#include "launch.cuh"
#include <cstdlib>

namespace alphaprune::cuda {
namespace {

inline int early() { const char* v = std::getenv("ALPHAPRUNE_DELTA_EARLY"); return v ? std::atoi(v) : 0; }
inline int before() { const char* v = std::getenv("ALPHAPRUNE_DELTA_BEFORE"); return v ? std::atoi(v) : 2; }
template <class Value, int kTokens, int kWarps, int kBefore, class Use>
Status with(bool fifth, const Use& use) {
  return fifth ? use(delta_spmv<Value, kTokens, true, kWarps, 4, kBefore>)
               : use(delta_spmv<Value, kTokens, false, kWarps, 4, kBefore>);
}
template <class Value, int kTokens, int kWarps, class Use>
Status placed(bool fifth, const Use& use) {
  if constexpr (Value::code == Bfloat16::code && kTokens <= 2) {
    if (before() == 0) return with<Value, kTokens, kWarps, 0>(fifth, use);
    if (before() == 4) return with<Value, kTokens, kWarps, 4>(fifth, use);
  }
  return with<Value, kTokens, kWarps, 2>(fifth, use);
}
template <class Value, int kTokens, class Use>
Status variant(int64_t warps, bool fifth, const Use& use) {
  if constexpr (Value::code == Bfloat16::code) {
    if (warps == 8) return placed<Value, kTokens, 8>(fifth, use);
    if (warps == 12) return placed<Value, kTokens, 12>(fifth, use);
  }
  return placed<Value, kTokens, 24>(fifth, use);
}

template <class Value, class Use>
Status by_tokens(int64_t tokens, int64_t warps, bool fifth, const Use& use) {
  if (tokens == 1) return variant<Value, 1>(warps, fifth, use);
  if (tokens == 2) return variant<Value, 2>(warps, fifth, use);
  return variant<Value, 4>(warps, fifth, use);
}

}  // namespace

Status allow_delta_spmv(int bytes) {
  for (const int64_t tokens : {1, 2, 4})
    for (const int64_t warps : {8, 12, 24})
    for (const char* b : {"0", "2", "4"})
    for (const bool fifth : {false, true}) {
      setenv("ALPHAPRUNE_DELTA_BEFORE", b, 1);
      const auto allow = [bytes](auto kernel) { return allow_shared(kernel, bytes); };
      if (const Status status = by_tokens<Bfloat16>(tokens, warps, fifth, allow)) return status;
      if (const Status status = by_tokens<Float16>(tokens, warps, fifth, allow)) return status;
    }
  unsetenv("ALPHAPRUNE_DELTA_BEFORE");
  return 0;
}

int64_t delta_most_tokens(const DeltaView& weight, const Device& device) {
  const size_t all = delta_shared_bytes(kMostDeltaTokens, static_cast<int>(weight.block_cols),
                                        static_cast<int>(weight.warps), static_cast<int>(weight.share_rows));
  return all <= static_cast<size_t>(device.shared_bytes) ? kMostDeltaTokens : 2;
}

Status delta_spmv(const DeltaView& weight, const Call& call) {
  int lanes_log = 5;
  while (weight.share_rows << lanes_log > weight.warps * kWarp) --lanes_log;
  const DeltaProblem p{static_cast<const uint4*>(weight.values),
                       weight.deltas,
                       weight.fifths,
                       weight.begins,
                       weight.starts,
                       weight.counts,
                       weight.sums,
                       weight.rows_of,
                       static_cast<const uint16_t*>(call.x),
                       {call.bias, static_cast<const uint16_t*>(call.residual), static_cast<uint16_t*>(call.y),
                        static_cast<int>(weight.rows), static_cast<int>(call.bias_dtype)},
                       static_cast<int>(weight.cols),
                       static_cast<int>(call.tokens),
                       static_cast<int>(weight.share_rows),
                       static_cast<int>(weight.lines),
                       static_cast<int>(weight.words),
                       static_cast<int>(ceil_div(weight.cols, weight.block_cols)),
                       static_cast<int>(weight.block_cols),
                       lanes_log,
                       reinterpret_cast<uintptr_t>(call.x) % 16 == 0 && weight.cols % 8 == 0};
  const auto run = [&](auto kernel) {
    const size_t shared = delta_shared_bytes(p.tokens, p.block_cols, static_cast<int>(weight.warps), p.share_rows);
    const int threads = static_cast<int>(weight.warps) * kWarp;
    if (early()) return start_early(kernel, weight.shares, threads, shared, call.stream, p);
    return start(kernel, weight.shares, threads, shared, call.stream, p);
  };
  return call.dtype == Dtype::bfloat16 ? by_tokens<Bfloat16>(call.tokens, weight.warps, weight.fifths, run)
                                       : by_tokens<Float16>(call.tokens, weight.warps, weight.fifths, run);
}

}  // namespace alphaprune::cuda
