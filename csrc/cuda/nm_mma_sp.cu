#include "launch.cuh"
#include "nm_mma_sp.cuh"

namespace alphaprune::cuda {
namespace {

template <class Value, int kTiles>
Status run(const NmProblem& p, int64_t panels, bool whole, void* stream) {
  const auto kernel = whole ? nm_mma_sp<Value, kTiles, true> : nm_mma_sp<Value, kTiles, false>;
  return start(kernel, panels, nm_warps(kTiles) * kWarp, nm_shared_bytes(kTiles), stream, p);
}

template <class Value>
Status by_tokens(const NmProblem& p, int64_t panels, bool whole, void* stream) {
  if (p.tokens <= 8) return run<Value, 1>(p, panels, whole, stream);
  if (p.tokens <= 16) return run<Value, 2>(p, panels, whole, stream);
  if (p.tokens <= 32) return run<Value, 4>(p, panels, whole, stream);
  return run<Value, 8>(p, panels, whole, stream);
}

template <class Value, int kTiles>
Status allow(int bytes) {
  if (const Status status = allow_shared(nm_mma_sp<Value, kTiles, true>, bytes)) return status;
  return allow_shared(nm_mma_sp<Value, kTiles, false>, bytes);
}

template <class Value>
Status allow_all(int bytes) {
  for (const Status status :
       {allow<Value, 1>(bytes), allow<Value, 2>(bytes), allow<Value, 4>(bytes), allow<Value, 8>(bytes)})
    if (status) return status;
  return 0;
}

}  // namespace

Status allow_nm_mma_sp(int bytes) {
  if (const Status status = allow_all<Bfloat16>(bytes)) return status;
  return allow_all<Float16>(bytes);
}

int nm_row_panels(const Call& call) {
  int64_t panels = 0;
  for (int i = 0; i < call.members; ++i) panels += ceil_div(call.out[i].rows, kNmRows);
  return static_cast<int>(panels);
}

NmProblem nm_problem(const NmView& weight, const Call& call) {
  NmProblem p{};
  for (int i = 0; i < call.members; ++i) p.panels[i] = static_cast<const uint4*>(weight.panels[i]);
  p.x = static_cast<const uint16_t*>(call.x);
  p.out = output_of(call, kNmRows);
  p.cols = static_cast<int>(weight.cols);
  p.tokens = static_cast<int>(call.tokens);
  p.col_panels = static_cast<int>(ceil_div(weight.cols, kNmCols));
  p.eights = reinterpret_cast<uintptr_t>(call.x) % 16 == 0 && weight.cols % 8 == 0;
  return p;
}

Status nm_mma_sp(const NmView& weight, const Device& device, const Call& call) {
  const NmProblem p = nm_problem(weight, call);
  // Few tokens of few rows: a block for each panel of rows is as fast, and has less to begin and to end.
  const int panels = nm_row_panels(call);
  const bool many = panels > 2 * int64_t{device.multiprocessors};
  if (device.capability == 90 && p.eights && (many || p.tokens > 16))
    return nm_mma_sp_sm90(weight, {0, 0}, device, call);
  const bool whole = p.eights && weight.cols % kNmCols == 0;
  return call.dtype == Dtype::bfloat16 ? by_tokens<Bfloat16>(p, panels, whole, call.stream)
                                       : by_tokens<Float16>(p, panels, whole, call.stream);
}

}  // namespace alphaprune::cuda
