#include <algorithm>

#include "launch_sm90.cuh"
#include "nm_mma_sp_sm90.cuh"

namespace alphaprune::cuda {
namespace {

// Sets what follows from group and splits; false where fewer than two stages of each slice fit the device.
bool arrange(StreamProblem* p, int tiles, const Device& device) {
  p->units = static_cast<int>(ceil_div(p->row_panels, p->group));
  // Where a cluster shares the columns, each does one unit: nobody brings on while others add up.
  p->clusters = p->splits > 1 || p->units < device.multiprocessors ? p->units : device.multiprocessors;
  // With more tokens a warp waits longer for its tensor core: more of them, so that another one has work for it.
  const int warps = tiles == 1 ? 8 : kStreamWarps;
  for (p->slices = 8; p->slices; p->slices /= 2) {
    if (p->warps() > warps) continue;
    for (p->stages = kStreamMostStages; p->stages >= 2 * p->slices; p->stages -= p->slices)
      if (p->shared_bytes(tiles) <= static_cast<size_t>(device.shared_bytes)) return true;
  }
  return false;
}

// What a multiprocessor reads of the weight and of x, in bytes, where it has the most to do; sums that go through the
// shared memory of a cluster, and its barriers, by what could be read meanwhile.
int64_t load_of(const StreamProblem& p, const Device& device) {
  // What is read in the time that it takes to order one stage: some 400 clocks.
  constexpr int64_t kLeastBytes = 9000;
  // Clusters of more than two blocks do not fill all groups of multiprocessors.
  const int64_t processors = p.splits <= 2 ? device.multiprocessors : device.multiprocessors * 13 / 16;
  const int64_t waves = ceil_div(int64_t{p.units} * p.splits, std::max<int64_t>(processors, 1));
  const int64_t stages = ceil_div(p.nm.col_panels, p.splits), x = int64_t{p.nm.tokens} * kNmCols * 2;
  const int64_t shared = p.splits > 1 ? 32768 + int64_t{p.group} * kNmRows * p.nm.tokens * 8 : 0;
  return waves * (stages * (std::max(p.group * int64_t{kPanelBytes}, kLeastBytes) + x) + shared);
}

// The best of all ways to share the work; false where there is none.
bool share(StreamProblem* p, int tiles, const Device& device, NmShare wanted) {
  StreamProblem best;
  int64_t least = -1;
  const int groups = wanted.group ? wanted.group : kStreamGroup;
  const int splits = wanted.splits ? wanted.splits : kStreamMostSplits;
  for (p->group = wanted.group ? wanted.group : 1; p->group <= groups; ++p->group)
    for (p->splits = wanted.splits ? wanted.splits : 1; p->splits <= splits; p->splits *= 2) {
      if (p->splits > p->nm.col_panels || !arrange(p, tiles, device)) continue;
      const int64_t load = load_of(*p, device);
      if (least >= 0 && load >= least) continue;
      best = *p;
      least = load;
    }
  if (least >= 0) *p = best;
  return least >= 0;
}

template <class Value, int kTiles>
Status run_stream(StreamProblem p, const Device& device, const Call& call, NmShare wanted) {
  if (!share(&p, kTiles, device, wanted)) return 1;
  TensorMap x;
  const Matrix matrix{call.x, call.tokens, p.nm.cols, int64_t{p.nm.cols} * 2};
  if (const Status status = map_matrix(matrix, 8 * kTiles, kStreamBox, call.dtype, &x)) return status;
  return start_cluster(nm_mma_sp_sm90<Value, kTiles>, int64_t{p.clusters} * p.splits, p.splits, (p.warps() + 1) * kWarp,
                       p.shared_bytes(kTiles), true, call.stream, p, x);
}

template <class Value>
Status stream_by_tokens(const StreamProblem& p, const Device& device, const Call& call, NmShare wanted) {
  if (p.nm.tokens <= 8) return run_stream<Value, 1>(p, device, call, wanted);
  if (p.nm.tokens <= 16) return run_stream<Value, 2>(p, device, call, wanted);
  if (p.nm.tokens <= 32) return run_stream<Value, 4>(p, device, call, wanted);
  return run_stream<Value, 8>(p, device, call, wanted);
}

template <class Value>
Status allow_streams(int bytes) {
  for (const Status status :
       {allow_shared(nm_mma_sp_sm90<Value, 1>, bytes), allow_shared(nm_mma_sp_sm90<Value, 2>, bytes),
        allow_shared(nm_mma_sp_sm90<Value, 4>, bytes), allow_shared(nm_mma_sp_sm90<Value, 8>, bytes)})
    if (status) return status;
  return 0;
}

}  // namespace

Status allow_nm_mma_sp_sm90(int bytes) {
  if (const Status status = allow_streams<Bfloat16>(bytes)) return status;
  return allow_streams<Float16>(bytes);
}

Status nm_mma_sp_sm90(const NmView& weight, NmShare wanted, const Device& device, const Call& call) {
  StreamProblem p{};
  p.nm = nm_problem(weight, call);
  p.row_panels = nm_row_panels(call);
  p.fours = stores_fours(call);
  return call.dtype == Dtype::bfloat16 ? stream_by_tokens<Bfloat16>(p, device, call, wanted)
                                       : stream_by_tokens<Float16>(p, device, call, wanted);
}

}  // namespace alphaprune::cuda
