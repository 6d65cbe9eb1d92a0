#include "launch_sm90.cuh"
#include "sbt_wgmma.cuh"

namespace alphaprune::cuda {
namespace {

// A block's beginning and end, and those of blocks that add up, take as long as so many stages: an estimate.
constexpr int64_t kStart = 2, kSharing = 2;

// As many blocks of a cluster as let the device end soonest: waves of blocks times the stages that each walks.
int splits_for(int64_t row_blocks, int64_t chunks, const Device& device) {
  int best = 1;
  int64_t least = 0;
  for (int splits = 1; splits <= kWideMostSplits && splits <= chunks; splits *= 2) {
    const int64_t stages = ceil_div(chunks, splits) + kStart + (splits > 1 ? kSharing : 0);
    const int64_t time = ceil_div(row_blocks * splits, device.multiprocessors) * stages;
    if (splits > 1 && time >= least) continue;
    best = splits;
    least = time;
  }
  return best;
}

template <class Value, int kTokens>
Status run(WideProblem p, const TensorMap& x, const Device& device, void* stream) {
  const auto shared = [&] { return wide_shared_bytes(kTokens, p.stages, p.value_bytes); };
  for (p.stages = kWideMostStages; p.stages > 2 && shared() > static_cast<size_t>(device.shared_bytes);) --p.stages;
  const int64_t row_blocks = ceil_div(p.row_tiles, kWideTiles);
  return start_cluster(sbt_wgmma<Value, kTokens>, row_blocks * p.splits, p.splits, wide_threads(kTokens), shared(),
                       false, stream, p, x);
}

template <class Value>
Status by_tokens(const WideProblem& p, const Device& device, const Call& call, int64_t x_stride) {
  const int box = p.tokens <= 32 ? 32 : p.tokens <= 64 ? 64 : p.tokens <= 128 ? 128 : 256;
  TensorMap x;
  const Matrix matrix{call.x, call.tokens, x_stride, x_stride * 2};
  if (const Status status = map_matrix(matrix, box, kBoxCols, call.dtype, &x)) return status;
  switch (box) {
    case 32:
      return run<Value, 32>(p, x, device, call.stream);
    case 64:
      return run<Value, 64>(p, x, device, call.stream);
    case 128:
      return run<Value, 128>(p, x, device, call.stream);
    default:
      return run<Value, 256>(p, x, device, call.stream);
  }
}

template <class Value>
Status allow_all(int bytes) {
  for (const Status status : {allow_shared(sbt_wgmma<Value, 32>, bytes), allow_shared(sbt_wgmma<Value, 64>, bytes),
                              allow_shared(sbt_wgmma<Value, 128>, bytes), allow_shared(sbt_wgmma<Value, 256>, bytes)})
    if (status) return status;
  return 0;
}

}  // namespace

Status allow_sbt_wgmma(int bytes) {
  if (const Status status = allow_all<Bfloat16>(bytes)) return status;
  return allow_all<Float16>(bytes);
}

Status sbt_wgmma(const sbt::View& weight, uint32_t tile_units, int splits, const Device& device, const Call& call,
                 int64_t x_stride) {
  WideProblem p{static_cast<const unsigned char*>(weight.values),
                weight.mask,
                weight.offsets,
                output_of(call),
                static_cast<int>(call.tokens),
                static_cast<int>(weight.row_tiles()),
                static_cast<int>(weight.col_tiles()),
                splits,
                kWideMostStages,
                tile_units * 16,
                stores_fours(call),
                {1, 2}};
  const int64_t chunks = ceil_div(weight.col_tiles(), kWideChunk);
  if (splits < 1) p.splits = splits_for(ceil_div(weight.row_tiles(), kWideTiles), chunks, device);
  return call.dtype == Dtype::bfloat16 ? by_tokens<Bfloat16>(p, device, call, x_stride)
                                       : by_tokens<Float16>(p, device, call, x_stride);
}

}  // namespace alphaprune::cuda
